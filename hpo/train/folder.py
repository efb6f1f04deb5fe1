"""Every path of one run of ``hpo train``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hpo.train.samples import file_stem
from trainer.adapters import PRIVATE
from trainer.config import TrainConfig
from trainer.kohya import RUN_CONFIG


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
    def ladder(self) -> Path:
        return self.root / "ladder.jsonl"

    @property
    def memory(self) -> Path:
        return self.root / "memory.json"

    @property
    def threads(self) -> Path:
        """How many CPU threads the run was begun with."""
        return self.root / "threads.json"

    @property
    def metadata(self) -> Path:
        """What a LoRA file would say, if no_metadata keeps it out of the file."""
        return self.root / PRIVATE

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
