"""One run of ``hpo search``: from the command line to the summary.

Owns the order: definition → inputs → folder → study → baseline → trials → summary.  User errors are found
before anything is written; otherwise the new files are removed again.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from rich.console import Console

from hpo.machine import WORKERS, process_words, worker_devices
from hpo.night import answered, moved
from hpo.search.budget import budget_lines
from hpo.search.choice import Ask, choose
from hpo.search.claim import quiet
from hpo.search.crew import search_with
from hpo.search.enqueue import as_proposal, read_enqueued
from hpo.search.fork import Fork, as_source, check_fork, source_of
from hpo.search.opening import opened
from hpo.search.sampled import SearchLimits, SearchProposals
from hpo.search.samplers import require_sampler
from hpo.search.summary import introduction, ratio_line, summary
from hpo.search.within import ANY_NUMBER, Within, begun_confirming
from hpo.search.worker import Worker
from hpo.study import (
    BASELINE,
    ENQUEUED,
    IDENTITY,
    ROLE,
    RUNS,
    STOP,
    TOTAL,
    Inputs,
    Standing,
    StudyConfig,
    StudyFolder,
    Use,
    Work,
    Worked,
    as_begun,
    begun_study,
    check_unchanged,
    chosen_place,
    database_errors,
    early_note,
    edge_lines,
    forget_hours,
    in_use,
    nothing_learned,
    open_place,
    ownership_of,
    promptfiles,
    read_from,
    recorded,
    require_local,
    settle,
    standing,
)
from hpo.terminal import BEGUN, ENDED, FOLLOWS, LOADED, Report, ReportingView, Stop, clock, hours_words
from hpo.terminal import live as report
from trainer.errors import ConfigError, Interrupted
from trainer.files import machine_error

StartsWorkers = Callable[[Sequence[str]], "Launch"]  # (more words of the command) → what starts a worker
POLL_SECONDS = 0.5
NAMED_AFTER_SECONDS = 20.0  # the worker that is waited for
TRIALS = 30  # without --trials and --hours

if TYPE_CHECKING:
    from hpo.night import Launch
    from hpo.search.cost import Cost
    from hpo.search.workbench import Workbench


@dataclass(frozen=True)
class SearchRequest:
    """The arguments of ``hpo search``.

    ``trials``: None for 30, or with ``hours`` for as many as fit.  ``hours``: of the search and what follows it.
    """

    inputs: Inputs
    trials: int | None = None
    study: str | None = None
    name: str | None = None
    sets: tuple[str, ...] = ()
    enqueue: Path | None = None
    max_hours: float | None = None
    hours: float | None = None
    keep_best: int | None = None
    stop_when_converged: bool = False
    seed: int | None = None
    runs: Path = RUNS
    preset: str | None = None
    ask: Ask | None = None  # None: nobody can be asked
    fork_from: str | None = None  # a study whose finished trials are taken over
    workers: int | None = None  # None: one on each free GPU
    launch: StartsWorkers | None = None  # None: this process is the only worker
    report: Report | None = None  # of a worker that another process started
    until: float | None = None  # of a worker that was started again: no trial begins later (time.monotonic)


# (the study, the time of this command, the device: "" for the one that this process chooses)
Then = Callable[[StudyFolder, Worked, str], None]


def search(request: SearchRequest, console: Console, then: Then | None = None) -> None:
    """Run the search to its end.  Raises ToolError; Interrupted if the user stopped it.

    ``then``: with a time budget, what is done with the rest of it (``hpo.confirm.confirm_within``).
    """
    choice = choose(request)
    config, folder = choice.config, choice.folder
    if request.stop_when_converged and len(config.objectives) > 1:
        raise ConfigError(
            "--stop-when-converged needs a single objective, but this study has two objectives",
            "remove the option; --trials, --hours or --max-hours end the search",
        )
    require_sampler(config.search.sampler)
    fork = source_of(request.fork_from, folder) if request.fork_from is not None else None
    limits = SearchLimits(
        trials=request.trials or (TRIALS if request.hours is None else ANY_NUMBER),
        max_hours=request.max_hours,
        keep_best=request.keep_best,
        stop_when_converged=request.stop_when_converged,
        until=request.until,
    )
    view = _view(request, config, folder, console)
    place = chosen_place(folder)
    if place is None:
        require_local(folder)
    with database_errors(folder):
        open_place(folder, place)
        begun = _as_begun(folder, config if fork is None else as_source(config, fork))
        said = list(choice.says)
        if begun.score.signed != config.score.signed:
            source = folder if fork is None else fork
            said.append(
                f"study {source.name} was begun with an earlier version and keeps its objective: "
                "the sampler is told 0 where the score is 0"
            )
            view.say(said[-1])
        config = begun
        if fork is not None:
            check_fork(fork, folder, config)
        if request.enqueue:
            read_enqueued(request.enqueue)  # find mistakes in the file before anything is loaded
        devices = _devices(request, folder, view)
        with (
            in_use(folder) as use,
            recorded(folder.root, "search", begun=False) as work,
            _worked(folder, None if devices else request.hours) as worked,
        ):
            settle(folder, place)
            for line in choice.says:
                view.say(line)
            if choice.answers:
                answered(*choice.answers)
            if devices and request.launch is not None:
                launch = request.launch(choice.answers)
                search_with(devices, launch, request, folder, use, work, console, said)
                return
            known = begun_study(folder)
            if known is not None and request.hours and begun_confirming(known, request.hours):
                use.begun = work.begun = True
                device: str | None = request.inputs.device or ""
                view.say(f"the search within {hours_words(request.hours)} is over; its confirmation is left")
            else:
                request = replace(request, inputs=choice.inputs)
                device = _search(
                    request, config, use, limits, view, work, worked, fork, follows=then is not None
                )
            if device is not None and then is not None and worked is not None:
                gc.collect()  # the networks of the search
                view.phase(FOLLOWS)
                WORKERS.set(1)
                then(folder, worked, device)


def _view(
    request: SearchRequest, config: StudyConfig, folder: StudyFolder, console: Console
) -> report.PlainView:
    def settings(suggested: Mapping[str, Any]) -> Mapping[str, Any]:
        return config.space.settings(suggested, config.train)

    if request.report is not None:
        return ReportingView(console, settings, request.report)
    return report.make_view(console, settings, folder.name)


def _devices(request: SearchRequest, folder: StudyFolder, view: report.PlainView) -> tuple[str, ...]:
    """The devices of the workers that this command starts; empty if it is the only one.  Without --workers there are
    no more of them than trials."""
    if request.launch is None:
        return ()
    most = None
    if request.hours is None and (study := begun_study(folder)) is not None:
        most = standing(study, request.trials or TRIALS).left
    elif request.hours is None:
        most = request.trials or TRIALS
    return worker_devices(request.workers, request.inputs.device, view.say, most)


@contextlib.contextmanager
def _worked(folder: StudyFolder, hours: float | None) -> Iterator[Worked | None]:
    """Count the time of the block, if there is a budget."""
    if hours is None:
        yield None
        return
    worked = Worked(folder, hours)
    with worked.noted():
        yield worked


def _search(
    request: SearchRequest,
    config: StudyConfig,
    use: Use,
    limits: SearchLimits,
    view: report.PlainView,
    work: Work,
    worked: Worked | None = None,
    fork: StudyFolder | None = None,
    *,
    follows: bool = False,
) -> str | None:
    """The part of a search that loads models and writes files.  The device with which this process goes on with the
    confirmation; None: it does not.  ``follows``: it can."""
    from hpo.search import workbench  # imports torch, so only after all checks that do not need it

    loads = time.monotonic()
    bench = workbench.load(request.inputs, config, use.folder, view.say)
    loads = time.monotonic() - loads
    if fork is None:
        study = opened(bench, use, objectives=bench.study.objectives, say=view.say)
        view.phase(LOADED)
    else:
        with read_from(fork):
            taken = Fork.into(bench, fork)
            study = opened(bench, use, objectives=bench.study.objectives, say=view.say)
            view.phase(LOADED)
            taken.take(study, view.say)
        use.begun = work.begun = True
        if not standing(study, limits.trials).left:
            view.say(_full_line(limits.trials))
        view.console.print(introduction(bench.study, limits.trials))
    proposal = _proposal(request, bench, view)
    within = None
    if worked is not None and request.hours is not None:
        within = Within(study, bench, worked, request.hours, limits.trials, loads, view.say)
    cost = _begin(study, bench, limits, proposal, view, within)
    use.begun = work.begun = True
    view.phase(BEGUN)
    worker = Worker(study, bench, SearchProposals(study, bench, limits, view.say, cost, within), view)
    with Stop(view.on_ask) as stop:
        view.asked_to_stop = stop
        try:
            with view:
                why = worker.run()
        except Interrupted as error:
            view.say(report.study_line(use.folder.name, worker.standing()))
            raise Interrupted(
                error.message,
                f"run the same command again to resume; results so far: hpo status {use.folder.words}",
            ) from None
    view.phase(ENDED)
    now = worker.standing()
    work.says = report.study_line(use.folder.name, now)
    if worked is None:
        _end(study, bench, now, why, view)
        return None
    with ownership_of(use.folder, view.say).study():
        last = worked.leave()
    goes_on = follows and now.best is not None and not now.only_baseline
    goes_on = goes_on and nothing_learned(study, use.folder) is None
    _end(study, bench, now, why, view, goes_on=goes_on)
    if goes_on and not last:
        view.say("another process still searches in this study; the last one confirms the best trials")
        view.say(f"next: hpo status {use.folder.words}")
    return str(bench.base.device) if goes_on and last else None


def _full_line(trials: int) -> str:
    """After ``--fork-from``: there is nothing left to search."""
    return (
        f"--trials {trials} allows no new trial, because the trials taken over count too: "
        "give a larger number to search in the new space"
    )


def _as_begun(folder: StudyFolder, config: StudyConfig) -> StudyConfig:
    """The definition with the objective that the folder's study was begun with.

    Raises ConfigError for a changed definition, before anything is loaded.
    """
    try:
        study = begun_study(folder)
    except OSError as error:
        raise machine_error(error, folder.root) from error
    if study is not None:
        before = study.user_attrs.get(IDENTITY, {})
        config = as_begun(config, before)
        known = {key: value for key, value in before.items() if key.startswith("[")}
        if known:
            check_unchanged(known, config.frozen(), folder.name)
        if "prompts" in before:
            promptfiles.check_unedited(folder, before["prompts"])
    return config


def _proposal(request: SearchRequest, bench: Workbench, view: report.PlainView) -> Mapping[str, Any] | None:
    if request.enqueue is None:
        return None

    from trainer.data import total_steps

    proposal, notes = as_proposal(request.enqueue, bench.study, lambda train: total_steps(train, bench.data))
    for note in notes:
        view.say(note)
    return proposal


def _begin(
    study: optuna.Study,
    bench: Workbench,
    limits: SearchLimits,
    proposal: Mapping[str, Any] | None,
    view: report.PlainView,
    within: Within | None = None,
) -> Cost | None:
    """Print the plan, score the untrained base, check the disk, enqueue trial 0 and --enqueue."""
    now = standing(study, limits.trials)
    fresh = now.complete + now.running == 0
    if fresh:
        view.console.print(introduction(bench.study, limits.trials))
        if within is None:
            _say_ratio(bench, limits.trials, view)
    view.say(_data_line(bench))
    if now.left or within is not None:
        from hpo.search import fitting

        fitting.say_fit(bench, view.say, fresh=fresh)
        with _one_after_the_other(bench, view):
            cost = _told_cost(study, bench, limits, view, within)
            if within is not None:
                with ownership_of(bench.folder, view.say).study(), quiet():
                    within.store()  # before the next worker makes its plan
    else:
        cost = None
    with ownership_of(bench.folder, view.say).study(), quiet():
        if within is None:
            study.set_user_attr(TOTAL, limits.trials)
            forget_hours(study)
        if study.user_attrs.get(STOP) and not limits.stop_when_converged:
            study.set_user_attr(STOP, "")  # without --stop-when-converged the search continues
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(dict(bench.study.baseline), user_attrs={ROLE: BASELINE})
        if proposal is not None:
            before = len(study.get_trials(deepcopy=False))
            study.enqueue_trial(dict(proposal), user_attrs={ROLE: ENQUEUED}, skip_if_exists=True)
            if len(study.get_trials(deepcopy=False)) == before:
                view.say("the study already contains the settings of --enqueue")
    waiting = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
    if proposal is not None and waiting and not now.left:
        view.say(
            f"the settings of --enqueue are queued as trial {waiting[-1].number}, but the study already has "
            f"{limits.trials} trials; raise --trials to run it"
        )
    return cost


def _say_ratio(bench: Workbench, trials: int, view: report.PlainView) -> None:
    """How many trials there are for each searched setting, and which settings to fix if that is too few."""
    for line in (ratio_line(len(bench.study.space), trials), *budget_lines(bench.study, trials)):
        view.say(line)


@contextlib.contextmanager
def _one_after_the_other(bench: Workbench, view: report.PlainView) -> Iterator[None]:
    """In one process of the study at a time.  Workers that start together would each draw the same images of the
    base, and be slower together than one of them."""
    lock = ownership_of(bench.folder, view.say).base()
    if not lock.try_acquire():
        view.say("another worker scores the untrained base; waiting for it …")
        begun, named = time.monotonic(), False
        while not lock.try_acquire():
            is_long = time.monotonic() - begun >= NAMED_AFTER_SECONDS
            if is_long and not named and (other := lock.holder()) is not None:
                words = other.words if other.host else process_words(other.pid)
                view.say(f"still waiting for {words}; this worker goes on when it ends or is stopped")
                named = True
            time.sleep(POLL_SECONDS)
            moved()  # the other one may take as long as it needs: its own supervisor watches it
    try:
        yield
    finally:
        lock.release()


def _told_cost(
    study: optuna.Study,
    bench: Workbench,
    limits: SearchLimits,
    view: report.PlainView,
    within: Within | None = None,
) -> Cost:
    """Score the untrained base, say what the trials cost, and warn about trials that are too short or too long."""
    from hpo.search import cost as costs

    now = standing(study, limits.trials)
    fresh = now.complete + now.running == 0
    with view.waiting(f"the untrained {bench.base.name}"):
        bench.measure_anchors(view.say, fresh=fresh)
    if within is not None:
        within.read()
    if fresh:
        view.say(f"encoding {len(bench.data.items)} training images, timing {costs.PROBE_STEPS} steps …")
    with view.waiting("training images"):
        cost = costs.estimate(bench, study, probe=fresh or (within is not None and within.known is None))
    total, lines = limits.trials, []
    if within is not None:
        cost = replace(cost, pace=cost.pace or within.known)
        lines = within.begin(cost)
        total = within.trials
        now = standing(study, total)
    bench.pace = cost.pace
    costs.check_disk(bench, cost, now.left, limits.keep_best)
    view.say(costs.length_line(cost))
    size = costs.final_bytes(bench.folder, study, cost, total, limits.keep_best)
    view.say(_cost_line(cost, now, costs.megabytes(size)))
    if within is not None and fresh and within.is_planned:
        _say_ratio(bench, total, view)
    for line in (*lines, *costs.warnings(bench, cost, None if within else total, limits.max_hours)):
        view.say(line)
    return cost


def _data_line(bench: Workbench) -> str:
    word = f", class {bench.data.class_word}" if bench.data.class_word else ""
    trigger = f", trigger {bench.data.trigger}" if bench.data.trigger else ""
    regular = sum(item.is_reg for item in bench.data.items)
    beside = f" and {regular} regularization images" if regular else ""
    return (
        f"{len(bench.data.items) - regular} training images{beside}{trigger}{word}; "
        f"{len(bench.reference_items)} references; {bench.prompts.image_count} images per trial "
        f"({bench.prompts.size}), scored by {bench.evaluator.scorer.name}"
    )


def _cost_line(cost: Cost, now: Standing, size: str) -> str:
    seconds = cost.trial_seconds
    about = (
        f"about {clock(seconds)} per trial, {clock(seconds * now.left)} in total"
        if seconds
        else "time unknown"
    )
    return (
        f"cost: {now.left} trial{'s'[: now.left != 1]} × (about {cost.steps:.0f} steps + {cost.images} images): "
        f"{about}; about {size} of disk"
    )


def _end(
    study: optuna.Study,
    bench: Workbench,
    now: Standing,
    why: str,
    view: report.PlainView,
    *,
    goes_on: bool = False,
) -> None:
    best = study.get_trials(deepcopy=False)[now.best[0]] if now.best else None
    settings = best.user_attrs.get("settings", {}) if best else None
    edge = edge_lines(bench.folder, bench.study, best.params, now) if best else []
    if note := early_note(study, bench.folder):
        view.say(note)
    nothing = nothing_learned(study, bench.folder)
    for line in summary(bench.folder, now, settings, why, nothing, edge, goes_on=goes_on):
        view.say(line)
    view.say(report.study_line(bench.folder.name, now))
