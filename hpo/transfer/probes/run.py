"""Runs probes in separate studies: NAME__FAMILY on the target; for short runs, NAME__FAMILY-source for the same there.

Owns the names and the order of these studies, and which design they have.  Does not own the choice of probes and the
evaluation of their scores (``hpo.transfer.probes.guided``, ``hpo.transfer.probes.design``) or a single study
(``hpo.transfer.probes.study``).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from evaluation.prompts import STYLE
from hpo.study import (
    CHARACTER,
    NEUTRAL_SETTINGS,
    SOURCE_STUDY,
    STYLE_PRESET,
    Inputs,
    StudyFolder,
    build_study,
    counting_settings,
    read_json,
)
from hpo.terminal import command, say
from hpo.transfer import MAPPING_VERSION, PROBED_VERSION
from hpo.transfer.probes.candidates import NAMES, Candidates
from hpo.transfer.probes.design import DESIGNS, LADDER, Probe, ProbeScore, find, horizon_shift
from hpo.transfer.probes.findings import Findings, Found, read_saved, write_saved
from hpo.transfer.probes.guided import MODEL, Guide
from hpo.transfer.probes.prior import FEWEST, Prior, read_trials
from hpo.transfer.probes.side import FRACTION, ProbeSide, ShortRuns, make_side, octave_bounds
from hpo.transfer.probes.study import SideStudy
from trainer.bases import is_miniature
from trainer.config import TrainConfig
from trainer.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from hpo.transfer import Transfer, TransferRequest, TransferSource
    from hpo.transfer.probes.proposals import Choose

DESIGN = "design"  # a fact of target trials whose design is not one of short runs
LEAST = 3  # with fewer probes, no decision is possible
# How a probe is computed, and what its files are called; but the seed and the images decide its result.
WITHOUT_INFLUENCE = {*NAMES, *NEUTRAL_SETTINGS} - {"seed", "dataset_config", "hold_out_references"}


def consult(done: Transfer, request: TransferRequest, console: Console) -> Found | None:
    """Run the requested probes, or return the result of earlier ones for the same settings.

    Returns None if there are neither.
    """
    folder = probe_folder(done, request.design)
    saved = read_saved(folder.root)
    design = request.design or (saved.design if saved else begun_design(folder))
    if saved is not None and (not request.trials or (saved.design, saved.probes) == (design, request.trials)):
        say(console, f"using {saved.finished} finished target trials of study {folder.name}")
        return saved.found
    if not request.trials:
        return None
    if request.trials < LEAST:
        raise ConfigError(
            f"{request.trials} target trials are too few for a decision",
            f"use --trials {LEAST} or more (6 is usual)",
        )
    if design is None:
        design, why = usual_design(done.source)
        if why:
            say(console, f"the trials are chosen by --design {design}: {why}")
    return Probing(done, request, folder, design, console).run()


def begun_design(folder: StudyFolder) -> str | None:
    """The design of target trials that were begun, None if there are none.  Before the design ``model``, the ladder was
    the default and was not stored."""
    facts = (read_json(folder.facts) or {}).get("facts")
    return None if facts is None else str(facts.get(DESIGN, LADDER))


def usual_design(source: TransferSource) -> tuple[str, str]:
    """The design of new target trials, and why it is not ``model``."""
    if not sections_of(source.folder):
        return LADDER, f"{source.folder.name} was begun by an earlier version, without a stored search space"
    count = len(read_trials(source.folder))
    if count < FEWEST:
        return LADDER, f"{source.folder.name} has {count} scored trials, a model of the search needs {FEWEST}"
    return MODEL, ""


def sections_of(folder: StudyFolder) -> Mapping[str, Mapping[str, Any]]:
    """The stored definition of a study; empty if it has none."""
    sections = (read_json(folder.facts) or {}).get("sections")
    return sections if isinstance(sections, dict) and isinstance(sections.get("study"), dict) else {}


def identity(done: Transfer) -> str:
    """Hash of the settings that probes belong to.  A different best trial, profile or preset needs new probes.

    Settings with their default value are left out, so that a later version with more settings finds its probes.
    """
    usual = TrainConfig().as_dict()
    values = done.plan.config.as_dict()
    return _hash({k: v for k, v in values.items() if k not in WITHOUT_INFLUENCE and v != usual[k]})


def identities(done: Transfer) -> tuple[str, str]:
    """The identity, and its former form: with all settings but the names of files and those for saving."""
    settings = counting_settings(done.plan.config.as_dict())
    return identity(done), _hash({k: v for k, v in settings.items() if k not in NAMES})


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([PROBED_VERSION, settings], sort_keys=True).encode()).hexdigest()[:16]


def probe_folder(done: Transfer, design: str | None = None) -> StudyFolder:
    """The folder NAME__FAMILY, or NAME__FAMILY-2 and so on if that one holds probes of other settings.

    ``design``: if it is given, the probes must be of its kind: the runs of ``model`` are whole ones.
    """
    root = done.source.folder.root
    own = identities(done)
    for number in range(1, 1000):
        ending = "" if number == 1 else f"-{number}"
        folder = StudyFolder(root.with_name(f"{root.name}__{done.profile.family.name}{ending}"))
        facts = (read_json(folder.facts) or {}).get("facts")
        if facts is None and not folder.has_study:
            return folder
        if facts is None or facts.get("transferred") not in own:
            continue
        if design is None or (design == MODEL) == (facts.get(DESIGN) == MODEL):
            return folder
    raise MachineError(f"{root.name} has 999 studies of target trials", "move or delete some of them")


class Probing:
    """One call: the probes on the target, the same probes on the source, and the decision."""

    def __init__(
        self, done: Transfer, request: TransferRequest, folder: StudyFolder, design: str, console: Console
    ) -> None:
        self.done, self.request, self.folder, self.console = done, request, folder, console
        self.design_name = design
        self.facts: Mapping[str, Any] = read_json(done.source.folder.facts) or {}
        self.candidates = Candidates(done, request.preset)

    def run(self) -> Found:
        return self._guided() if self.design_name == MODEL else self._short_runs()

    def _guided(self) -> Found:
        """Whole runs on the target, chosen by a model of the search."""
        source, base = self.done.source, self.done.profile.family.base
        sections = sections_of(source.folder)
        if not sections:
            raise ConfigError(
                f"study {source.folder.name} was begun by an earlier version and has no stored search space",
                "use --design ladder",
            )
        study = build_study(source.folder.name, sections)
        prior = Prior.read(study, self.folder.root) or Prior.of(study, source.folder)
        name, budget = self.folder.name, self.request.trials
        guide = Guide(self.candidates, prior, self.folder.root, self._runs(name), name, budget)
        outcomes = self._probed(self.folder, guide.side, guide.choose, base)
        decision = guide.decide(outcomes)
        lines = guide.lines(outcomes, decision, self._direct_search(base))
        evidence = guide.evidence if not decision.keeps else ""
        found = Found(guide.changed(decision), decision.reason, tuple(lines), evidence)
        findings = Findings(outcomes, guide.predicted(outcomes), None, decision)
        write_saved(self.folder.root, MODEL, budget, findings, found, fraction=1.0)
        return found

    def _short_runs(self) -> Found:
        target, base = self._target(), self.done.profile.family.base
        design = DESIGNS[self.design_name]
        outcomes = self._probed(self.folder, target, lambda found: design.next(found, target.scope), base)
        twins, shift = self._twins([o.probe for o in outcomes])
        findings = Findings(outcomes, twins, shift, design.decide(outcomes, target.scope, shift))
        found = Found(
            self.candidates.changed(findings.decision),
            findings.decision.reason,
            tuple(findings.lines(self._direct_search(base))),
        )
        write_saved(self.folder.root, self.design_name, self.request.trials, findings, found)
        return found

    def _direct_search(self, base: str) -> str:
        """The command of a search for the same images on the target base."""
        words = self.facts.get("inputs") or {}
        preset = self._definition(self.folder.root).get("study", {}).get("preset", CHARACTER)
        flags = {
            "--trigger": words.get("trigger"),
            "--class": words.get("class_word"),
            "--clip": words.get("clip"),
            "--preset": None if preset == CHARACTER else preset,
        }
        given = [word for name, value in flags.items() if value for word in (name, str(value))]
        data = Path(self.done.source.best.config.train_data_dir)
        return command("hpo", "search", "--base", base, "--data", data, *given)

    # Target and source

    def _target(self) -> ProbeSide:
        own, whole = self.done.plan.config, self.candidates.on_target()
        side = self._side(self.folder.name, whole, octave_bounds(own, self.done.profile.limits), FRACTION)
        for name in whole.keys() - side.short.keys():
            say(
                self.console,
                f"candidate {name} is skipped: it equals the transferred settings, or cannot be part of the same study",
            )
        return side

    def _twins(self, probes: list[Probe]) -> tuple[list[ProbeScore], float | None]:
        """The same probes on the source base, for the rank agreement.  The grid also needs them as whole runs."""
        whole = self.candidates.on_source()
        endings = {"source": FRACTION} | ({"source-whole": 1.0} if self.design_name == "grid" else {})
        found: list[list[ProbeScore]] = []
        for ending, fraction in endings.items():
            folder = StudyFolder(self.folder.root.with_name(f"{self.folder.name}-{ending}"))
            side = self._side(folder.name, whole, (-8.0, 8.0), fraction)
            known = in_order([p for p in probes if p.candidate in side.short])
            found.append(self._probed(folder, side, known, self.done.source.base))
        return found[0], horizon_shift(found[0], found[1]) if len(found) == 2 else None

    def _side(
        self, name: str, whole: Mapping[str, TrainConfig], bounds: tuple[float, float], fraction: float
    ) -> ProbeSide:
        return make_side(name, whole, self._runs(name, fraction), self.request.trials, bounds)

    def _runs(self, name: str, fraction: float = 1.0) -> ShortRuns:
        """How the trials of the study of this name are trained and scored."""
        words = "miniature" if is_miniature(self.done.profile.family.base) else "natural"
        sections = self._definition(self.folder.root.with_name(name))
        preset = str(sections.get("study", {}).get("preset", CHARACTER))
        return ShortRuns(
            samples=self.done.plan.figures.samples,
            sampling=self.facts.get("sampling", {}),
            seed=self.done.plan.config.seed,
            words=f"{words}{STYLE}" if preset == STYLE_PRESET else words,
            fraction=fraction,
            preset=preset,
            judged=judged_as(sections),
        )

    def _definition(self, root: Path) -> Mapping[str, Mapping[str, Any]]:
        """The sections of the search; probes that were begun keep those that they were begun with."""
        for facts in (read_json(StudyFolder(root).facts), self.facts):
            sections = facts.get("sections") if facts else None
            if isinstance(sections, dict) and isinstance(sections.get("study"), dict):
                return sections
        return {}

    def _probed(self, folder: StudyFolder, side: ProbeSide, choose: Choose, base: str) -> list[ProbeScore]:
        study = SideStudy(folder, side, self._inputs(base), self.provenance(folder))
        return study.run(choose, self.console)

    def _inputs(self, base: str) -> Inputs:
        """The images, prompts and references of the search, for the given base."""
        source = self.done.source
        data = Path(source.best.config.train_data_dir)
        words = self.facts.get("inputs") or {}
        try:
            prompts = tomllib.loads(source.folder.prompts.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MachineError(f"cannot read {source.folder.prompts}: {error}", "restore the file") from None
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

    def provenance(self, folder: StudyFolder) -> dict[str, str]:
        """What must not change during the study; one that was begun by an earlier version keeps its own facts."""
        source = self.done.source
        now = {
            SOURCE_STUDY: source.folder.name,
            "source_trial": str(source.best.number),
            "mapping_version": MAPPING_VERSION,
            "transferred": identity(self.done),
        }
        if self.design_name == MODEL:
            now[DESIGN] = MODEL
        begun = (read_json(folder.facts) or {}).get("facts") or {}
        if begun.get("transferred") in identities(self.done):
            now |= {key: begun[key] for key in ("mapping_version", "transferred") if key in begun}
        return now


def judged_as(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The parts of a definition that decide how images are scored, and which trials are infeasible."""
    study = {key: value for key, value in sections.get("study", {}).items() if key in ("clip", "likeness")}
    parts = {"study": study, **{name: dict(sections.get(name, {})) for name in ("score", "limits")}}
    return {name: values for name, values in parts.items() if values}


def in_order(probes: Sequence[Probe]) -> Choose:
    """A ``Choose`` function that returns the given probes one after the other."""
    return lambda known: next((p for p in probes if find(known, p) is None), None)
