"""Running probes: studies of their own, NAME__FAMILY on the target and NAME__FAMILY-source for their twins.

Owns their folders, resuming, what is written of the outcome (probes.json) and the lines about it.  Which
probe is next and what the scores mean is ``hpo.transfer.probes.design``'s; a probe is trained, scored and
told like any trial.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpo.study import Lock, StudyFolder, holder, in_use, read_json
from hpo.terminal import say
from hpo.transfer import (
    MAPPING_VERSION,
    PLANNER,
    SOURCE_STUDY,
    SourceCandidate,
    snap_down,
    transfer,
    two_digits,
)
from hpo.transfer.probes.design import (
    DEFAULT,
    DEFAULT_DESIGN,
    DESIGNS,
    TEXT_ON,
    TRANSFERRED,
    Agreement,
    Decision,
    Probe,
    ProbeScore,
    agreement,
    find,
    horizon_shift,
    search_is_better,
)
from hpo.transfer.probes.side import FRACTION, ProbeSide, make_side, octave_bounds
from trainer.bases import is_miniature
from trainer.config import WITHOUT_INFLUENCE, TrainConfig
from trainer.errors import ConfigError, Interrupted, MachineError, StudyStopped
from trainer.files import machine_error, write_atomic

if TYPE_CHECKING:
    import optuna

    from hpo.study import Inputs
    from hpo.transfer import Transfer, TransferRequest

FILE = "probes.json"
LEAST = 3  # with fewer, nothing can be decided
DIVERSE = "diverse"
# Settings that name a run and decide nothing.
_NAMES = (*sorted(WITHOUT_INFLUENCE), "output_name", "pretrained_model_name_or_path", "train_data_dir")


@dataclass(frozen=True)
class Found:
    """What probes changed: settings (none if the transferred ones stay), why, and lines to read."""

    values: Mapping[str, Any]
    reason: str
    lines: tuple[str, ...]


def consult(done: Transfer, request: TransferRequest, console: Console) -> Found | None:
    """Make the probes that are asked for; else what earlier ones of these settings found.  None: there are none."""
    folder = probe_folder(done)
    saved = read_json(folder.root / FILE)
    design = request.design or (saved or {}).get("design") or DEFAULT_DESIGN
    budget = request.probes or (saved or {}).get("probes", 0)
    if saved is not None and (not request.probes or (saved["design"], saved["probes"]) == (design, budget)):
        say(console, f"probes: {len(saved['outcomes'])} of study {folder.name}")
        return Found(saved["values"], saved["reason"], tuple(saved["lines"]))
    if not request.probes:
        return None
    if request.probes < LEAST:
        raise ConfigError(
            f"{request.probes} probes decide nothing", f"give --probes {LEAST} or more; 6 is usual"
        )
    return _Probing(done, request, folder, design, console).run()


def identity(done: Transfer) -> str:
    """What probes belong to: another best trial, profile or preset has probes of its own."""
    deciding = {k: v for k, v in done.plan.config.as_dict().items() if k not in _NAMES}
    return hashlib.sha256(json.dumps([MAPPING_VERSION, deciding], sort_keys=True).encode()).hexdigest()[:16]


def probe_folder(done: Transfer) -> StudyFolder:
    """NAME__FAMILY, or with a number behind it where that belongs to other settings: their probes are kept."""
    root = done.source.folder.root
    own = identity(done)
    for number in range(1, 1000):
        ending = "" if number == 1 else f"-{number}"
        folder = StudyFolder(root.with_name(f"{root.name}__{done.profile.family.name}{ending}"))
        facts = (read_json(folder.facts) or {}).get("facts")
        if facts is None and not folder.database.is_file():
            return folder
        if facts is not None and facts.get("transferred") == own:
            return folder
    raise MachineError(f"{root.name} has 999 studies of probes", "move some of them away")


class _Probing:
    """One call: target probes one by one, their twins on the source, the decision."""

    def __init__(
        self, done: Transfer, request: TransferRequest, folder: StudyFolder, design: str, console: Console
    ) -> None:
        self.done, self.request, self.folder, self.console = done, request, folder, console
        self.design_name, self.design = design, DESIGNS[design]
        facts = read_json(done.source.folder.facts) or {}
        self.facts: Mapping[str, Any] = facts
        self.others: dict[str, SourceCandidate] = {}
        for number, candidate in enumerate(done.source.others[:2], 1):
            self.others[f"{DIVERSE} {number}"] = candidate

    def run(self) -> Found:
        target = self._target()
        outcomes = run_side(
            self.folder,
            target,
            lambda found: self.design.next(found, target.scope),
            self._inputs(self.done.profile.family.base),
            self._provenance(),
            self.console,
        )
        twins, shift = self._twins([o.probe for o in outcomes])
        decision = self.design.decide(outcomes, target.scope, shift)
        values = self._values(decision, target)
        lines = self._lines(outcomes, twins, decision, shift)
        saved = {
            "design": self.design_name,
            "probes": self.request.probes,
            "fraction": FRACTION,
            "decision": asdict(decision),
            "values": values,
            "reason": decision.reason,
            "horizon_shift_octaves": shift,
            "lines": lines,
            "outcomes": [asdict(o) for o in outcomes],
            "twins": [asdict(o) for o in twins],
        }
        write_atomic(self.folder.root / FILE, json.dumps(saved, indent=1))
        return Found(values, decision.reason, tuple(lines))

    # Both sides

    def _mapped(self, candidate: SourceCandidate) -> TrainConfig:
        """A candidate by the same rules, computed as the planner wants the transferred settings computed."""
        plan, profile = self.done.plan, self.done.profile
        found = transfer(candidate.config, plan.figures, profile, preset=self.request.preset).config
        computed = {m.key: getattr(plan.config, m.key) for m in plan.moves if m.rule == PLANNER}
        return found.with_values(computed)

    def _target(self) -> ProbeSide:
        own = self.done.plan.config
        usual = {
            "text_encoder_lr1": None,
            "text_encoder_lr2": None,
            "unet_lr": None,
            "network_train_unet_only": False,
        }
        whole = {
            TRANSFERRED: own,
            DEFAULT: own.with_values({**usual, **self.done.profile.family.community_default}),
        }
        whole |= {name: self._mapped(candidate) for name, candidate in self.others.items()}
        if not own.trains_text_encoder:
            whole[TEXT_ON] = self._text_encoders_on()
        side = self._side(self.folder.name, whole, octave_bounds(own, self.done.profile.limits), FRACTION)
        for name in whole.keys() - side.short.keys():
            say(
                self.console,
                f"{name} is not probed: it is the transferred settings again, or fits no study with them",
            )
        return side

    def _text_encoders_on(self) -> TrainConfig:
        """The transferred settings with trained text encoders, at the profile's share of the rate."""
        own, share = self.done.plan.config, self.done.profile.rate.text_encoder_ratio
        rate = snap_down(share * own.effective_unet_lr)
        return own.with_values({"network_train_unet_only": False, "text_encoder_lr": rate})

    def _side(
        self, name: str, whole: Mapping[str, TrainConfig], bounds: tuple[float, float], fraction: float
    ) -> ProbeSide:
        miniature = is_miniature(self.done.profile.family.base)
        return make_side(
            name,
            whole,
            self.done.plan.figures.samples,
            self.request.probes,
            bounds,
            sampling=self.facts.get("sampling", {}),
            seed=self.done.plan.config.seed,
            words="miniature" if miniature else "natural",
            fraction=fraction,
        )

    def _twins(self, probes: list[Probe]) -> tuple[list[ProbeScore], float | None]:
        """The same probes on the source's base, for the rank agreement; the grid also wants whole runs of them."""
        source = self.done.source
        whole = {TRANSFERRED: source.best.config} | {name: c.config for name, c in self.others.items()}
        if source.baseline is not None:
            whole[DEFAULT] = source.baseline.config
        endings = {"source": FRACTION} | ({"source-whole": 1.0} if self.design_name == "grid" else {})
        found: list[list[ProbeScore]] = []
        for ending, fraction in endings.items():
            folder = StudyFolder(self.folder.root.with_name(f"{self.folder.name}-{ending}"))
            side = self._side(folder.name, whole, (-8.0, 8.0), fraction)
            found.append(
                run_side(
                    folder,
                    side,
                    in_order([p for p in probes if p.candidate in side.short]),
                    self._inputs(source.base),
                    self._provenance(),
                    self.console,
                )
            )
        return found[0], horizon_shift(found[0], found[1]) if len(found) == 2 else None

    def _inputs(self, base: str) -> Inputs:
        """The search's images, prompts and references, on a base."""
        from hpo.study import Inputs

        source = self.done.source
        data = Path(source.best.config.train_data_dir)
        words = self.facts.get("inputs") or {}
        try:
            prompts = tomllib.loads(source.folder.prompts.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MachineError(f"{source.folder.prompts} cannot be read: {error}", "restore it") from None
        references = {Path(path).resolve().parent for path in self.facts.get("references", ())}
        outside = [path for path in references if not path.is_relative_to(data.resolve())]
        return Inputs(
            base,
            data,
            clip=words.get("clip"),
            prompts=source.folder.prompts,
            references=outside[0] if outside else None,
            trigger=prompts.get("trigger"),
            class_word=prompts.get("class"),
            device=self.request.device,
        )

    def _provenance(self) -> dict[str, str]:
        source = self.done.source
        return {
            SOURCE_STUDY: source.folder.name,
            "source_trial": str(source.best.number),
            "mapping_version": MAPPING_VERSION,
            "transferred": identity(self.done),
        }

    # What it came to

    def _values(self, decision: Decision, target: ProbeSide) -> dict[str, Any]:
        """The settings of the whole run that the decision changes."""
        if decision.keeps:
            return {}
        own, probe = self.done.plan.config, decision.probe
        whole = own
        if probe.candidate == DEFAULT:
            whole = own.with_values(dict(self.done.profile.family.community_default))
        elif probe.candidate in self.others:
            whole = self._mapped(self.others[probe.candidate])
        elif probe.candidate == TEXT_ON:
            whole = self._text_encoders_on()
        factor = 2**probe.octaves
        values = {k: v for k, v in whole.as_dict().items() if k not in _NAMES and v != getattr(own, k)}
        if probe.octaves:
            values["learning_rate"] = two_digits(whole.effective_unet_lr * factor)
            if whole.trains_text_encoder:
                values["text_encoder_lr"] = two_digits(whole.effective_text_encoder_lr * factor)
        if not probe.text_encoder or not whole.trains_text_encoder:
            values |= {"text_encoder_lr": 0.0, "network_train_unet_only": True}
        return values

    def _lines(
        self,
        outcomes: Sequence[ProbeScore],
        twins: Sequence[ProbeScore],
        decision: Decision,
        shift: float | None,
    ) -> list[str]:
        lines = [f"probe {o.probe.role}: {o.score:.4f} ± {o.se:.4f}" for o in outcomes]
        lines.append(f"decision: {decision.reason}")
        if shift is not None:
            lines.append(
                f"short runs like a rate {shift:+.2f} octaves off whole ones (measured on the source)"
            )
        found = agree(outcomes, twins)
        lines.append(
            found.line()
            if found
            else "whether the source predicts the target is inconclusive: too few shared configurations have a score"
        )
        better = search_is_better(outcomes, found)
        if better:
            family = self.done.profile.family
            lines.append(
                f"{better}: a direct search is the better use of the night: hpo search --base {family.base}"
            )
        return lines


def in_order(probes: Sequence[Probe]) -> Callable[[list[ProbeScore]], Probe | None]:
    """A choice that was made before: one probe after the other."""
    return lambda known: next((p for p in probes if find(known, p) is None), None)


def agree(outcomes: Sequence[ProbeScore], twins: Sequence[ProbeScore]) -> Agreement | None:
    """Rank agreement over the probes that both sides have."""
    pairs = [(twin.score, o.score) for o in outcomes if (twin := find(twins, o.probe)) is not None]
    return agreement([a for a, _ in pairs], [b for _, b in pairs])


# One side's study


def run_side(
    folder: StudyFolder,
    side: ProbeSide,
    choose: Callable[[list[ProbeScore]], Probe | None],
    inputs: Inputs,
    provenance: Mapping[str, str],
    console: Console,
) -> list[ProbeScore]:
    """Probes until ``choose`` wants no more.  A probe that was killed goes on; one that failed stops the call."""
    from hpo.search import workbench
    from hpo.study import TOTAL, database_errors
    from hpo.terminal import Stop
    from hpo.terminal import live as report

    view = report.make_view(
        console, lambda suggested: side.study.space.settings(suggested, side.study.train), folder.name
    )
    with database_errors(folder), in_use(folder) as use, _alone(folder):
        bench = workbench.load(inputs, side.study, folder, view.say)
        facts = {**bench.facts(), **provenance}
        study = _open(bench, facts, use)
        bench.measure_anchors(view.say)
        use.begun = True
        study.set_user_attr(TOTAL, max(side.scope.budget, study.user_attrs.get(TOTAL, 0)))
        with Stop(view.on_ask) as stop:
            view.asked_to_stop = stop
            try:
                with view:
                    return _probe_by_probe(study, bench, side, choose, view)
            except Interrupted as error:
                raise Interrupted(error.message, "go on with the same command") from None


def _alone(folder: StudyFolder) -> Any:
    """No second process decides what is next."""
    lock = Lock(folder.locks / "probes.lock")
    if not lock.try_acquire():
        raise MachineError(f"process {holder(lock.path)} probes {folder.name} already", "wait for it")
    return _Held(lock)


@dataclass(frozen=True)
class _Held:
    lock: Lock

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _open(bench: Any, facts: Mapping[str, str], use: Any) -> optuna.Study:
    """The study of probes, created or found unchanged, with where its settings come from."""
    from hpo.search import write_definition
    from hpo.study import IDENTITY, begun_study, check_unchanged, create_study

    folder = bench.folder
    try:
        folder.artifacts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise machine_error(error, folder.artifacts) from error
    with folder.study_lock().held():
        use.made_study = begun_study(folder) is None
        study = create_study(folder, facts)
        check_unchanged(study.user_attrs[IDENTITY], facts, folder.name)
        for key in (SOURCE_STUDY, "source_trial", "mapping_version"):
            study.set_user_attr(key, facts[key])
        write_definition(bench, facts)
    return study


def _probe_by_probe(
    study: optuna.Study,
    bench: Any,
    side: ProbeSide,
    choose: Callable[[list[ProbeScore]], Probe | None],
    view: Any,
) -> list[ProbeScore]:
    from optuna.trial import TrialState

    from hpo.search import SearchLimits, quiet
    from hpo.study import BASELINE, ROLE

    probes: list[Probe] = []
    while True:
        outcomes = _outcomes(study, bench, side, probes, choose)
        probe = choose(outcomes)
        if probe is None:
            return outcomes
        probes.append(probe)
        proposal = side.proposal(probe)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
        if not waiting:
            role = BASELINE if probe == Probe() else probe.role
            with bench.folder.study_lock().held(), quiet():
                study.enqueue_trial(proposal, user_attrs={ROLE: role})
        view.say(f"probe {len(outcomes) + 1} of {side.scope.budget}: {probe.role}")
        complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
        make_worker(study, bench, SearchLimits(trials=complete + 1), view).run()


def _outcomes(
    study: optuna.Study,
    bench: Any,
    side: ProbeSide,
    known: list[Probe],
    choose: Callable[[list[ProbeScore]], Probe | None],
) -> list[ProbeScore]:
    """The finished probes in the order of the design, which asks for one after the other."""
    from optuna.trial import TrialState

    from hpo.study import by_prompt

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    found: list[ProbeScore] = []
    while (probe := choose(found)) is not None:
        trial = next((t for t in done if side.probe_of(t.params, [probe]) is not None), None)
        if trial is None or trial.value is None:
            break
        prompts = by_prompt(bench.folder.trial(trial.number).metrics, bench.anchors)
        found.append(ProbeScore(probe, trial.value, float(trial.user_attrs.get("se", 0.0)), prompts))
    return found


def make_worker(study: optuna.Study, bench: Any, limits: Any, view: Any) -> Any:
    """A worker of the search that proposes nothing of its own: what fails stops the call."""
    from hpo.search import Search
    from hpo.study import FAILED, Result

    class ProbeWorker(Search):
        def _after(self, result: Result) -> None:
            if result.state == FAILED:
                raise StudyStopped(
                    f"a probe failed ({result.reason}): {result.message}",
                    f"see {self.folder.trial(result.number).log}; the same command tries it again",
                )

    return ProbeWorker(study, bench, limits, view)
