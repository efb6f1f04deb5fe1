"""--fork-from STUDY: a new study takes over the finished trials of another one whose space differs.

Owns which trials fit (their settings can be proposed in the new space, and give the same training), and their copy:
the trial's folder, its place in the new study with the new space's distributions, and where it came from.  Does not
own the facts that must be equal (``hpo.study.unchanged``) or what is stored with a finished trial
(``hpo.search.telling``).

Files are linked, not copied, where the file system can: a LoRA file takes its space once.  A trial is added as RUNNING
and told like any other, so a kill between the two leaves what every kill leaves: its result is found on disk.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search.claim import quiet
from hpo.search.telling import Teller
from hpo.search.trial import is_equal
from hpo.study import (
    BASELINE,
    FORK,
    FORKED_FROM,
    IDENTITY,
    NEUTRAL_SETTINGS,
    ROLE,
    ClaimLost,
    Ownership,
    Result,
    Say,
    StudyConfig,
    StudyFolder,
    TrialFolder,
    as_begun,
    begun_study,
    check_forkable,
    config_sha256,
    database_errors,
    find_folder,
    open_study,
    ownership_of,
    parent_of,
    read_json,
    read_result,
    searched_settings,
    take_up,
    write_params,
    write_result,
)
from trainer.config import SETTINGS, TrainConfig
from trainer.errors import ConfigError
from trainer.files import machine_error, make_folder, write_atomic
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.search.workbench import Workbench

SAID = 3  # reasons that are named
# Files of a trial.  params.json and result.json are written anew.  A file that lines are added to is copied.
COPIED, LINKED = ("steps", "log", "metrics"), ("lora", "grid")


def source_of(name: str, folder: StudyFolder) -> StudyFolder | None:
    """The study of ``--fork-from``, beside ``folder`` unless a path is given.  None if all of it was taken over before:
    then it need not be there any more.  Raises ConfigError."""
    known = _forked(folder)
    if known.get("finished") and known.get("study") == Path(name).name:
        return None
    source = find_folder(name, folder.root.parent)
    if source.root.resolve() == folder.root.resolve():
        raise ConfigError(
            f"--fork-from {source.name} needs a new study, and this command works on {source.name} itself",
            f"give the new study a name: hpo search {source.name}-2 … --fork-from {source.name}",
        )
    if parent := parent_of(source):
        raise ConfigError(
            f"study {source.name} is not a search: it belongs to study {parent}",
            f"use --fork-from {parent}",
        )
    return source


def as_source(config: StudyConfig, source: StudyFolder) -> StudyConfig:
    """The definition, told as in the source: values of two forms do not compare."""
    return as_begun(config, _identity(source))


def check_fork(source: StudyFolder, folder: StudyFolder, config: StudyConfig) -> None:
    """What can be refused before anything is loaded.  Raises ConfigError."""
    study = begun_study(folder)
    if study is not None and study.get_trials(deepcopy=False):
        before = _forked(folder).get("study")
        if before != source.name:
            raise ConfigError(
                f"study {folder.name} was already begun"
                + (f" with --fork-from {before}" if before else " without --fork-from"),
                "give the new study another name, or leave the option as it was",
            )
    known = {key: value for key, value in _identity(source).items() if key.startswith("[")}
    if known:
        check_forkable(known, config.frozen(), source.name)


def _forked(folder: StudyFolder) -> dict[str, Any]:
    study = begun_study(folder)
    return {} if study is None else dict(study.user_attrs.get(FORK, {}))


def _identity(source: StudyFolder) -> dict[str, str]:
    with database_errors(source):
        return dict(open_study(source).user_attrs.get(IDENTITY, {}))


@dataclass(frozen=True)
class Fitting:
    """A finished trial of the source, as a proposal of the new study."""

    trial: FrozenTrial
    proposal: Mapping[str, Any]
    result: Result
    files: TrialFolder


@dataclass(frozen=True)
class Fork:
    """The trials that a new study takes over.  ``left_out``: why others are not, and how many."""

    bench: Workbench
    source: StudyFolder
    fitting: tuple[Fitting, ...]
    left_out: Mapping[str, int]

    @classmethod
    def into(cls, bench: Workbench, source: StudyFolder) -> Fork:
        """Compare the two studies.  Raises ConfigError if scores do not compare, or if no trial fits."""
        check_forkable(_identity(source), bench.facts(), source.name)
        with database_errors(source):
            done = open_study(source).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        fitting: list[Fitting] = []
        reasons: Counter[str] = Counter()
        for trial in done:
            found = _fitting(bench.study, source, trial)
            if isinstance(found, str):
                reasons[found] += 1
            else:
                fitting.append(found)
        if done and not fitting:
            raise ConfigError(
                f"none of the {len(done)} finished trials of study {source.name} fits into the new space: "
                + _reasons(reasons),
                "widen the space, or leave out --fork-from",
            )
        return cls(bench, source, tuple(fitting), reasons)

    def take(self, study: optuna.Study, say: Say) -> None:
        """Add the trials that the study does not have yet.  Can be repeated after a kill, and by several workers.

        Call while the source's folder is shared (``hpo.study.read_from``).
        """
        shared = ownership_of(self.bench.folder)
        with shared.study(), quiet():
            if study.user_attrs.get(FORK, {}).get("finished"):
                return  # by another worker, just now
            study.set_user_attr(FORK, {"study": self.source.name, "finished": False})
            _link(self.source.base_images, self.bench.folder.base_images)  # the scale of the scores
        for fitting in self.fitting:
            with shared.study(), quiet():
                there = next((t for t in study.get_trials(deepcopy=False) if _is_from(t, fitting)), None)
                if there is None or there.state == TrialState.RUNNING:
                    try:
                        self._add(study, fitting, there, shared, say)
                    except ClaimLost as error:
                        say(f"{error}; this process takes over the next trial")
        study.set_user_attr(FORK, {"study": self.source.name, "finished": True})
        say(self.says)

    @property
    def says(self) -> str:
        count, all_ = len(self.fitting), len(self.fitting) + sum(self.left_out.values())
        text = f"took over {count} of {all_} finished trials of study {self.source.name}; they count toward --trials"
        if not self.left_out:
            return text
        verb = "does" if all_ - count == 1 else "do"
        return f"{text}. {all_ - count} {verb} not fit: {_reasons(self.left_out)}"

    def _add(
        self, study: optuna.Study, fitting: Fitting, there: FrozenTrial | None, shared: Ownership, say: Say
    ) -> None:
        bench, folder = self.bench, self.bench.folder
        if there is None:
            study.add_trial(self._running(fitting))
            there = study.get_trials(deepcopy=False)[-1]
        claim = shared.trial(there.number)
        if not claim.try_acquire():
            return  # another worker has adopted it after a kill: it tells what it found on disk, or trains it
        try:
            files = folder.trial(there.number)
            config = bench.config(fitting.proposal, there.number)
            make_folder(files.root)
            for name in (*COPIED, *LINKED):
                _link(getattr(fitting.files, name), getattr(files, name), copy=name in COPIED)
            _link(fitting.files.root / "samples", files.root / "samples")
            write_params(files, fitting.proposal, bench.study.space.inactive(fitting.proposal), config)
            result = dataclasses.replace(
                fitting.result,
                number=there.number,
                config_sha256=config_sha256(config),
                lora=files.lora.name if fitting.result.lora else "",
            )
            claim.check(certain=True)
            write_result(files, result)
            settings = searched_settings(bench.study, fitting.proposal)
            trial = take_up(study, there)
            Teller(study, folder, bench.study.objectives, say).tell(trial, result, settings, claim)
        finally:
            claim.release()

    def _running(self, fitting: Fitting) -> FrozenTrial:
        """The trial before it is told, with the distributions of the new space: TPE models the parameters that all
        trials have in common."""
        space, proposal = self.bench.study.space, fitting.proposal
        attributes: dict[str, Any] = {
            FORKED_FROM: {
                "study": self.source.name,
                "trial": fitting.trial.number,
                "finished": str(fitting.trial.datetime_complete),
            },
            "inactive": list(space.inactive(proposal)),
        }
        study = self.bench.study
        if _differing(study.config(proposal), study.config(study.baseline)) == "":
            attributes[ROLE] = BASELINE
        return optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(proposal),
            distributions=space.distributions(),
            user_attrs=attributes,
        )


def _fitting(config: StudyConfig, source: StudyFolder, trial: FrozenTrial) -> Fitting | str:
    """The trial as a proposal of ``config``; else why it does not fit, in a few words."""
    files = source.trial(trial.number)
    settings = (read_json(files.params) or {}).get("train")
    if not isinstance(settings, dict):
        return "its params.json is missing"
    was = TrainConfig().with_values({name: value for name, value in settings.items() if name in SETTINGS})
    result = read_result(files, was)
    if result is None:
        return "its result.json is missing or belongs to other settings"
    try:
        found = config.space.proposal(was.as_dict(), config.baseline)
    except ConfigError as error:
        return error.message
    # what was suggested is more exact than what is derived back; inactive parameters are only stored there
    for p in config.space:
        own = trial.params.get(p.name)
        if own is not None and p.domain.holds(own):
            found[p.name] = own
    for p in config.space:
        if found.get(p.name) is None or not p.domain.holds(found[p.name]):
            return f"{p.name} was outside {p.domain.describe()}"
    try:
        now = config.config(found)
    except ConfigError as error:
        return error.message
    if name := _differing(was, now):
        return f"{name} was not {clean_text(str(getattr(now, name)))}"
    return Fitting(trial, found, result, files)


def _differing(was: TrainConfig, now: TrainConfig) -> str:
    """A setting that differs and decides about the training; empty if there is none."""
    for name, before in was.as_dict().items():
        if name not in NEUTRAL_SETTINGS and not is_equal(before, getattr(now, name)):
            return name
    return ""


def _reasons(reasons: Mapping[str, int]) -> str:
    ranked = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{reason} ({count} trial{'s'[: count != 1]})" for reason, count in ranked[:SAID]]
    return "; ".join([*words, *(["…"] if len(ranked) > SAID else [])])


def _is_from(trial: FrozenTrial, fitting: Fitting) -> bool:
    return (trial.user_attrs.get(FORKED_FROM) or {}).get("trial") == fitting.trial.number


def _link(source: Path, target: Path, *, copy: bool = False) -> None:
    """A file, or the files of a folder, under another name, as links where that is possible.  Each is there as a whole
    or not at all.  What is there is kept; what is missing is left out.  Of a file that is only ever replaced, a link is
    as good as a copy."""
    try:
        if source.is_dir():
            for inner in sorted(source.iterdir()):
                _link(inner, target / inner.name, copy=copy)
        elif source.is_file() and not target.exists():
            make_folder(target.parent)
            if copy or not _is_linked(source, target):
                write_atomic(target, source.read_bytes())
    except OSError as error:
        raise machine_error(error, target) from error


def _is_linked(source: Path, target: Path) -> bool:
    """Link a file.  False if the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
