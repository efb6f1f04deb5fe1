"""The trials of a study as a table: what was searched, what stayed the same, and which settings matter most.

Owns the rows behind ``hpo status`` and the kind of a study (search, confirmation, probes).  Reads the database and
study.json only.  Does not own layout; see ``hpo.terminal.status``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.study.folder import TOTAL, StudyFolder, read_json
from hpo.study.locks import Holder
from hpo.study.result import COMPLETE, FAILED, INFEASIBLE
from hpo.study.standing import (
    BASELINE,
    ROLE,
    Standing,
    is_duplicate,
    is_feasible,
    objective_of,
    score_of,
    standing,
)
from hpo.study.which import OF_STUDY, belongs_to

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

SEARCH, CONFIRMATION, PROBES = "search", "confirmation", "probes"
# Columns of a confirmation: the trial of the search that is trained again, and the seed of that training.
REPEATED, SEED = "repeated_trial", "training_seed"
ENOUGH = 20  # scored trials for an estimate of importance (assumed)
BY_IMPORTANCE, BY_SPREAD = "importance for the score (PED-ANOVA)", "how often they were changed"
RUNNING, INTERRUPTED, REPEAT = "running", "interrupted", "duplicate"


@dataclass(frozen=True)
class StudyKind:
    """What the trials of a study are.  ``of``: the search that a confirmation or probes belong to."""

    word: str
    of: str = ""
    base: str = ""

    @property
    def baseline(self) -> str:
        """What the study's baseline is."""
        return {
            SEARCH: "the usual settings",
            PROBES: "the transferred settings",
            CONFIRMATION: "the usual settings again",
        }[self.word]

    @property
    def title(self) -> str:
        on, run_on = (f" on {self.base}", f", run on {self.base}") if self.base else ("", "")
        return {
            SEARCH: f"search{on}",
            PROBES: f"target trials of settings transferred from {self.of}{run_on}",
            CONFIRMATION: f"confirmation of {self.of}: its best trials, trained and scored again",
        }[self.word]


@dataclass(frozen=True)
class Row:
    """One trial.  ``score`` is None unless the trial is complete and feasible."""

    number: int
    state: str
    score: float | None
    se: float | None
    parts: Mapping[str, float]
    seconds: float | None
    settings: Mapping[str, Any]
    objective: float | None = None  # what the sampler was told: the score, continued below 0
    reason: str = ""
    message: str = ""
    is_baseline: bool = False
    process: int | None = None  # that works on it now
    host: str = ""  # the machine of that process; empty: this one


@dataclass(frozen=True)
class StudyTable:
    """All trials of a study.

    ``columns``: the settings that differ between trials, in the study's order.  ``weights``: how much each of them
    matters, in the sense of ``weighed_by``; larger matters more.  ``constants``: settings that are equal in all trials.
    """

    name: str
    words: str  # the study on a command line
    kind: StudyKind
    now: Standing
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    weights: Mapping[str, float]
    weighed_by: str
    constants: Mapping[str, Any]
    parts: tuple[str, ...] = ()  # the objectives, where there are two


def kind_of(folder: StudyFolder) -> StudyKind:
    """Whether the trials are a search, its confirmation or probes of a transfer."""
    facts = read_json(folder.facts) or {}
    base = str(facts.get("base", ""))
    base = Path(base).name if "/" in base else base
    if (parent := belongs_to(facts)) is None:
        return StudyKind(SEARCH, "", base)
    return StudyKind(CONFIRMATION if parent[0] == OF_STUDY else PROBES, parent[1], base)


def study_table(
    study: optuna.Study, folder: StudyFolder, holder: Callable[[int], Holder | None] = lambda number: None
) -> StudyTable:
    """The table of a study.  ``holder``: the process that works on a trial, None if there is none."""
    kind, now = kind_of(folder), standing(study, study.user_attrs.get(TOTAL, 0))
    rows = tuple(_row(trial, holder, kind) for trial in study.get_trials(deepcopy=False))
    names = list(dict.fromkeys(name for row in rows for name in row.settings))
    shown = [row for row in rows if row.settings]
    columns = tuple(n for n in names if len({_key(row.settings.get(n)) for row in shown}) > 1)
    fixed = {n: shown[0].settings[n] for n in names if n not in columns}
    weights, by = _weights(columns, rows, kind)
    parts = ("prompt_following", "likeness") if len(study.directions) > 1 else ()
    return StudyTable(
        folder.name,
        folder.words,
        kind,
        now,
        rows,
        columns,
        weights,
        by,
        {**_settled(folder, names), **fixed},
        parts,
    )


def _row(trial: FrozenTrial, holder: Callable[[int], Holder | None], kind: StudyKind) -> Row:
    attributes, runner = trial.user_attrs, None
    state = str(attributes.get("outcome", trial.state.name.lower()))
    if trial.state.name == "RUNNING":
        runner = holder(trial.number)
        state = RUNNING if runner else INTERRUPTED
    elif trial.state.name == "FAIL":
        state = REPEAT if is_duplicate(trial) else FAILED
    elif trial.state.name == "COMPLETE":
        state = COMPLETE if is_feasible(trial) else INFEASIBLE
    score = score_of(trial) if state == COMPLETE else None
    settings = dict(attributes.get("settings", {}))
    if kind.word == CONFIRMATION:
        of = trial.params.get("of")
        settings = {} if of is None else {REPEATED: of, SEED: trial.params.get("train_seed")}
    return Row(
        number=trial.number,
        state=state,
        score=score,
        se=float(attributes.get("se", 0.0)) if score is not None else None,
        parts={k: attributes[k] for k in ("prompt_following", "likeness") if k in attributes},
        seconds=attributes.get("seconds"),
        settings=settings,
        objective=objective_of(trial) if state == COMPLETE else None,
        reason=str(attributes.get("reason", "")),
        message=str(attributes.get("message", "")),
        is_baseline=attributes.get(ROLE) == BASELINE,
        process=runner.pid if runner else None,
        host=runner.host if runner else "",
    )


def _settled(folder: StudyFolder, searched: Sequence[str]) -> dict[str, Any]:
    """The fixed settings of the study's definition that differ from the defaults."""
    from trainer.config import SETTINGS, TrainConfig

    sections = (read_json(folder.facts) or {}).get("sections")
    given = sections.get("train") if isinstance(sections, dict) else None
    usual = TrainConfig()
    return {
        name: value
        for name, value in (given if isinstance(given, dict) else {}).items()
        if name in SETTINGS and name not in searched and value != getattr(usual, name)
    }


def _key(value: Any) -> str:
    return repr(value)


# What matters most


def _weights(columns: Sequence[str], rows: Sequence[Row], kind: StudyKind) -> tuple[dict[str, float], str]:
    """How much each setting matters: Optuna's importance if enough trials have a score, else the spread."""
    scored = [row for row in rows if row.score is not None]
    if len(scored) >= ENOUGH and kind.word == SEARCH and len(columns) > 1:
        found = _importance(columns, scored)
        if found is not None:
            return found, BY_IMPORTANCE
    return {
        name: _spread([row.settings.get(name) for row in rows if row.settings]) for name in columns
    }, BY_SPREAD


def _importance(columns: Sequence[str], scored: Sequence[Row]) -> dict[str, float] | None:
    """PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255) of the displayed settings, as Optuna computes it.

    None if Optuna cannot tell, for example because all scores are equal.
    """
    import warnings

    import optuna

    kinds = {name: _distribution([row.settings.get(name) for row in scored]) for name in columns}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is experimental in Optuna
            study = optuna.create_study(direction="maximize")
            for row in scored:
                params = {n: _as(kind, row.settings.get(n)) for n, kind in kinds.items()}
                study.add_trial(
                    optuna.trial.create_trial(params=params, distributions=kinds, value=row.score)
                )
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError):
        return None
    finally:
        optuna.logging.set_verbosity(level)
    values = {name: float(found.get(name, 0.0)) for name in columns}
    return values if all(map(math.isfinite, values.values())) else None


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not all(_is_number(value) for value in values) or len(set(values)) == 1:
        return CategoricalDistribution(sorted({_key(value) for value in values}))
    low, high = float(min(values)), float(max(values))
    return FloatDistribution(low, high, log=low > 0 and high / low > 10)


def _as(kind: BaseDistribution, value: Any) -> Any:
    return _key(value) if hasattr(kind, "choices") else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _spread(values: Sequence[Any]) -> float:
    """The probability that two trials have different values: near 1 for a rate, low for what is seldom changed."""
    keys = [_key(value) for value in values]
    return 1.0 - sum((keys.count(key) / len(keys)) ** 2 for key in set(keys))
