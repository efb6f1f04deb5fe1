"""Two processes (gloo, CPU) train the LoRA that one process trains, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import distributed

import hpo.train.keeper
import trainer.loop.ranks
from hpo.cli.main import main
from tests.faults.zygote import finish, start
from tests.tiny import save_folder, tiny_base
from tests.tiny_run import TINY
from tests.tiny_search import draw_images
from trainer.errors import MachineError
from trainer.events import Step
from trainer.loop import loop
from trainer.loop.ranks import ALONE, Ranks, join, launched, leave
from trainer.loop.stepper import Stepper, cut

SETTINGS = (
    TINY
    + """
learning_rate = 1e-3
train_batch_size = 2
gradient_accumulation_steps = 2
module_dropout = 0.2
network_dropout = 0.2
rank_dropout = 0.2
max_train_epochs = 2
save_precision = "float"
"""
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five images: a step of three micro-batches an epoch, [2 2] and [1]."""
    torch.set_num_threads(1)
    draw_images(tmp_path / "images" / "1_zkw figure", count=5)
    save_folder(tiny_base("sd15"), tmp_path / "base")
    (tmp_path / "settings.toml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def train(output: str) -> int:
    words = ["train", "settings.toml", "--base", "base", "--data", "images", "--device", "cpu"]
    return CliRunner().invoke(main, [*words, "--output", output], catch_exceptions=False).exit_code


def one_of_two(rank: int, port: int, output: str, kill_after: int | None) -> None:
    """What torchrun starts: the same command with its variables.  One that waits for ever is ended."""
    signal.alarm(240)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    loop.Conduct.__init__.__kwdefaults__["checkpoint_every_seconds"] = 0.0
    on_event = hpo.train.keeper.Keeper.on_event

    def dying(self, event, adapter):
        if isinstance(event, Step) and event.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        on_event(self, event, adapter)

    hpo.train.keeper.Keeper.on_event = dying
    raise SystemExit(train(output))


def train_in_two(output: str, kill_after: int | None = None) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [finish(pid) for pid in [start(one_of_two, rank, port, output, kill_after) for rank in (0, 1)]]


def steps(output: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in Path(output, "lora.run/train.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "step"]


def assert_close(first: str, second: str) -> None:
    """The same steps, and the same LoRA to rounding.  AdamW's first steps are nearly the sign of a gradient:
    where it is about 0, another order of summing may turn one around."""
    for name, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [row[name] for row in steps(first)] == pytest.approx([r[name] for r in steps(second)], rel=rel)
    a, b = (safetensors.torch.load_file(f"{folder}/lora.safetensors") for folder in (first, second))
    assert a.keys() == b.keys()
    close = [torch.isclose(a[name], b[name], rtol=5e-3, atol=2e-6).flatten() for name in a]
    assert float(torch.cat(close).float().mean()) > 0.995


def test_two_processes_come_to_what_one_comes_to(place: Path) -> None:
    assert train_in_two("two") == [0, 0]
    assert finish(start(lambda: exit(train("one")))) == 0
    assert_close("one", "two")
    assert [row["step"] for row in steps("two")] == [1, 2, 3, 4]


def test_two_processes_killed_in_mid_run_go_on_as_one(place: Path) -> None:
    """Rank 0 dies after the checkpoint of step 2; rank 1 notices and ends; one process finishes the run."""
    codes = train_in_two("killed", kill_after=3)
    assert codes[0] == -signal.SIGKILL and codes[1] == 5
    assert [path.name for path in Path("killed/lora.run/checkpoints").iterdir()] == ["step-000002"]
    assert finish(start(lambda: exit(train("killed")))) == 0
    assert finish(start(lambda: exit(train("one")))) == 0
    assert_close("one", "killed")


def test_memory_that_runs_out_in_one_process_s_update_is_told_to_the_other(place: Path) -> None:
    """Rank 1 alone fails, inside the optimizer's update of step 2: both go on from the checkpoint of step 1."""
    update, calls = Stepper._update, iter(range(1000))

    def failing(self: Stepper, step: int) -> None:
        if self.ranks.rank == 1 and next(calls) == 2:  # after the dry step and the first real one
            raise torch.OutOfMemoryError("CUDA out of memory.")
        update(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "_update", failing)
        assert train_in_two("two") == [0, 0]
    assert finish(start(lambda: exit(train("one")))) == 0
    assert_close("one", "two")
    (row,) = [json.loads(line) for line in Path("two/lora.run/ladder.jsonl").read_text().splitlines()]
    assert (row["rung"], row["step"]) == ("batch 1", 1)


def test_memory_that_runs_out_before_gradients_are_sent_is_told_to_the_other(place: Path) -> None:
    """Rank 1 alone has no room for the gradients of step 2: rank 0 does not wait for what never comes."""
    rooms, calls = trainer.loop.ranks._rooms, iter(range(1000))

    def failing(gradients: Sequence[torch.Tensor]) -> Any:
        if os.environ["RANK"] == "1" and next(calls) == 2:  # after the dry step and the first real one
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rooms(gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.loop.ranks, "_rooms", failing)
        assert train_in_two("two") == [0, 0]
    assert finish(start(lambda: exit(train("one")))) == 0
    assert_close("one", "two")
    (row,) = [json.loads(line) for line in Path("two/lora.run/ladder.jsonl").read_text().splitlines()]
    assert (row["rung"], row["step"]) == ("batch 1", 1)


def waits_for_a_slow_one(rank: int, port: int, dies: bool) -> None:
    """The second process is alone for longer than an exchange of numbers may take; perhaps it dies there."""
    signal.alarm(60)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = Ranks(rank, 2, rank)
    join(both, "cpu")
    distributed.distributed_c10d._set_pg_timeout(timedelta(milliseconds=500), distributed.group.WORLD)
    try:
        if rank == 1:
            with pytest.raises(RuntimeError, match="Timed out"):
                distributed.barrier()  # without the patience of the others
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
        both.wait()
        assert both.any(rank == 0) and both.lowest(5 + rank) == 5
        leave()
    except MachineError as error:
        raise SystemExit(5 if "another process of this run is gone" in error.message else 1) from error


@pytest.mark.parametrize("dies", [False, True])
def test_the_others_wait_for_what_one_does_alone_and_notice_when_it_dies(dies: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    codes = [finish(pid) for pid in [start(waits_for_a_slow_one, rank, port, dies) for rank in (0, 1)]]
    assert codes == ([5, -signal.SIGKILL] if dies else [0, 0])


def test_gradients_of_one_dtype_are_sent_in_one_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.loop.ranks, "BUCKET_VALUES", 10)
    sizes = (6, 4, 3, 25, 1)
    gradients = [torch.full((n,), float(n)) for n in sizes] + [torch.ones(2, dtype=torch.bfloat16)]
    rooms = trainer.loop.ranks._rooms(gradients)
    assert [[len(g) for g in bucket] for bucket, _ in rooms] == [[2], [6, 4], [3], [25], [1]]
    assert [(len(flat), flat.dtype) for _, flat in rooms[:2]] == [(2, torch.bfloat16), (10, torch.float32)]
    assert len({flat.data_ptr() for _, flat in rooms[1:]}) == 1


def test_a_step_is_dealt_out_so_that_each_process_has_a_part() -> None:
    micros = [[object()] * 4, [object()] * 4]
    assert [part.number for part in cut(micros, 4, 1)] == [0, 1]
    assert [len(part.samples) for part in cut(micros, 4, 2)] == [4, 4]
    assert [len(part.samples) for part in cut(micros, 4, 3)] == [2, 2, 2, 2]
    assert [len(part.samples) for part in cut(micros, 4, 8)] == [1] * 8
    assert [(p.number, p.start, p.total) for p in cut([[object()] * 3], 2, 1)] == [(0, 0, 3), (0, 2, 3)]
    assert len(cut([[object()]], 1, 2)) == 1


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == ALONE
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert launched() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (launched().world, launched().is_first) == (2, True)
