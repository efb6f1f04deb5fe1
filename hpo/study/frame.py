"""The trials of a study as a table of pandas, one row a trial, for a spreadsheet or a notebook.

Owns the columns: Optuna's own (``Study.trials_dataframe``), then what this tool knows about a trial.  Does not own
the file's format; that is pandas'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpo.study.folder import StudyFolder, read_json
from hpo.study.standing import FORKED_FROM, ROLE, is_duplicate, is_feasible
from trainer.text import clean_text

if TYPE_CHECKING:
    import optuna
    import pandas
    from optuna.trial import FrozenTrial

OPTUNAS = ("number", "value", "state", "datetime_start", "datetime_complete", "duration", "params")
FIGURES = (
    "score", "se", "objective", "objective_se", "prompt_following", "likeness", "copy_rate", "diversity", "prior",
    "strangeness", "seconds",
)  # fmt: skip
OF_RESULT = ("train_seconds", "score_seconds", "steps", "skipped_steps", "weight_change", "remedy")
NUMBERS = (*FIGURES, *(name for name in OF_RESULT if name != "remedy"), "forked_from_trial")


def frame(study: optuna.Study, folder: StudyFolder) -> pandas.DataFrame:
    """Optuna's columns, then ``outcome``, the score with its parts, seconds, ``setting_…`` with kohya's names."""
    import pandas

    trials = study.get_trials(deepcopy=False)
    names = list(dict.fromkeys(name for t in trials for name in t.user_attrs.get("settings", {})))
    own = pandas.DataFrame([_row(trial, folder, names) for trial in trials])
    for name in own.columns.intersection(NUMBERS):  # also a column without any number is one of numbers
        own[name] = pandas.to_numeric(own[name])
    told = study.trials_dataframe(attrs=OPTUNAS)
    whole = pandas.concat([told.reset_index(drop=True), own], axis=1)
    for name in whole.columns:
        if whole[name].dtype == object or isinstance(whole[name].dtype, pandas.StringDtype):
            whole[name] = whole[name].map(lambda cell: clean_text(cell) if isinstance(cell, str) else cell)
    return whole


def _row(trial: FrozenTrial, folder: StudyFolder, names: list[str]) -> dict[str, Any]:
    known, settings = trial.user_attrs, trial.user_attrs.get("settings", {})
    result = read_json(folder.trial(trial.number).result) or {}
    source = known.get(FORKED_FROM) or {}
    return {
        "outcome": _outcome(trial),
        "reason": known.get("reason"),
        "message": known.get("message"),
        "role": known.get(ROLE),
        **{name: known.get(name) for name in FIGURES},
        **{name: result.get(name) for name in OF_RESULT},
        "forked_from_study": source.get("study"),
        "forked_from_trial": source.get("trial"),
        **{f"setting_{name}": settings.get(name) for name in names},
    }


def _outcome(trial: FrozenTrial) -> str:
    if is_duplicate(trial):
        return "duplicate"
    if trial.state.name == "COMPLETE":
        return "complete" if is_feasible(trial) else "infeasible"
    return {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
