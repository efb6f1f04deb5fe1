"""``hpo confirm``: the best few trials once more, with fresh seeds, on the held-out confirmation set.

Owns the study ``NAME__confirm`` beside the search's own folder, and the loop of one worker.  Does not own
which runs are wanted (``hpo.confirm.wanted``), a run's work (``hpo.search.trial``), the decision
(``hpo.confirm.outcome``) or its words (``hpo.confirm.view``).

A run is an ordinary trial of an ordinary Optuna study, so that it is resumed, shown and locked like one; its
parameters are the searched trial it repeats and its training seed.  No score of the search enters that study.
``--rescore-only`` scores the saved LoRA files instead, in ``NAME__rescore``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from hpo.confirm import view as confirmview
from hpo.confirm.outcome import (
    RESCORED,
    RETRAINED,
    ConfirmCandidate,
    Confirmed,
    Repeat,
    decide,
    write_outcome,
)
from hpo.confirm.wanted import (
    CONFIRMS,
    DISTRIBUTIONS,
    OF,
    SUFFIX,
    TRAIN_SEED,
    ConfirmRequest,
    Wanted,
    chosen_trials,
    confirmation_prompts,
    cost_line,
    done_runs,
    source_of,
    wanted_runs,
)
from hpo.search import (
    MAX_DEATHS,
    Claim,
    SearchView,
    deaths_without_progress,
    failed,
    quiet,
    run_trial,
    say_finished,
    tell,
)
from hpo.study import (
    BASELINE,
    COMPLETE,
    IDENTITY,
    INFEASIBLE,
    ROLE,
    TOTAL,
    Inputs,
    StudyFolder,
    Use,
    build_study,
    check_unchanged,
    components,
    create_study,
    database_errors,
    in_use,
    is_feasible,
    open_study,
    read_json,
    read_result,
    score_of,
    standing,
    write_params,
    write_result,
)
from hpo.terminal import Stop
from hpo.terminal import live as report
from trainer.config import TrainConfig
from trainer.errors import DataError, Interrupted, MachineError, ModelFileError
from trainer.files import machine_error, sha256_file, sweep_tree, write_atomic

if TYPE_CHECKING:
    from hpo.search import Workbench


def confirm(request: ConfirmRequest, console: Console, ask: Callable[[], bool]) -> Confirmed | None:
    """Confirm to the end.  None if the user did not want to after seeing the cost.  Raises ToolError."""
    source = source_of(request)
    how = RESCORED if request.rescore_only else RETRAINED
    target = StudyFolder(source.root.with_name(source.name + SUFFIX[how]))
    with database_errors(source):
        study = open_study(source)
        chosen, notes = chosen_trials(study, source, request)
        view = report.make_view(console, dict, target.name)
        for note in notes:
            view.say(note)
        wanted = wanted_runs(chosen, study, request)
        view.say(cost_line(source, target, chosen, wanted, how))
        if not ask():
            return None
    with database_errors(target), in_use(target) as use:
        return _confirm(study, source, use, chosen, wanted, how, view, console)


def load(source: StudyFolder, target: StudyFolder, say: Callable[[str], None]) -> Workbench:
    """The search's workbench, unchanged but for the prompts and the folder.  Says what differs, and refuses."""
    from hpo.search import workbench
    from trainer.data import cache

    definition = read_json(source.facts) or {}
    if "sections" not in definition or "inputs" not in definition:
        raise MachineError(
            f"{source.facts} does not say how the study was begun (an older version wrote it, or it is damaged)",
            "give the study's hpo search command once more: a finished study only writes this file anew",
        )
    words: dict[str, Any] = {
        key: value if key in ("base", "clip", "trigger", "class_word", "device") else Path(value)
        for key, value in definition["inputs"].items()
    }
    if words.get("prompts"):
        words["prompts"] = source.prompts  # the study's own copy
    if "data" not in words and source.data.is_dir():
        words["data"] = source.data
    config = build_study(str(definition["definition"]), definition["sections"])
    bench = workbench.load(Inputs(**words), config, source, say)
    check_unchanged(open_study(source).user_attrs[IDENTITY], bench.facts(), source.name)
    return dataclasses.replace(
        bench,
        folder=target,
        evaluator=bench.evaluator.on(confirmation_prompts(source, bench.base.token_count)),
        confirmation=None,
        store=cache.Store(source.cache),
        image_seconds=None,
    )


def _confirm(
    searched_study: optuna.Study,
    source: StudyFolder,
    use: Use,
    chosen: list[FrozenTrial],
    wanted: list[Wanted],
    how: str,
    view: report.PlainView,
    console: Console,
) -> Confirmed:
    """The part that reads models and writes files."""
    bench = load(source, use.folder, view.say)
    study = _open(bench, source, use, len(wanted))
    bench.measure_anchors(view.say)
    use.begun = True
    worker = Confirmation(study, bench, source, chosen, wanted, how, view)
    with Stop(view.on_ask) as stop:
        view.asked_to_stop = stop
        try:
            with view:
                worker.run()
        except Interrupted as error:
            raise Interrupted(error.message, "go on with the same command") from None
    outcome = worker.outcome(searched_study)
    facts = {
        "confirmation": use.folder.name,
        "prompts": bench.prompts.hash,
        "anchors": bench.anchors.key,
        "images": bench.prompts.image_count,
    }
    kept = write_outcome(source, outcome, facts)
    console.print(confirmview.outcome_table(outcome))
    for line in confirmview.outcome_lines(outcome, source, use.folder, kept=kept):
        view.say(line)
    return outcome


def _open(bench: Workbench, source: StudyFolder, use: Use, total: int) -> optuna.Study:
    """The confirmation's study, created or found unchanged."""
    from hpo.search import write_definition

    folder, facts = bench.folder, {**bench.facts(), "confirms": source.name}
    try:
        folder.artifacts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise machine_error(error, folder.artifacts) from error
    with folder.study_lock().held():
        use.made_study = not folder.database.is_file()
        study = create_study(folder, facts)
        check_unchanged(study.user_attrs[IDENTITY], facts, folder.name)
        write_definition(bench, facts)
        study.set_user_attr(TOTAL, max(total, study.user_attrs.get(TOTAL, 0)))
    return study


class Confirmation:
    """One worker: wanted run after wanted run, each of them claimed, done and told like a trial of a search."""

    def __init__(
        self,
        study: optuna.Study,
        bench: Workbench,
        source: StudyFolder,
        chosen: list[FrozenTrial],
        wanted: list[Wanted],
        how: str,
        view: SearchView,
    ) -> None:
        self.study, self.bench, self.source, self.how, self.view = study, bench, source, how, view
        self.folder: StudyFolder = bench.folder
        self.chosen = {t.number: t for t in chosen}
        self.wanted = wanted
        self._failed: dict[Wanted, str] = {}  # in this call; the next one tries again

    def run(self) -> None:
        """Until every wanted run has a result.  Raises MachineError if some failed, or are in other hands."""
        sweep_tree(self.folder.root)
        while True:
            if self.view.should_stop():
                raise Interrupted("stopped between two runs", "the same command goes on")
            claim = self._take()
            if claim is None:
                break
            try:
                self._do(claim)
            finally:
                claim.lock.release()
        missing = [w for w in self.wanted if w not in done_runs(self.folder)]
        if missing:
            first = missing[0]
            why = self._failed.get(first, "another process works on it")
            raise MachineError(
                f"{len(missing)} of {len(self.wanted)} runs are missing, first trial {first.of}: {why}",
                "the same command tries again",
            )

    # Claiming

    def _take(self) -> Claim | None:
        with self.folder.study_lock().held():
            if orphan := self._adopt():
                return orphan
            trials = self.study.get_trials(deepcopy=False)
            taken = {
                _pair(t) for t in trials if t.state in (TrialState.COMPLETE, TrialState.RUNNING) and t.params
            }
            missing = [w for w in self.wanted if w not in taken and w not in self._failed]
            if not missing:
                return None
            with quiet():
                if not any(t.state == TrialState.WAITING for t in trials):
                    self.study.enqueue_trial(missing[0].suggested)
                trial = self.study.ask()
            lock = self.folder.trial_lock(trial.number)
            taken_now = lock.try_acquire()
            assert taken_now, f"trial {trial.number} is new, but its lock is held"
            return Claim(trial, _suggested(trial), lock, adopted=False)

    def _adopt(self) -> Claim | None:
        """A run whose worker is dead, if it is still wanted.  Results found on disk are told on the way."""
        for frozen in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self.folder.trial_lock(frozen.number)
            if not lock.try_acquire():
                continue
            with quiet():
                trial = optuna.trial.Trial(self.study, frozen._trial_id)
                claim = Claim(trial, _suggested(trial), lock, adopted=True)
            pair = Wanted(claim.suggested[OF], claim.suggested[TRAIN_SEED])
            found = None
            if pair in self.wanted:
                found = read_result(self.folder.trial(frozen.number), self._config(pair, frozen.number))
                if found is None and pair not in self._failed:
                    return claim
            if found is not None:
                tell(self.study, self.folder, trial, found, self._settings(pair), self.view.say)
                self.view.say(f"run {frozen.number} had its result on disk; the study knows it now")
            lock.release()
        return None

    # One run

    def _config(self, run: Wanted, number: int) -> TrainConfig:
        """The searched trial's settings, with this run's seed and name; a saved LoRA file keeps its own."""
        values = (read_json(self.source.trial(run.of).params) or {}).get("train")
        if values is None:
            raise MachineError(
                f"{self.source.trial(run.of).params} is missing or damaged",
                "restore it, or confirm fewer trials",
            )
        config = TrainConfig(**values).with_values(
            {
                "pretrained_model_name_or_path": self.bench.base_spec,
                "train_data_dir": str(self.bench.data_folder),
            }
        )
        if self.how == RESCORED:
            return config
        return config.with_values({"seed": run.train_seed, "output_name": f"lora_trial_{number}"})

    def _settings(self, run: Wanted) -> dict[str, Any]:
        found = self.chosen.get(run.of)
        return {OF: run.of, **(found.user_attrs.get("settings", {}) if found else {})}

    def _do(self, claim: Claim) -> None:
        number, run = claim.trial.number, Wanted(claim.suggested[OF], claim.suggested[TRAIN_SEED])
        folder, config = self.folder.trial(number), self._config(run, number)
        write_params(folder, claim.suggested, (), config)
        zero = self.chosen.get(run.of)
        role = BASELINE if zero and zero.user_attrs.get(ROLE) == BASELINE else CONFIRMS
        for name, value in {ROLE: role, "settings": self._settings(run)}.items():
            claim.trial.set_user_attr(name, value)
        self.view.on_trial(number, claim.suggested, claim.adopted, standing(self.study, len(self.wanted)))
        if deaths_without_progress(folder) >= MAX_DEATHS:
            message = f"{MAX_DEATHS} processes died in this run with nothing more saved"
            result = failed(folder, config, "process_died", message)
            write_result(folder, result)
        else:
            if self.how == RESCORED:
                self._copy_lora(run, number)
            result = run_trial(self.bench, folder, config, self.view)
        if result.state not in (COMPLETE, INFEASIBLE):
            self._failed[run] = f"{result.reason}: {result.message}"
        try:
            tell(self.study, self.folder, claim.trial, result, self._settings(run), self.view.say)
        except optuna.exceptions.UpdateFinishedTrialError:
            say_finished(self.folder, number, self.view.say)
        self.view.on_result(result, standing(self.study, len(self.wanted)))

    def _copy_lora(self, run: Wanted, number: int) -> None:
        """The searched trial's file, unchanged since it was scored there."""
        searched_trial, own = self.source.trial(run.of), self.folder.trial(number)
        if own.lora.is_file():
            return
        try:
            content = searched_trial.lora.read_bytes()
        except OSError as error:
            raise machine_error(error, searched_trial.lora) from error
        write_atomic(own.lora, content)
        known = (read_json(searched_trial.result) or {}).get("lora_sha256")
        if sha256_file(own.lora) != known:
            own.lora.unlink()
            raise ModelFileError(
                f"{searched_trial.lora} has changed since the search scored it",
                "restore it, or leave out --rescore-only to train the trial again",
            )

    # The outcome

    def outcome(self, searched_study: optuna.Study) -> Confirmed:
        """What all complete runs of the wanted trials say.  Raises DataError if none of them has a score."""
        zero = next((n for n, t in self.chosen.items() if t.user_attrs.get(ROLE) == BASELINE), None)
        scored = [
            float(score_of(t) or 0.0)
            for t in searched_study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if is_feasible(t) and score_of(t) is not None
        ]
        noise = components(searched_study, self.source)
        own_se = noise.paired_se() / math.sqrt(2) if noise else 0.0
        found = decide([self._candidate(n) for n in self.chosen], zero, self.how, scored, own_se)
        if found is None:
            raise DataError(
                f"none of the trials {', '.join(map(str, self.chosen))} has a score when confirmed",
                f"see the runs: hpo status {self.folder.words}",
            )
        return found

    def _candidate(self, number: int) -> ConfirmCandidate:
        from evaluation.score import by_draw, read_score

        searched_trial, repeats, trouble = self.chosen[number], [], ""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            pair = _pair(trial)
            if pair not in self.wanted or pair.of != number:
                continue
            if not is_feasible(trial):
                trouble = str(trial.user_attrs.get("reason", "infeasible"))
                continue
            score = read_score(self.folder.trial(trial.number).metrics)
            cost = read_json(self.folder.trial(trial.number).result) or {}
            if self.how == RESCORED:
                cost = read_json(self.source.trial(number).result) or {}
            config = self._config(pair, trial.number)
            batch = config.train_batch_size * config.gradient_accumulation_steps
            repeats.append(
                Repeat(
                    trial.number,
                    pair.train_seed,
                    score.value,
                    by_draw(score, self.bench.anchors),
                    float(cost.get("train_seconds", 0.0)),
                    int(cost.get("steps", 0)) * batch,
                )
            )
        params = read_json(self.source.trial(number).params) or {}
        return ConfirmCandidate(
            number,
            params.get("train", {}),
            searched_trial.user_attrs.get("settings", {}),
            float(score_of(searched_trial) or 0.0),
            float(searched_trial.user_attrs.get("se", 0.0)),
            tuple(repeats),
            trouble,
        )


def _suggested(trial: optuna.Trial) -> dict[str, Any]:
    """The run's parameters; of an adopted trial too that died before it had them."""
    return {
        name: trial.suggest_int(name, distribution.low, distribution.high)
        for name, distribution in DISTRIBUTIONS.items()
    }


def _pair(trial: FrozenTrial) -> Wanted:
    params: Mapping[str, Any] = trial.params
    return Wanted(params.get(OF, -1), params.get(TRAIN_SEED, -1))
