"""Keeper: what a run of ``hpo train`` saves and samples while it trains.

save_every_n_…, save_last_n_…, sample_every_n_…  The checkpoint that a run resumes from belongs to the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.train.folder import RunFolder
from hpo.train.plan import count_steps
from hpo.train.samples import draw_samples, drawn_lines
from trainer.adapters import Saved, dataset_metadata
from trainer.config import TrainConfig
from trainer.data import Dataset
from trainer.errors import DeviceLost, Interrupted, OutOfMemory, ToolError
from trainer.events import Event, Skipped, Step
from trainer.oom import out_of_memory_named

if TYPE_CHECKING:
    from hpo.train.placement import Place
    from hpo.train.promptfile import SamplePrompt
    from trainer.adapters import Adapter


@dataclass
class Keeper:
    """Saves and samples during training: save_every_n_…, save_last_n_…, sample_every_n_…"""

    folder: RunFolder
    config: TrainConfig
    place: Place
    data: Dataset
    prompts: list[SamplePrompt]
    say: Callable[[str], None]
    on_file: Callable[[Path], None] = lambda path: None  # a LoRA file was written

    def __post_init__(self) -> None:
        self.steps = count_steps(self.config, self.data)

    def on_start(self, adapter: Adapter, step: int) -> None:
        """Called before the first step of this call; ``step`` steps are done."""
        if step:
            self.say(f"going on after step {step}/{self.steps.total_steps}")
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
        """Save the adapter as a LoRA file with the run's metadata."""
        from trainer.adapters import lorafile

        known = dataset_metadata(self.config, self.data, Saved(step, epoch))
        note = self.folder.metadata if self.config.no_metadata else None
        lorafile.write(path, adapter, self.config, known, note=note)
        self.on_file(path)
        if path != self.folder.lora:
            self.say(f"saved {path.name}")

    def _drop(self, first_kept: int, step: bool) -> None:
        for number, path in self.folder.numbered(step).items():
            if number < first_kept:
                path.unlink(missing_ok=True)

    def _draw(self, suffix: str) -> None:
        """Sampling never ends a run: what cannot be drawn is left out with a message."""
        if not self.prompts:
            return
        base, name = self.place.base, f"{self.folder.name}_{suffix}"
        try:
            with out_of_memory_named(self.config), base.card.phase("sample"):
                drawn = draw_samples(base, self.prompts, self.config, self.folder.samples, name)
        except OutOfMemory:
            advice = "draw them smaller (--w and --h of the prompt), or close other programs that use the GPU"
            self.say(f"samples {suffix} are left out: out of memory; {advice}")
            return
        except (Interrupted, DeviceLost):
            raise
        except ToolError as error:
            self.say(f"samples {suffix} are left out: {error.message}")
            return
        for line in drawn_lines(drawn):
            self.say(line)


def _due(number: int, every: int | None) -> bool:
    return every is not None and number > 0 and number % every == 0
