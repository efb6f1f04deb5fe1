"""The result of a trial: result.json, params.json and the objective values for Optuna.

Owns the states of a result, the check that a result belongs to its settings, and reading and writing both
files.  Does not own running the trial; see ``hpo.search.trial``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from evaluation.score import CLIPPED, SIGNED, told_part
from hpo.study.firstsettings import counting_settings
from hpo.study.folder import TrialFolder, read_json
from hpo.study.sections import FOLLOWING, LIKENESS, SCORE
from trainer.config import TrainConfig
from trainer.errors import MachineError
from trainer.files import make_folder, write_atomic

COMPLETE, INFEASIBLE, FAILED = "complete", "infeasible", "failed"
PRUNED = "pruned"  # stopped in the middle of its training
# Below every measured value, which is above 0 or, in a study that is told signed values, above -1
# (evaluation.score.formula): finite, constant, and clearly not a measurement.
INFEASIBLE_VALUE, SIGNED_INFEASIBLE_VALUE = -0.1, -1.0
PATHS = ("pretrained_model_name_or_path", "train_data_dir")
# The last four are limits of evaluation.score.safeguards.
INFEASIBLE_REASONS = (
    "diverged", "out_of_memory", "invalid_images", "no_effect", "copied", "collapsed", "prior_lost",
    "shows_nothing",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The content of result.json.

    ``value`` is the score, which is shown; of an infeasible trial the constant that Optuna is told; of a pruned one
    the value of its last look; None for a failed trial.  ``objective`` is what Optuna is told: equal to ``value`` above
    0.  Results of older versions have no ``objective`` and tell ``value``.  ``below_zero`` names the form of the told
    values (``Formula``).
    """

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
    amounts: dict[str, float] = field(default_factory=dict)  # distance from each limit; above 0: exceeded
    weight_change: float | None = None  # ‖ΔW‖ / ‖W‖ at the end (trainer.adapters.Adapter.weight_change)
    beside: list[dict[str, Any]] = field(
        default_factory=list
    )  # extra metrics: measure, model, mean raw value
    strangeness: float | None = None
    objective: float | None = None
    objective_se: float | None = None
    below_zero: str = CLIPPED
    look_seconds: float = 0.0  # of images drawn in the middle of the training

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.score_seconds + self.look_seconds


_NAMES = {f.name for f in fields(Result)}
# Results of older versions are valid, too: newer fields have defaults.
_OLDEST = {f.name for f in fields(Result) if f.default is MISSING and f.default_factory is MISSING}


def objective_values(result: Result, objectives: Sequence[str]) -> list[float]:
    """The values for Optuna of a complete or infeasible result, one per objective.

    The parts are bounded as in the objective, so that an infeasible trial is below every measured trial.
    """
    if result.state == INFEASIBLE:
        return [infeasible_value(result.below_zero)] * len(objectives)
    told = result.value if result.objective is None else result.objective
    parts = {SCORE: told, FOLLOWING: result.prompt_following, LIKENESS: result.likeness}
    values = []
    for name in objectives:
        part = parts[name]
        assert part is not None and math.isfinite(part), f"{name} of trial {result.number} is {part}"
        values.append(part if name == SCORE else told_part(part, result.below_zero))
    return values


def infeasible_value(below_zero: str) -> float:
    """What Optuna is told of an infeasible trial: below every value that a measured trial can have."""
    return SIGNED_INFEASIBLE_VALUE if below_zero == SIGNED else INFEASIBLE_VALUE


def deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that determine a LoRA, as read back from JSON.  Paths are excluded; contents are hashed."""
    found = {name: value for name, value in counting_settings(settings).items() if name not in PATHS}
    return json.loads(json.dumps(found, sort_keys=True))


def config_sha256(config: TrainConfig) -> str:
    """The hash that links a result to its settings."""
    return hashlib.sha256(json.dumps(deciding(config.as_dict())).encode()).hexdigest()


def write_params(
    folder: TrialFolder, suggested: Mapping[str, Any], inactive: tuple[str, ...], config: TrainConfig
) -> None:
    """Write params.json: the proposal and its settings.  Raises MachineError if it contains another proposal."""
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
            f"{folder.params} does not contain the settings of trial {folder.number} of this study",
            "the folder belongs to another study; move it elsewhere",
        )


def read_result(folder: TrialFolder, config: TrainConfig) -> Result | None:
    """Read the trial's result.  None if it is incomplete or belongs to other settings."""
    values = read_json(folder.result)
    if values is None or not _OLDEST <= values.keys() <= _NAMES:
        return None
    found = Result(**values)
    if found.number != folder.number or found.config_sha256 != config_sha256(config):
        return None
    if found.state == FAILED:
        return found
    sound = found.value is not None and math.isfinite(found.value)
    return found if sound and found.state in (COMPLETE, INFEASIBLE, PRUNED) else None


def write_result(folder: TrialFolder, result: Result) -> None:
    write_atomic(folder.result, json.dumps(asdict(result), indent=1))
