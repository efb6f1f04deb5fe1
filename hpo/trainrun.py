"""One run of ``hpo train``: from checked settings to LoRA files in the output folder.

Owns the files of a run, which of them are kept, and what is written into their metadata.  The same command
goes on with a run that was stopped, killed or unplugged: from the newest complete checkpoint.

    OUTPUT/name.safetensors               the result
    OUTPUT/name-000002.safetensors        save_every_n_epochs
    OUTPUT/name-step00000100.safetensors  save_every_n_steps
    OUTPUT/sample/                        sample_every_n_…
    OUTPUT/name.run/                      config.json, train.jsonl, checkpoints/, cache/, lock
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpo.locks import Lock, holder
from hpo.stop import Stop
from hpo.training import StepLog, check_device, train_adapter
from hpo.trainplan import count_steps
from hpo.trainsamples import draw_samples, file_stem, read_sample_prompts
from hpo.trainview import TrainView
from trainer.captions import read_captions
from trainer.config import SETTINGS, TrainConfig
from trainer.dataset import Dataset, tag_frequency
from trainer.errors import ConfigError, Interrupted, MachineError
from trainer.events import Event, Skipped, Step
from trainer.files import machine_error, sweep_tree, write_atomic
from trainer.subsets import read_training_data
from trainer.trainfile import RUN_CONFIG

if TYPE_CHECKING:
    from hpo.trainsamples import SamplePrompt
    from trainer.adapter import Adapter
    from trainer.bases.base import Base
    from trainer.cache import Prepared

DATASET_KEY = "lora_hpo_dataset"  # Dataset.content_hash in a LoRA's metadata


@dataclass(frozen=True)
class RunFolder:
    """Every path of a run."""

    output: Path
    name: str

    @property
    def lora(self) -> Path:
        return self.output / f"{self.name}.safetensors"

    @property
    def root(self) -> Path:
        return self.output / f"{self.name}.run"

    @property
    def config(self) -> Path:
        return self.root / RUN_CONFIG

    @property
    def steps(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def samples(self) -> Path:
        return self.output / "sample"

    def epoch_file(self, epoch: int) -> Path:
        return self.output / f"{self.name}-{epoch:06d}.safetensors"

    def step_file(self, step: int) -> Path:
        return self.output / f"{self.name}-step{step:08d}.safetensors"

    def numbered(self, step: bool) -> dict[int, Path]:
        """The files of epochs, or of steps, by number."""
        pattern = re.compile(
            re.escape(self.name) + (r"-step(\d{8})" if step else r"-(\d{6})") + r"\.safetensors"
        )
        found = ((pattern.fullmatch(path.name), path) for path in self.output.iterdir())
        return {int(match[1]): path for match, path in found if match}


def run_folder(output: Path, config: TrainConfig) -> RunFolder:
    return RunFolder(output, file_stem(config.output_name))


def run(config: TrainConfig, output: Path, device: str | None, console: Console) -> Path:
    """Train to the end and return the LoRA's path.  Raises ToolError; Interrupted if the user stopped it."""
    folder = run_folder(output, config)
    prompts = read_sample_prompts(Path(config.sample_prompts), config) if config.sample_prompts else []
    data = read_training_data(config)
    view = TrainView(console, folder.name)
    if _is_done(folder, config, data):
        view.say(f"{folder.lora} is trained already, with these settings and images")
        return folder.lora
    for note in data.notes:
        view.say(f"note: {note}")
    view.say(f"steps: {count_steps(config, data).line(config)}")
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise machine_error(error, folder.root) from error
    with _alone(folder):
        sweep_tree(folder.root)
        base = _load_base(config, data, device, view.say)
        write_atomic(folder.config, json.dumps(config.as_dict(), indent=1))
        with Stop(view.on_ask) as stop, view, _board(config, folder) as board:
            keeper = Keeper(folder, config, base, data, prompts, view.say)

            def on_event(event: Event, adapter: Adapter) -> None:
                view.on_event(event)
                board(event)
                keeper.on_event(event, adapter)

            adapter = _train(base, config, data, folder, keeper, on_event, stop)
        try:
            adapter.round_to(config.save_precision)
            keeper.write(folder.lora, adapter, keeper.steps.total_steps, keeper.steps.epochs)
        finally:
            adapter.remove()
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
    view.say(f"LoRA: {folder.lora}")
    view.say(f"log: {folder.steps}")
    return folder.lora


def _train(
    base: Base,
    config: TrainConfig,
    data: Dataset,
    folder: RunFolder,
    keeper: Keeper,
    on_event: Callable[[Event, Adapter], None],
    stop: Stop,
) -> Adapter:
    from trainer import cache

    def prepare() -> cache.Prepared:
        def on_image(done: int, total: int) -> None:
            if stop() and done < total:
                raise Interrupted(
                    f"stopped after encoding {done} of {total} images", "the same command goes on"
                )

        prepared = cache.prepare(base, data, config, folder.cache, on_image=on_image)
        keeper.view_say(f"{len(prepared.latents)} latents, {prepared.encoded_images} of them encoded now")
        return prepared

    return train_adapter(
        base,
        config,
        prepare,
        checkpoints=folder.checkpoints,
        log=StepLog(folder.steps),
        on_event=on_event,
        should_stop=stop,
        on_start=keeper.on_start,
        validate_on=lambda: _held_out(base, config, data, folder),
    )


def _held_out(base: Base, config: TrainConfig, data: Dataset, folder: RunFolder) -> Prepared | None:
    """The images of held_out/ for the validation loss, with their captions or the subject's words."""
    from trainer import cache

    if not data.held_out:
        return None
    words = " ".join(word for word in (data.trigger, data.class_word) if word) or "a picture"
    paths = [item.path for item in data.held_out if not item.caption]
    captions, _ = read_captions(paths, config.caption_extension, data.root, instead=words)
    items = tuple(replace(item, caption=item.caption or captions[item.path]) for item in data.held_out)
    plain = config.with_values({"flip_aug": False, "alpha_mask": False})
    return cache.prepare(base, replace(data, items=items, held_out=()), plain, folder.cache)


def _load_base(config: TrainConfig, data: Dataset, device: str | None, say: Callable[[str], None]) -> Base:
    """The base on its device; what it does not have is refused or said."""
    import torch

    from trainer import preflight
    from trainer.bases.base import compute_type
    from trainer.bases.load import load_base

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    spec = config.pretrained_model_name_or_path
    say(f"loading {spec} on {device} …")
    base = load_base(
        spec,
        device=device,
        dtype=compute_type(config.mixed_precision, device),
        no_half_vae=config.no_half_vae,
    )
    preflight.check(base, config)
    for note in preflight.notes(base, config, data):
        say(f"note: {note}")
    return base


def _is_done(folder: RunFolder, config: TrainConfig, data: Dataset) -> bool:
    """Whether the result is there, with these settings and images.  A file of others is not replaced."""
    if not folder.lora.exists():
        return False
    from trainer.bases.load import short_name
    from trainer.checkpoint import FREE_SETTINGS
    from trainer.lorafile import CONFIG_KEY, shared_settings
    from trainer.tensorfile import read_header

    metadata = read_header(folder.lora).metadata
    saved = json.loads(metadata.get(CONFIG_KEY, "{}"))
    deciding = SETTINGS.keys() - (FREE_SETTINGS - {"pretrained_model_name_or_path", "save_precision"})
    now = shared_settings(config, short_name(config.pretrained_model_name_or_path))
    changed = [
        name
        for name in SETTINGS
        if name in deciding and saved.get(name, getattr(TrainConfig(), name)) != now[name]
    ]
    if metadata.get(DATASET_KEY) != data.content_hash:
        changed.append("images or captions")
    if changed:
        what = f"was trained with another {', '.join(changed[:5])}" if saved else "was not made by this tool"
        raise ConfigError(
            f"{folder.lora} {what}", "choose another --output or --set output_name=…, or move the file away"
        )
    return True


@contextlib.contextmanager
def _alone(folder: RunFolder) -> Any:
    """No second process trains into the same files."""
    lock = Lock(folder.root / "lock")
    if not lock.try_acquire():
        raise MachineError(
            f"process {holder(lock.path)} trains {folder.name} already", "wait for it, or stop that process"
        )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _board(config: TrainConfig, folder: RunFolder) -> Any:
    """What writes events to TensorBoard, if logging_dir is set."""
    if not config.logging_dir:
        yield lambda event: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MachineError(
            "logging_dir needs TensorBoard, which is not installed",
            "pip install tensorboard, or leave logging_dir out: train.jsonl is always written",
        ) from None
    writer = SummaryWriter(str(Path(config.logging_dir) / folder.name))

    def write(event: Event) -> None:
        if isinstance(event, Step):
            for name, value in (
                ("loss/current", event.loss),
                ("lr/unet", event.learning_rate),
                ("lr/textencoder", event.text_encoder_lr),
                ("grad_norm", event.grad_norm),
            ):
                writer.add_scalar(name, value, event.step)

    try:
        yield write
    finally:
        writer.close()


class Keeper:
    """Saves and draws along the way: save_every_n_…, save_last_n_…, sample_every_n_…"""

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        base: Base,
        data: Dataset,
        prompts: list[SamplePrompt],
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.config = config
        self.base = base
        self.prompts = prompts
        self.view_say = say
        self.steps = count_steps(config, data)
        self._facts = data_metadata(data)

    def on_start(self, adapter: Adapter, step: int) -> None:
        """Before the first step of this call; ``step`` steps are behind."""
        if step:
            self.view_say(f"going on after step {step} of {self.steps.total_steps}")
        elif self.config.sample_at_first:
            self._draw("e000000")

    def on_event(self, event: Event, adapter: Adapter) -> None:
        if not isinstance(event, Step | Skipped):
            return
        step, config = event.step, self.config
        epoch, inside = divmod(step, self.steps.steps_per_epoch)
        last = step >= self.steps.total_steps
        if _due(step, config.save_every_n_steps) and not last:
            self.write(self.folder.step_file(step), adapter, step, epoch + (inside > 0))
            if config.save_last_n_steps is not None:
                self._drop(step - config.save_last_n_steps, step=True)
        if inside == 0 and _due(epoch, config.save_every_n_epochs) and not last:
            self.write(self.folder.epoch_file(epoch), adapter, step, epoch)
            if config.save_last_n_epochs is not None:
                assert config.save_every_n_epochs is not None
                kept = config.save_last_n_epochs * config.save_every_n_epochs
                self._drop(epoch - kept + 1, step=False)
        if inside == 0 and _due(epoch, config.sample_every_n_epochs):
            self._draw(f"e{epoch:06d}")
        if _due(step, config.sample_every_n_steps):
            self._draw(f"{step:06d}")

    def write(self, path: Path, adapter: Adapter, step: int, epoch: int) -> None:
        """The adapter as a LoRA file, with what is known of the run."""
        from trainer import lorafile

        extra = {**self._facts, "ss_steps": str(step), "ss_epoch": str(epoch)}
        extra["ss_num_batches_per_epoch"] = str(self.steps.batches_per_epoch)
        extra["ss_training_comment"] = self.config.training_comment or "None"
        lorafile.write(path, adapter, self.base, self.config, extra)
        if path != self.folder.lora:
            self.view_say(f"saved {path.name}")

    def _drop(self, first_kept: int, step: bool) -> None:
        for number, path in self.folder.numbered(step).items():
            if number < first_kept:
                path.unlink(missing_ok=True)

    def _draw(self, suffix: str) -> None:
        if self.prompts:
            paths = draw_samples(
                self.base, self.prompts, self.config, self.folder.samples, f"{self.folder.name}_{suffix}"
            )
            self.view_say(f"drawn: {len(paths)} samples, {paths[0].name} …")


def _due(number: int, every: int | None) -> bool:
    return every is not None and number > 0 and number % every == 0


def data_metadata(data: Dataset) -> dict[str, str]:
    """What sd-scripts notes of a dataset: counts, folders, and how often each tag occurs (A1111 shows it)."""
    folders: dict[str, dict[str, int]] = {}
    for item in data.items:
        place = item.path.parent.name
        entry = folders.setdefault(place, {"n_repeats": item.repeats, "img_count": 0})
        entry["img_count"] += 1
    facts: Mapping[str, Any] = {
        "ss_num_train_images": sum(item.repeats for item in data.items if not item.is_reg),
        "ss_num_reg_images": sum(item.repeats for item in data.items if item.is_reg),
        "ss_tag_frequency": json.dumps(tag_frequency(data)),
        "ss_dataset_dirs": json.dumps(folders),
        DATASET_KEY: data.content_hash,
    }
    return {name: str(value) for name, value in facts.items()}
