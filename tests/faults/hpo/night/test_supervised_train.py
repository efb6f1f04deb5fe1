"""``hpo train`` under its supervisor: whatever happens to its worker, the run goes on to the same bytes, or the command
ends with one clear sentence.  Real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import hpo.train.run
from hpo.cli.main import main
from hpo.terminal.live import STOPPING
from tests import supervised
from tests.faults.zygote import finish
from tests.inbox import open_inbox
from tests.supervised import (
    Fault,
    always,
    begin,
    is_over,
    once,
    saves_every_step,
    state_of,
    tell_supervisor,
    until,
)
from tests.tiny import save_folder, tiny_base
from tests.tiny_run import TINY
from tests.tiny_search import draw_images
from trainer.errors import Interrupted, MachineError
from trainer.files import read_records

pytestmark = pytest.mark.faults
STEPS = 16
HANG = ("--hang-minutes", "0.02")  # 1.2 s; SIGKILL follows as much later
SETTINGS = (
    TINY
    + f"""
learning_rate = 1e-3
train_batch_size = 2
max_train_steps = {STEPS}
save_precision = "float"
"""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, images, settings, and whole/lora.safetensors of an undisturbed run.  Everything is imported
    and run once before the first fork."""
    torch.set_num_threads(1)
    here = tmp_path_factory.mktemp("place")
    save_folder(tiny_base("sd15"), here / "base")
    draw_images(here / "images" / "1_zkw figure", count=4)
    (here / "settings.toml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        done = CliRunner().invoke(main, words("whole"), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return here


def words(output: str, *more: str) -> list[str]:
    given = ("--base", "base", "--data", "images", "--device", "cpu", "--output", output)
    return ["train", "settings.toml", *given, *more]


class Run:
    """One call of the command, in a folder of its own."""

    def __init__(self, place: Path, tmp_path: Path) -> None:
        self.place, self.out, self.screen = place, tmp_path / "out", tmp_path / "screen"
        self.marker = tmp_path / "marker"

    def begin(self, fault: Fault = lambda done, what: None, *more: str) -> int:
        return begin(self.place, self.screen, words(str(self.out), *HANG, *more), fault, saves_every_step)

    def end(self, fault: Fault = lambda done, what: None, *more: str) -> int:
        return finish(self.begin(fault, *more))

    @property
    def said(self) -> str:
        return self.screen.read_text()

    @property
    def deaths(self) -> list[str]:
        return [row["reason"] for row in read_records(self.out / "lora.run" / "night.jsonl")]

    def is_whole(self) -> bool:
        """The file of an undisturbed run, to the bit, and nothing beside it that is only needed to go on."""
        one, other = (path / "lora.safetensors" for path in (self.out, self.place / "whole"))
        steps = [
            row["step"]
            for row in read_records(self.out / "lora.run" / "train.jsonl")
            if row["event"] == "step"
        ]
        clean = not list(self.out.rglob(".*tmp*")) and not (self.out / "lora.run" / "checkpoints").exists()
        return one.read_bytes() == other.read_bytes() and steps == list(range(1, STEPS + 1)) and clean


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Run:
    return Run(place, tmp_path)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (supervised.stand_still, "hang"),
        (supervised.crash, "crash:SIGSEGV"),
        (supervised.use_up_memory, "host_memory"),
    ],
)
def test_a_worker_that_fails_is_replaced_and_the_run_ends_with_the_same_bytes(
    run: Run, what: Callable[[], None], reason: str
) -> None:
    """A9 · weight 3 · A worker dies in the middle of its work (a crash in native code, all memory used up) → The reason
    is noted, a new worker goes on from the last checkpoint, and the LoRA is bitwise the same (on a CPU).
    """
    assert run.end(once(run.marker, 11, what)) == 0, run.said
    assert run.is_whole()
    assert run.deaths == [reason]
    assert is_over(int(run.marker.read_text()))
    assert run.said.count("goes on in 0.05 s") == 1 and "resuming from step 1" in run.said
    work = read_records(run.out / "lora.run" / "work.jsonl")
    assert [row["event"] for row in work][-1] == "finished"


def test_three_restarts_without_new_progress_end_the_command_with_what_to_do(run: Run) -> None:
    code = run.end(always(5, supervised.crash))
    assert code == MachineError.exit_code
    assert run.deaths == ["crash:SIGSEGV"] * 4
    *_, error, then = run.said.splitlines()
    assert error == ("error: it died 4 times without new progress, the last time: killed by SIGSEGV")
    assert then.startswith("next: hpo resume ") and then.endswith("/lora.run")
    assert run.end() == 0 and run.is_whole()


def test_a_hang_is_ended_gone_on_from_and_each_said_once_to_who_wanted_to_know(run: Run) -> None:
    """W9 · weight 3 · A GPU that hangs: the worker lives and makes no progress → It is asked to save, then killed,
    and a new one goes on from the last checkpoint to the same bytes. A message says that it hung, and one that it
    goes on.
    """
    with open_inbox() as inbox:
        code = run.end(once(run.marker, 11, supervised.hold_the_interpreter), "--notify", inbox.url)
        inbox.wait(3)
    assert code == 0 and run.is_whole() and run.deaths == ["hang"]
    name = f"{run.out}/lora.run"
    assert inbox.titles == [f"{name}: hung", f"{name}: restarted", f"{name}: train lora finished"]
    kept = [path.read_bytes() for path in run.out.rglob("*") if path.is_file()]
    assert not [text for text in (run.said.encode(), *kept) if b"s3cret" in text], "the URL is a secret"


def test_who_wanted_to_know_only_of_a_failure_gets_one_message(run: Run) -> None:
    with open_inbox() as inbox:
        words = ("--notify", inbox.url, "--notify-on", "failed")
        code = run.end(always(5, supervised.crash), *words)
        inbox.wait()
    assert code == MachineError.exit_code
    (message,) = inbox.received
    assert message["title"] == f"{run.out}/lora.run: failed"
    assert "died 4 times without new progress" in message["message"]


def test_a_worker_that_gets_a_little_further_each_time_is_started_again_and_again(run: Run) -> None:
    """Six deaths, more than three restarts, each after new steps."""
    deaths = run.marker

    def fault(step: int, what: str) -> None:
        died = len(deaths.read_text()) if deaths.exists() else 0
        if step == 2 * (died + 1) and died < 6:
            deaths.write_text("x" * (died + 1))
            supervised.die()

    assert run.end(fault) == 0 and run.is_whole()
    assert run.deaths == ["process_died"] * 6


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, Interrupted.exit_code),
        (signal.SIGTERM, Interrupted.TERMINATED),
        (signal.SIGUSR1, Interrupted.TERMINATED),
    ],
)
def test_a_signal_saves_and_ends_with_its_code_and_the_same_command_goes_on(
    run: Run, number: int, code: int
) -> None:
    """W5 · weight 3 · Ctrl-C, or SIGTERM or SIGUSR1 from a job system → The step is finished and saved, the exit code
    is 130, or 75 for a job system, and the same command goes on from that step.
    """
    assert run.end(once(run.marker, 5, tell_supervisor(number))) == code
    assert f"stopped after step 5/{STEPS}" in run.said and "next: hpo resume " in run.said
    assert run.said.count(STOPPING) == 1 and run.deaths == []
    assert is_over(int(run.marker.read_text()))
    if number == signal.SIGUSR1:
        assert run.end() == 0 and run.is_whole() and "resuming from step 5" in run.said


def test_a_second_ctrl_c_ends_at_once(run: Run) -> None:
    """W6 · weight 3 · A second Ctrl-C while the first one is being handled → It ends at once, and what was saved before
    is whole.
    """

    def what() -> None:
        os.kill(os.getppid(), signal.SIGINT)
        until(supervised.is_asked_to_stop)
        os.kill(os.getppid(), signal.SIGINT)
        while True:  # it would never stop after this step
            signal.pause()

    assert run.end(once(run.marker, 5, what)) == Interrupted.exit_code
    assert "stopped at once" in run.said and run.deaths == []
    assert is_over(int(run.marker.read_text()))
    assert run.end() == 0 and run.is_whole()


def test_a_second_sigterm_hurries_nothing(run: Run) -> None:
    assert (
        run.end(once(run.marker, 5, tell_supervisor(signal.SIGTERM, signal.SIGTERM)))
        == Interrupted.TERMINATED
    )
    assert f"stopped after step 5/{STEPS}" in run.said


def test_a_stop_while_the_base_is_loaded_is_a_stop(run: Run) -> None:
    def loads(*_: object) -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        while True:
            signal.pause()

    def prepare() -> None:
        hpo.train.run.load = loads  # type: ignore[assignment]

    pid = begin(run.place, run.screen, words(str(run.out)), prepare=prepare)
    assert finish(pid) == Interrupted.TERMINATED
    assert run.said.splitlines()[-2:] == ["stopped; what was saved before is kept", "next: the same command"]
    assert run.end() == 0 and run.is_whole()


def test_ctrl_z_suspends_the_worker_as_well_and_fg_lets_it_go_on(run: Run) -> None:
    go = run.marker.with_name("go")

    def prepare() -> None:
        os.setpgid(0, 0)  # as a shell does: a group that has lost its shell cannot be suspended
        saves_every_step()

    fault = once(run.marker, 5, lambda: until(go.exists))
    pid = begin(run.place, run.screen, words(str(run.out)), fault, prepare)
    until(run.marker.exists)
    worker = int(until(run.marker.read_text))
    os.kill(pid, signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    until(lambda: state_of(worker) == "T")
    go.touch()
    os.kill(pid, signal.SIGCONT)
    assert finish(pid) == 0 and run.is_whole() and run.deaths == []


def test_when_the_supervisor_is_killed_its_worker_saves_and_ends(run: Run) -> None:
    parent = run.begin(once(run.marker, 5, lambda: tell_supervisor(signal.SIGKILL)()))
    assert finish(parent) == -signal.SIGKILL
    until(lambda: is_over(int(run.marker.read_text())))
    assert f"stopped after step 5/{STEPS}" in run.said
    assert run.end() == 0 and run.is_whole()


def test_a_users_mistake_ends_the_command_as_without_a_supervisor(run: Run, place: Path) -> None:
    assert run.end(lambda done, what: None, "--set", "no_such_setting=1") == 2
    assert "goes on in" not in run.said and run.said.count("no_such_setting") == 1
    assert not run.out.exists()


@pytest.mark.parametrize("then", [lambda: None, supervised.die], ids=["alone", "and-its-worker-dies"])
def test_the_run_goes_on_when_its_terminal_is_gone(run: Run, then: Callable[[], None]) -> None:
    near, far = os.openpty()
    gone = run.marker.with_name("gone")

    def what() -> None:
        until(gone.exists)
        then()

    pid = supervised.start(
        supervised.command_at_terminal,
        run.place,
        far,
        words(str(run.out), *HANG),
        once(run.marker, 5, what),
        lambda: (os.close(near), saves_every_step())[1],
    )
    os.close(far)
    seen = b""
    while not run.marker.exists():
        seen += os.read(near, 1 << 16)
    assert b"\x1b[" in seen, "the worker draws at the terminal"
    os.close(near)
    gone.touch()
    assert finish(pid) == 0
    assert run.is_whole()
    assert "LoRA: " in (run.out / "lora.run" / "output.log").read_text()


def test_ctrl_c_at_a_terminal_reaches_the_worker_once(run: Run) -> None:
    near, far = os.openpty()
    pid = supervised.start(
        supervised.command_at_terminal,
        run.place,
        far,
        words(str(run.out), *HANG),
        once(run.marker, 5, lambda: until(supervised.is_asked_to_stop)),
        saves_every_step,
    )
    os.close(far)
    seen = b""
    while not run.marker.exists():
        seen += os.read(near, 1 << 16)
    os.write(near, b"\x03")
    while True:
        try:
            seen += os.read(near, 1 << 16)
        except OSError:  # the last process has left the terminal
            break
    assert finish(pid) == Interrupted.exit_code
    assert f"stopped after step 5/{STEPS}".encode() in seen and b"stopped at once" not in seen
    assert (
        json.loads((run.out / "lora.run" / "work.jsonl").read_text().splitlines()[-1])["event"]
        == "interrupted"
    )


@pytest.mark.parametrize("free", [0, 8, 30, 50])
def test_a_disk_that_is_full_from_some_moment_on_ends_the_run_and_loses_nothing(run: Run, free: int) -> None:
    """``free``: writes to files before the disk is full for ever.  With room, the same command ends as ever."""

    def prepare() -> None:
        saves_every_step()
        supervised.disk_full_after(free)

    code = finish(begin(run.place, run.screen, words(str(run.out), *HANG), prepare=prepare))
    assert code == MachineError.exit_code, run.said
    assert run.said.count("error: ") == 1 and "disk full" in run.said and "Traceback" not in run.said
    assert "goes on in" not in run.said, "a new process would not mend it"
    assert run.end() == 0 and run.is_whole()
