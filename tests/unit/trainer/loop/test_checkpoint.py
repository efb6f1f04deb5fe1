"""What a checkpoint promises: complete or not there, and never mixed into another run."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_base, tiny_config
from trainer.adapters.adapter import inject
from trainer.errors import ConfigError, MachineError, OutOfMemory
from trainer.files import atomic_folder
from trainer.loop import checkpoint
from trainer.loop.checkpoint import Progress, Run
from trainer.loop.optim import build_optimizer


def make_run(config=None, base_identity="base", dataset_hash="data"):
    config = config or tiny_config()
    adapter = inject(tiny_base("sd15"), config)
    optimizer = build_optimizer(config, adapter)
    return Run(
        config, base_identity, dataset_hash, adapter, optimizer, torch.amp.GradScaler("cpu", enabled=False)
    )


def move(run, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for weight in run.adapter.trainable():
        weight.grad = torch.randn(weight.shape, generator=generator)
    run.optimizer.step()


def test_what_was_saved_comes_back(tmp_path):
    run = make_run()
    move(run)
    checkpoint.save(tmp_path, run, Progress(5, 2, 1))
    other = make_run()
    assert checkpoint.restore(tmp_path, other) == Progress(5, 2, 1)
    assert other.adapter.fingerprint() == run.adapter.fingerprint()
    move(run, 1)
    move(other, 1)
    assert other.adapter.fingerprint() == run.adapter.fingerprint()


def test_without_a_checkpoint_it_is_the_beginning(tmp_path):
    assert checkpoint.restore(tmp_path, make_run()) == Progress()
    assert checkpoint.restore(tmp_path / "missing", make_run()) == Progress()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    run = make_run()
    move(run)
    first = checkpoint.save(tmp_path / "a", run, Progress(1))
    kept = run.adapter.fingerprint()
    move(run, 1)
    second = checkpoint.save(tmp_path / "b", run, Progress(2))
    first.rename(tmp_path / "b" / first.name)
    assert checkpoint.last_good(tmp_path / "b", applied=3) == second
    assert checkpoint.last_good(tmp_path / "b", applied=2) == tmp_path / "b" / first.name
    damaged = second / "adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    other = make_run()
    assert checkpoint.last_good(tmp_path / "b", applied=3) == tmp_path / "b" / first.name
    assert checkpoint.restore(tmp_path / "b", other) == Progress(1)
    assert other.adapter.fingerprint() == kept


def test_a_save_that_fails_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    run = make_run()
    move(run)
    checkpoint.save(tmp_path, run, Progress(1))

    def broken(*args, **kwargs):
        raise RuntimeError("killed here")

    monkeypatch.setattr(checkpoint.torch, "save", broken)
    with pytest.raises(RuntimeError):
        checkpoint.save(tmp_path, run, Progress(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.restore(tmp_path, make_run()) == Progress(1)


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path):
    run = make_run()
    checkpoint.save(tmp_path, run, Progress(1))
    with pytest.raises(ConfigError, match=r"learning_rate 0\.001 → 0\.002"):
        checkpoint.restore(tmp_path, make_run(tiny_config(learning_rate=2e-3)))
    with pytest.raises(ConfigError, match="another base"):
        checkpoint.restore(tmp_path, make_run(base_identity="other"))
    with pytest.raises(ConfigError, match="other images"):
        checkpoint.restore(tmp_path, make_run(dataset_hash="other"))


def test_settings_that_do_not_change_the_result_may_differ(tmp_path):
    checkpoint.save(tmp_path, make_run(), Progress(1))
    moved = tiny_config(
        gradient_checkpointing=True, output_name="other", vae_batch_size=1, train_data_dir="/x"
    )
    assert checkpoint.restore(tmp_path, make_run(moved)).step == 1


def test_the_optimizers_file_is_never_unpickled_freely(tmp_path):
    """D7 · weight 5 · The optimizer's file in a checkpoint was replaced by a pickle that runs code → It is not
    loaded, even if the manifest matches, and its code does not run.

    A checkpoint whose optimizer.pt would run code on loading is not loaded, even with a matching manifest.
    """
    run = make_run()
    path = checkpoint.save(tmp_path, run, Progress(1))

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"optimizer": Evil(), "scaler": {}}, path / "optimizer.pt")
    import trainer.loop.checkpoint as module

    original = module.verify_folder
    module.verify_folder = lambda folder: True
    try:
        with pytest.raises(Exception, match=r"[Ww]eights"):
            checkpoint.restore(tmp_path, make_run())
    finally:
        module.verify_folder = original
    assert not (tmp_path / "pwned").exists()


def test_state_json_can_be_read_by_a_person(tmp_path):
    path = checkpoint.save(tmp_path, make_run(), Progress(3, 1, 0))
    state = json.loads((path / "state.json").read_text())
    assert state["step"] == 3
    assert state["config"]["learning_rate"] == 1e-3


def test_a_checkpoint_computed_in_another_type_is_refused_by_name(tmp_path):
    """mixed_precision = auto means another type on another card."""
    path = checkpoint.save(tmp_path, make_run(), Progress(1))
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    half = replace(make_run(), compute=torch.float16, scaler=scaler)
    with pytest.raises(ConfigError, match=r"computed in torch\.float32 → torch\.float16"):
        checkpoint.restore(tmp_path, half)
    checkpoint.drop_others(checkpoint.save(tmp_path, half, Progress(2)))
    assert checkpoint.restore(tmp_path, replace(half, scaler=torch.amp.GradScaler("cpu"))) == Progress(2)
    state = json.loads((tmp_path / "step-000002" / "state.json").read_text())
    assert state.pop("compute") == "torch.float16"
    (tmp_path / "older").mkdir()
    with atomic_folder(tmp_path / "older" / "step-000001") as old:
        for name in checkpoint.FILES:
            (old / name).write_bytes((tmp_path / "step-000002" / name).read_bytes())
        (old / "state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="computed in an unknown type"):
        checkpoint.restore(tmp_path / "older", half)
    assert not path.exists()


def test_a_folder_that_only_looks_like_a_checkpoint_is_passed_over(tmp_path):
    checkpoint.save(tmp_path, make_run(), Progress(1))
    (tmp_path / "step-foo").mkdir()
    with atomic_folder(tmp_path / "step-000009"):
        pass  # a manifest with an empty table
    assert checkpoint.restore(tmp_path, make_run()) == Progress(1)


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path, monkeypatch):
    run = make_run()
    checkpoint.save(tmp_path, run, Progress(1))

    def refuse(path, **more):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    second = checkpoint.save(tmp_path, run, Progress(2))
    checkpoint.drop_others(second)
    assert second.is_dir() and checkpoint.steps_behind(tmp_path) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="file"):
        checkpoint.save(tmp_path / "file", run, Progress(3))


def test_out_of_memory_while_restoring_is_named(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, make_run(), Progress(1))
    run = make_run()

    def exhausted(state):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.optimizer, "load_state_dict", exhausted)
    with pytest.raises(OutOfMemory, match="train_batch_size 2"):
        checkpoint.restore(tmp_path, run)
