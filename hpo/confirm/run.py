"""``hpo confirm``: retrains the best trials with new seeds and scores them on the held-out confirmation prompts.

Owns the study ``NAME__confirm``, which is stored next to the search's folder, and the order of the steps.
Does not own which runs are needed (see ``hpo.confirm.wanted``), the settings of a run (see
``hpo.confirm.proposals``), training and scoring (see ``hpo.search``), the decision (see
``hpo.confirm.outcome``) or the output texts (see ``hpo.confirm.view``).

A run is a normal trial of a normal Optuna study, so it is resumed, shown and locked like any other.  Its
parameters are the number of the repeated trial and the training seed.  No score of the search is used in that
study.  ``--rescore-only`` scores the saved LoRA files without training, in ``NAME__rescore``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpo.confirm import view as confirmview
from hpo.confirm.outcome import RESCORED, RETRAINED, RULE, Confirmed, write_outcome
from hpo.confirm.proposals import ConfirmProposals
from hpo.confirm.repeats import confirmed
from hpo.confirm.wanted import (
    CHOSEN,
    Confirmation,
    ConfirmRequest,
    chosen_trials,
    confirmation_prompts,
    cost_line,
    shown_run,
    source_of,
    wanted_runs,
)
from hpo.search import Worker, opened
from hpo.study import (
    IDENTITY,
    TOTAL,
    Inputs,
    StudyFolder,
    Use,
    Work,
    build_study,
    check_unchanged,
    database_errors,
    in_use,
    measured,
    open_study,
    ownership_of,
    read_json,
    recorded,
    require_learned,
)
from hpo.terminal import Stop
from hpo.terminal import live as report
from trainer.errors import Interrupted, MachineError

if TYPE_CHECKING:
    import optuna

    from hpo.search import Workbench


def confirm(request: ConfirmRequest, console: Console, ask: Callable[[], bool]) -> Confirmed | None:
    """Run the whole confirmation.  Returns None if the user declined after seeing the cost.  Raises ToolError."""
    source = source_of(request)
    how = RESCORED if request.rescore_only else RETRAINED
    with database_errors(source):
        study = open_study(source)
        begun = Confirmation(source, {}, (), how).target.has_study
        require_learned(study, source, "confirm", anyway=request.anyway or begun)
        chosen, notes = chosen_trials(study, source, request)
        wanted = wanted_runs(chosen, study, request)
        asked = Confirmation(source, {t.number: t for t in chosen}, tuple(wanted), how, request.device)
        view = report.make_view(console, shown_run, asked.target.name)
        view.ranks = False
        for note in notes:
            view.say(note)
        view.say(cost_line(asked))
        if not ask():
            return None
    with (
        database_errors(asked.target),
        in_use(asked.target) as use,
        recorded(source.root, "confirm", begun=False) as work,
    ):
        return _confirm(study, asked, use, view, console, work)


def load(
    source: StudyFolder, target: StudyFolder, say: Callable[[str], None], device: str | None = None
) -> Workbench:
    """The workbench of the search with the confirmation prompts and the target's folder.

    Raises ConfigError if anything else differs from the search, and names the differences.
    """
    from hpo.search import workbench
    from trainer.data import cache

    definition = read_json(source.facts) or {}
    if "sections" not in definition or "inputs" not in definition:
        raise MachineError(
            f"{source.facts} has no study definition (it is damaged, or was written by an older version)",
            "run the study's hpo search command again; for a finished study this only rewrites the file",
        )
    words: dict[str, Any] = {
        key: value if key in ("base", "clip", "trigger", "class_word", "device") else Path(value)
        for key, value in definition["inputs"].items()
    }
    if words.get("prompts"):
        words["prompts"] = source.prompts  # the study's own copy
    if "data" not in words and source.data.is_dir():
        words["data"] = source.data
    if device is not None:
        words["device"] = None if device == CHOSEN else device
    config = build_study(str(definition["definition"]), definition["sections"])
    bench = workbench.load(Inputs(**words), config, source, say)
    check_unchanged(open_study(source).user_attrs[IDENTITY], bench.facts(), source.name)
    return dataclasses.replace(
        bench,
        folder=target,
        evaluator=bench.evaluator.on(confirmation_prompts(source, bench.base.token_count)),
        confirmation=None,
        store=cache.Store(source.cache),
        pace=measured(open_study(source), source),
    )


def _confirm(
    searched_study: optuna.Study,
    asked: Confirmation,
    use: Use,
    view: report.PlainView,
    console: Console,
    work: Work,
) -> Confirmed:
    """The part that loads models and writes files."""
    bench = load(asked.source, use.folder, view.say, asked.device)
    study = opened(bench, use, beside={"confirms": asked.source.name})
    with ownership_of(use.folder, view.say).study():
        study.set_user_attr(TOTAL, max(len(asked.wanted), study.user_attrs.get(TOTAL, 0)))
    with view.waiting(f"the untrained {bench.base.name}"):
        bench.measure_anchors(view.say)
    use.begun = work.begun = True
    runs = ConfirmProposals(study, bench, asked)
    with Stop(view.on_ask) as stop:
        view.asked_to_stop = stop
        try:
            with view:
                Worker(study, bench, runs, view).run()
        except Interrupted as error:
            raise Interrupted(error.message, "run the same command again to resume") from None
    outcome = confirmed(searched_study, runs)
    facts = {
        "confirmation": use.folder.name,
        "prompts": bench.prompts.hash,
        "anchors": bench.anchors.key,
        "images": bench.prompts.image_count,
    }
    kept = write_outcome(asked.source, outcome, facts)
    won = outcome.won
    work.says = f"confirmed: trial {won.number}, score {won.score:.4f} (95 % {won.low:.4f} … {won.high:.4f})"
    view.say(RULE)
    console.print(confirmview.outcome_table(outcome))
    for line in confirmview.outcome_lines(outcome, asked.source, use.folder, kept=kept):
        view.say(line)
    return outcome
