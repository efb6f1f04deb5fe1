"""What a trial came to: result.json and params.json, and what Optuna is told of them.

Owns the states of a result, the settings a result belongs to, and reading and writing both files.  Does not
own the work that leads to them (``hpo.search.trial``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from evaluation.score import CEILING
from hpo.study.folder import TrialFolder, read_json
from hpo.study.sections import FOLLOWING, LIKENESS, SCORE
from trainer.config import TrainConfig
from trainer.errors import MachineError
from trainer.files import make_folder, write_atomic

COMPLETE, INFEASIBLE, FAILED = "complete", "infeasible", "failed"
# Below every score (0 to 1.1, evaluation.score.score): finite, the same always, and plainly no measurement.
INFEASIBLE_VALUE = -0.1
PATHS = ("pretrained_model_name_or_path", "train_data_dir")
# The last three are broken limits of the safeguards (evaluation.score.safeguards).
INFEASIBLE_REASONS = (
    "diverged", "out_of_memory", "invalid_images", "no_effect", "copied", "collapsed", "prior_lost"
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a trial came to: result.json.  ``value`` is what Optuna is told; None for a failed trial."""

    number: int
    state: str
    value: float | None
    se: float | None
    reason: str
    message: str
    config_sha256: str
    lora: str
    lora_sha256: str
    prompt_following: float | None
    likeness: float | None
    clip_t: float | None
    clip_i: float | None
    n_images: int
    steps: int
    skipped_steps: int
    train_seconds: float
    score_seconds: float
    remedy: str
    time_utc: str
    copy_rate: float | None = None
    diversity: float | None = None
    prior: float | None = None
    amounts: dict[str, float] = field(default_factory=dict)  # by how much limits are broken (> 0) or kept
    beside: list[dict[str, Any]] = field(default_factory=list)  # other models' measure, model, mean raw value

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.score_seconds


_NAMES = {f.name for f in fields(Result)}
# An older version's result is one too: what came later has a default.
_OLDEST = {f.name for f in fields(Result) if f.default is MISSING and f.default_factory is MISSING}


def objective_values(result: Result, objectives: Sequence[str]) -> list[float]:
    """What Optuna is told of a complete or infeasible result, one number for each objective.

    The parts are clipped as in the score, so that an infeasible trial is below every measured one.
    """
    if result.state == INFEASIBLE:
        return [INFEASIBLE_VALUE] * len(objectives)
    parts = {SCORE: result.value, FOLLOWING: result.prompt_following, LIKENESS: result.likeness}
    values = []
    for name in objectives:
        part = parts[name]
        assert part is not None and math.isfinite(part), f"{name} of trial {result.number} is {part}"
        values.append(part if name == SCORE else min(max(part, 0.0), CEILING))
    return values


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a LoRA, as JSON gives them back.  Paths may change: contents are hashed."""
    return json.loads(json.dumps({k: v for k, v in settings.items() if k not in PATHS}, sort_keys=True))


def config_sha256(config: TrainConfig) -> str:
    """What a result belongs to."""
    return hashlib.sha256(json.dumps(deciding(config.as_dict())).encode()).hexdigest()


def write_params(
    folder: TrialFolder, suggested: Mapping[str, Any], inactive: tuple[str, ...], config: TrainConfig
) -> None:
    """params.json: the proposal and the settings it means.  Refuses a folder that another proposal began."""
    values = {
        "trial": folder.number,
        "suggested": dict(suggested),
        "inactive": list(inactive),
        "train": config.as_dict(),
    }
    before = read_json(folder.params)
    if before is None:
        make_folder(folder.root)
        write_atomic(folder.params, json.dumps(values, indent=1))
    elif before["suggested"] != suggested or deciding(before["train"]) != deciding(config.as_dict()):
        raise MachineError(
            f"{folder.params} holds other settings than the study proposes for trial {folder.number}",
            "the folder is of another study: move it away",
        )


def read_result(folder: TrialFolder, config: TrainConfig) -> Result | None:
    """The trial's result if it is whole and belongs to these settings."""
    values = read_json(folder.result)
    if values is None or not _OLDEST <= values.keys() <= _NAMES:
        return None
    found = Result(**values)
    if found.number != folder.number or found.config_sha256 != config_sha256(config):
        return None
    if found.state == FAILED:
        return found
    sound = found.value is not None and math.isfinite(found.value)
    return found if sound and found.state in (COMPLETE, INFEASIBLE) else None


def write_result(folder: TrialFolder, result: Result) -> None:
    write_atomic(folder.result, json.dumps(asdict(result), indent=1))
