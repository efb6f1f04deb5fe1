"""The source of a transfer: a study's best configuration, other good configurations, and figures of its images.

Owns which trial is the best (the confirmed winner, else the best of the search) and which others are
different enough to be probed as well.  Only reads the study.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.study import (
    BASELINE,
    OBJECTIVE,
    ROLE,
    StudyFolder,
    confirmed_winner,
    database_errors,
    families_from,
    find_folder,
    is_feasible,
    kind_of_base,
    objective_of,
    open_study,
    parent_of,
    read_json,
    require_learned,
    score_of,
)
from hpo.transfer.plan import DatasetFigures
from hpo.transfer.profile import Family
from trainer.bases import is_miniature
from trainer.config import SETTINGS, TrainConfig
from trainer.data import Dataset, batches_per_epoch, read_training_data
from trainer.errors import ConfigError
from trainer.text import clean_text


@dataclass(frozen=True)
class SourceCandidate:
    """A scored trial of the search.  ``place``: its searched settings, each scaled to 0..1.  ``objective``: its
    score, continued below 0, with the standard error ``objective_se``."""

    number: int
    config: TrainConfig
    score: float
    se: float
    place: Mapping[str, float]
    objective: float
    objective_se: float


@dataclass(frozen=True)
class TransferSource:
    """The study that is transferred.

    ``others``: configurations about as good as the best, the most different one first.  ``says``:
    describes the best trial.
    """

    folder: StudyFolder
    base: str
    best: SourceCandidate
    confirmed: bool
    baseline: SourceCandidate | None
    others: tuple[SourceCandidate, ...]
    trials: tuple[SourceCandidate, ...]
    says: str


def find_source(name: str | None, runs: Path, family: Family) -> StudyFolder:
    """The named study, else the one last worked on.  Raises ConfigError if it cannot be transferred to the family."""
    folder = find_folder(name, runs)
    _check_base(folder, family)
    return folder


def _check_base(folder: StudyFolder, family: Family) -> None:
    kind = kind_of_base(folder)
    if parent := parent_of(folder):
        raise ConfigError(
            f"study {folder.name} is not a search: it belongs to study {parent}", f"give {parent} instead"
        )
    if kind not in family.sources:
        hint = f"give a study with a search on {' or '.join(family.sources)}"
        if is_miniature(kind) and (targets := families_from(kind)):
            hint = f"use --to {' or '.join(targets)}"
        raise ConfigError(f"study {folder.name} is a search on {clean_text(kind) or 'an unknown base'} and cannot be "
                          f"transferred to {family.title}", hint)  # fmt: skip


def read_source(folder: StudyFolder, *, anyway: bool = False) -> TransferSource:
    """Read the study's best configuration and its alternatives.

    Raises ConfigError for a study without a scored trial, and for one that has learned nothing unless ``anyway``.
    """
    from optuna.trial import TrialState

    with database_errors(folder):
        study = open_study(folder)
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        require_learned(study, folder, "transfer", anyway=anyway)
    trials, baseline = [], None
    for trial in done:
        score, objective = score_of(trial), objective_of(trial)
        if score is None or objective is None or not is_feasible(trial):
            continue
        config = _trained(folder, trial.number)
        if config is None:
            continue
        place = {name: _unit(trial.distributions[name], value) for name, value in trial.params.items()}
        se = float(trial.user_attrs.get("se", 0.0))
        own_se = trial.user_attrs.get(f"{OBJECTIVE}_se")
        objective_se = se if own_se is None else float(own_se)
        found = SourceCandidate(trial.number, config, score, se, place, objective, objective_se)
        trials.append(found)
        if baseline is None and trial.user_attrs.get(ROLE) == BASELINE:
            baseline = found
    if not trials:
        raise ConfigError(
            f"study {folder.name} has no scored trial yet",
            f"continue the search; for its state: hpo status {folder.words}",
        )
    trials.sort(key=lambda t: (-t.objective, t.number))
    by_number = {t.number: t for t in trials}
    confirmed = confirmed_winner(folder, by_number)
    best, tied = trials[0], [t for t in trials if _is_tied(t, trials[0])]
    says = f"trial {best.number}, the best of the search ({best.score:.4f}); unconfirmed, see hpo confirm"
    if confirmed is not None:
        best = by_number[confirmed["winner"]]
        tied = [by_number[n] for n in confirmed.get("ties", ()) if n in by_number]
        says = f"trial {best.number}, the confirmed winner"
    others = _diverse(best, tied) or _diverse(best, trials[: max(2, len(trials) // 4)])
    base = str((read_json(folder.facts) or {}).get("base", best.config.pretrained_model_name_or_path))
    return TransferSource(folder, base, best, confirmed is not None, baseline, others, tuple(trials), says)


def _is_tied(trial: SourceCandidate, best: SourceCandidate) -> bool:
    """Whether a trial is within one standard error of the best.  Compares objectives, because scores below 0 are 0."""
    return trial.objective >= best.objective - math.hypot(trial.objective_se, best.objective_se)


def _trained(folder: StudyFolder, number: int) -> TrainConfig | None:
    """The settings that a trial was trained with; None if its folder is missing."""
    values = (read_json(folder.trial(number).params) or {}).get("train")
    if not isinstance(values, dict):
        return None
    return TrainConfig().with_values({name: value for name, value in values.items() if name in SETTINGS})


def _unit(distribution: Any, value: Any) -> float:
    from optuna.distributions import CategoricalDistribution

    if isinstance(distribution, CategoricalDistribution):
        return float(distribution.choices.index(value))
    low, high = float(distribution.low), float(distribution.high)
    if high == low:
        return 0.5
    if distribution.log:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)


def distance(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Distance of two configurations: root mean square over the searched settings.  Different choices count 1."""
    names = a.keys() & b.keys()
    return math.sqrt(sum(min(1.0, abs(a[n] - b[n])) ** 2 for n in names) / max(1, len(names)))


def _diverse(best: SourceCandidate, among: Sequence[SourceCandidate]) -> tuple[SourceCandidate, ...]:
    """Trials other than the best, ordered so that each is the farthest from all before it."""
    taken, left = [best], [t for t in among if t.number != best.number]
    while left:
        farthest = max(
            left, key=lambda t: (min(distance(t.place, other.place) for other in taken), -t.number)
        )
        left.remove(farthest)
        taken.append(farthest)
    return tuple(taken[1:])


def with_places(config: TrainConfig, name: str, comment: str) -> TrainConfig:
    """The settings of a trial for a separate run: absolute paths, a new name and a comment on their origin."""
    values: dict[str, Any] = {"output_name": name, "training_comment": comment}
    for key in ("train_data_dir", "dataset_config", "reg_data_dir", "conditioning_data_dir"):
        if getattr(config, key):
            values[key] = str(Path(getattr(config, key)).expanduser().resolve())
    return config.with_values(values)


def holding_out(source: TransferSource, config: TrainConfig) -> TrainConfig:
    """The settings, with the search's reference images held out, because ``hpo evaluate`` needs unseen images.

    References from a separate folder (``--references``) are never training images.
    """
    facts = read_json(source.folder.facts) or {}
    own = Path(str(facts.get("data", ""))).resolve()
    references = [Path(str(path)).resolve() for path in facts.get("references", [])]
    return config.with_values({"hold_out_references": any(path.is_relative_to(own) for path in references)})


def dataset_figures(source: TransferSource, family: Family) -> tuple[DatasetFigures, Dataset]:
    """The figures of the training images of the new run, and the images."""
    data = read_training_data(holding_out(source, source.best.config))
    items = [item for item in data.items if not item.is_reg]
    small = sum(min(item.width_px, item.height_px) < family.small_image_px for item in items)
    return (
        DatasetFigures(
            images=len(items),
            samples=sum(item.repeats for item in data.items),
            small_share=small / max(1, len(items)),
            seconds_per_sample=_seconds_per_sample(source),
            batches=lambda config: batches_per_epoch(config, data),
        ),
        data,
    )


def _seconds_per_sample(source: TransferSource) -> float | None:
    result = read_json(source.folder.trial(source.best.number).result) or {}
    seen = result.get("steps", 0) * source.best.config.train_batch_size
    seen *= source.best.config.gradient_accumulation_steps
    seconds = result.get("train_seconds", 0.0)
    return seconds / seen if seen and seconds else None
