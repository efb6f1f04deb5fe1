"""The complete state of a training run, saved and restored exactly.

A checkpoint is one atomic folder ``step-000123``: the adapter in fp32, the optimizer, and ``state.json``.  There
is no random state to save: noise, timesteps, order and dropout are functions of (seed, epoch, item, step).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from trainer.adapters import Adapter
from trainer.config import WITHOUT_INFLUENCE, TrainConfig
from trainer.errors import ConfigError
from trainer.files import MANIFEST, atomic_folder, machine_error, sweep, verify_folder
from trainer.loop.optim import in_fp32
from trainer.oom import out_of_memory_named

WEIGHTS = "adapter.safetensors"  # keys of a LoRA file, in fp32: network_weights takes it
FILES = (WEIGHTS, "optimizer.pt", "state.json")
# Settings that may differ between the run that saved and the run that goes on: they do not change the result.
FREE_SETTINGS = WITHOUT_INFLUENCE | frozenset(
    {
        "pretrained_model_name_or_path",
        "train_data_dir",
        "output_name",
        "save_precision",
        "gradient_checkpointing",
        "micro_batch_size",
        "cpu_offload",
        "opt_channels_last",
        "torch_compile",
        "checkpoint_blocks",
        "cpu_offload_checkpointing",
        "cache_latents_to_disk",
        "vae_batch_size",
    }
)


@dataclass(frozen=True)
class Progress:
    """A run's progress: ``step`` optimizer steps are done; the last ``in_a_row`` of them were skipped."""

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0


@dataclass(frozen=True)
class Run:
    """What a checkpoint belongs to, and the objects whose state it holds."""

    config: TrainConfig
    base_identity: str
    dataset_hash: str
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    compute: torch.dtype = torch.float32  # mixed_precision as a type: auto means another on another machine
    steps_per_epoch: int = 0
    changed: frozenset[str] = frozenset()  # settings that the run's own ladder changed since


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold, on the CPU.  Nothing of it changes while training goes on."""

    step: int
    weights: dict[str, torch.Tensor]
    rest: dict[str, Any]  # the optimizer's and the scaler's states
    state: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in [*self.weights.values(), *_tensors(self.rest)])


def snapshot(run: Run, progress: Progress) -> Snapshot:
    """A copy of a run's complete state."""
    rest = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    state = {
        "step": progress.step,
        "skipped": progress.skipped,
        "in_a_row": progress.in_a_row,
        "config": run.config.as_dict(),
        "base": run.base_identity,
        "dataset": run.dataset_hash,
        "compute": str(run.compute),
        "steps_per_epoch": run.steps_per_epoch,
    }
    return Snapshot(progress.step, run.adapter.state(), _copied(rest), state)


def save(folder: Path, run: Run, progress: Progress) -> Path:
    """Write a run's state as ``write``."""
    return write(folder, snapshot(run, progress))


def write(folder: Path, found: Snapshot) -> Path:
    """Write ``folder/step-…``, atomically.  Older ones stay until ``drop_others``: only the next step shows
    whether these weights are good."""
    target = folder / f"step-{found.step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
    except OSError as error:
        raise machine_error(error, target) from error
    with atomic_folder(target) as temporary:
        safetensors.torch.save_file(found.weights, temporary / WEIGHTS)
        torch.save(found.rest, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps(found.state, indent=2))
    return target


def _copied(value: Any) -> Any:
    """Tensors in a nested value as copies on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(each) for each in value)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def drop_others(saved: Path) -> None:
    """Remove those before the checkpoint that ``save`` returned: a step from its weights was finite. A newer one may
    have been written meanwhile."""
    for other in _checkpoints(saved.parent) if saved.is_dir() else ():
        if _step_of(other) < _step_of(saved):
            shutil.rmtree(other, ignore_errors=True)  # a leftover costs disk space, not the run


def last_good(folder: Path, applied: int) -> Path | None:
    """The newest whole checkpoint from before step ``applied``, the last one that changed the weights.  Later
    ones hold the current weights. This one's loss was finite, or that step would have been skipped."""
    older = [path for path in _checkpoints(folder) if _step_of(path) < applied and _is_whole(path)]
    return older[-1] if older else None


def restore(folder: Path, run: Run) -> Progress:
    """Load the newest complete checkpoint into the run's objects.  Without one, training starts from the
    beginning. A checkpoint of other settings, another base or other images is refused.
    """
    if not folder.is_dir():
        return Progress()
    sweep(folder)
    for checkpoint in reversed(_checkpoints(folder)):
        if not _is_whole(checkpoint):
            continue
        state = json.loads((checkpoint / "state.json").read_text())
        _check_same_run(checkpoint, state, run)
        with out_of_memory_named(run.config):
            run.adapter.load_state(safetensors.torch.load_file(checkpoint / WEIGHTS))
            rest = torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu")
            with in_fp32(run.adapter.trainable()):
                run.optimizer.load_state_dict(_of_groups(rest["optimizer"], run.optimizer))
            if hasattr(run.optimizer, "_step_supports_amp_scaling"):  # torch sets it for fused updates only
                fused = all(group.get("fused") for group in run.optimizer.param_groups)
                run.optimizer._step_supports_amp_scaling = fused
        if rest["scaler"] and run.scaler.is_enabled():  # a scaler that is off saves nothing
            run.scaler.load_state_dict(rest["scaler"])
        return Progress(_place(state, run), state["skipped"], state["in_a_row"])
    return Progress()


def _of_groups(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved optimizer without the groups that are no longer trained."""
    names = [group["name"] for group in optimizer.param_groups]
    kept = [group for group in saved["param_groups"] if group["name"] in names]
    numbers = {old: new for new, old in enumerate(n for group in kept for n in group["params"])}
    return {
        "state": {numbers[old]: state for old, state in saved["state"].items() if old in numbers},
        "param_groups": [{**group, "params": [numbers[n] for n in group["params"]]} for group in kept],
    }


def _place(state: Mapping[str, Any], run: Run) -> int:
    """The step to resume after. If a smaller resolution changes the buckets, and so the steps per epoch, it
    is the same share of the epochs."""
    step, before, now = int(state["step"]), state.get("steps_per_epoch"), run.steps_per_epoch
    if not before or not now or before == now or run.config.max_train_steps is not None:
        return step
    return round(step * now / before)


def _check_same_run(checkpoint: Path, state: Mapping[str, Any], run: Run) -> None:
    now = run.config.as_dict()
    before = {**TrainConfig().as_dict(), **state["config"]}  # a setting it does not know was at its default
    changed = [
        f"{name} {before[name]} → {value}"
        for name, value in now.items()
        if name not in FREE_SETTINGS | run.changed and before[name] != value
    ]
    if state.get("compute") != str(run.compute):
        changed.append(f"computed in {state.get('compute', 'an unknown type')} → {run.compute}")
    if state["base"] != run.base_identity:
        changed.append("another base")
    if state["dataset"] != run.dataset_hash:
        changed.append("other images or captions")
    if changed:
        raise ConfigError(
            f"the checkpoint {checkpoint} was made otherwise: {', '.join(changed)}",
            f"go on with what it was made with, or delete {checkpoint.parent} to start over",
        )


def _is_whole(checkpoint: Path) -> bool:
    """Whether the folder is unchanged since it was finished, and is a checkpoint's."""
    if not verify_folder(checkpoint):
        return False
    return json.loads((checkpoint / MANIFEST).read_text())["files"].keys() >= set(FILES)


def steps_behind(folder: Path) -> int:
    """Steps of the newest whole checkpoint in a folder, 0 if there is none."""
    whole = [path for path in _checkpoints(folder) if _is_whole(path)]
    return _step_of(whole[-1]) if whole else 0


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest step first."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
