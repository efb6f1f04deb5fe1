"""StudyConfig: what a study is, read from a TOML file and checked before anything is loaded.

Owns what the sections mean together, and where study files are found.  Does not own what ``--set`` does to
them (``hpo.study.overrides``), parameters (``hpo.study.space.space``), paths and storage
(``hpo.study.folder``) or the work (``hpo.search.worker``).
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.score import Formula, SafeguardLimits
from hpo.study.overrides import override, shadows
from hpo.study.sections import PRESETS, PromptSection, SamplingSection, ScorePreset, StudySection
from hpo.study.space.file import read_space
from hpo.study.space.space import BASELINE, ELSEWHERE, Space, settings_of
from trainer import checks
from trainer.bases import KNOWN_BASES, is_miniature
from trainer.checks import check_known, check_whole, read, suggestion
from trainer.config import SETTINGS, TrainConfig, check_name
from trainer.errors import ConfigError
from trainer.files import safe_name
from trainer.overrides import unset
from trainer.text import clean_text

DEFAULT_STUDY = "sd15-character"
SHIPPED = Path(__file__).parent.parent.parent / "studies"
NEUTRAL_SETTINGS = (*ELSEWHERE, "gradient_checkpointing", "cache_latents_to_disk", "vae_batch_size")


@dataclass(frozen=True)
class Inputs:
    """What the command line says about data and models."""

    base: str
    data: Path | None = None
    clip: str | None = None
    prompts: Path | None = None
    references: Path | None = None
    trigger: str | None = None
    class_word: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class StudyConfig:
    """A checked study definition.  ``baseline`` is trial 0 as a proposal of ``space``; ``sections`` are what
    it was built from, ``--set`` included: ``build_study`` makes the same of them again."""

    name: str
    study: StudySection
    train: TrainConfig
    space: Space
    baseline: Mapping[str, Any]
    prompts: PromptSection
    confirmation: PromptSection
    sampling: SamplingSection
    score: Formula = field(default_factory=Formula)
    limits: SafeguardLimits = field(default_factory=SafeguardLimits)
    sections: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def preset(self) -> ScorePreset:
        return PRESETS[self.study.preset]

    @property
    def objectives(self) -> tuple[str, ...]:
        """What Optuna maximizes."""
        return self.study.objectives

    def config(self, suggested: Mapping[str, Any]) -> TrainConfig:
        """The training configuration of a proposal."""
        return self.space.config(suggested, self.train)

    def sample_values(self) -> dict[str, Any]:
        """Values for ``evaluation.images.settings.SampleConfig``, less those that are left to the base."""
        values = {k: v for k, v in dataclasses.asdict(self.sampling).items() if v is not None}
        size = {"width_px": self.train.resolution, "height_px": self.train.resolution}
        return {**size, **values, "clip_skip": self.train.clip_skip}

    def frozen(self) -> dict[str, str]:
        """What of the definition must stay as it is while the study goes on: name → value in words."""
        facts = {f"[space] {name}": text for name, text in self.space.describe().items()}
        decided = {setting for p in self.space for setting in settings_of(p.name)}
        for name, value in self.train.as_dict().items():
            if name not in NEUTRAL_SETTINGS and name not in decided:
                facts[f"[train] {name}"] = str(value)
        return facts


def read_study(path: Path, *, sets: Iterable[str] = (), seed: int | None = None) -> StudyConfig:
    """The definition in a TOML file with ``--set`` values put in, checked to its last edge."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the study file {path}: {error.strerror}", "check the path") from None
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of endless digits or brackets
        raise ConfigError(
            f"{path} is not valid TOML: {clean_text(str(error))}", "correct that place"
        ) from None
    try:
        return build_study(path.stem, table, sets=sets, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error.message}", error.hint) from None


SECTIONS = (
    "study", "train", "space", "baseline", "prompts", "confirmation", "sampling", "score", "limits"
)  # fmt: skip


def build_study(
    name: str, table: Mapping[str, Any], *, sets: Iterable[str] = (), seed: int | None = None
) -> StudyConfig:
    """A definition from the file's content."""
    for section in table:
        check_known(section, SECTIONS, "section", "the study file")
    check_whole(table, "the study file")
    sections: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        sections[section] = dict(checks.section(table.get(section, {}), section))
    override(sections, sets)
    if seed is not None:
        sections["study"]["seed"] = seed
    if not sections["space"]:
        raise ConfigError("[space] is empty", "search at least one setting, for example learning_rate")
    study = read(StudySection, sections["study"], "study")
    space = read_space(sections["space"])
    train = _train(sections["train"], space).with_values({"seed": study.seed})
    baseline = _baseline(sections["baseline"], space, train)
    space.check_edges(train, baseline)
    return StudyConfig(
        name,
        study,
        train,
        space,
        baseline,
        read(PromptSection, sections["prompts"], "prompts"),
        read(PromptSection, sections["confirmation"], "confirmation"),
        read(SamplingSection, sections["sampling"], "sampling"),
        read(Formula, sections["score"], "score"),
        read(SafeguardLimits, sections["limits"], "limits"),
        sections=sections,
    )


def _train(body: Mapping[str, Any], space: Space) -> TrainConfig:
    decided = {setting: p.name for p in space for setting in settings_of(p.name)}
    for name in body:
        check_name(name)
        if name in ELSEWHERE:
            raise ConfigError(f"{name} does not belong in [train]", f"it is decided by {ELSEWHERE[name]}")
        if name in decided:
            raise ConfigError(
                f"{name} is fixed in [train] and searched by {decided[name]}", "keep one of the two"
            )
    for name, setting in shadows(body, decided):
        if setting in decided:
            where = "[train]" if name in body else "[space]"
            raise ConfigError(
                f"{name} in {where} leaves {decided[setting]} without effect", "keep one of the two"
            )
    return TrainConfig().with_values({name: unset(name, value) for name, value in body.items()})


def _baseline(body: Mapping[str, Any], space: Space, train: TrainConfig) -> dict[str, Any]:
    """[baseline], written in kohya's settings, as a proposal."""
    decided = {setting for p in space for setting in settings_of(p.name)}
    values = {}
    for name, value in body.items():
        check_name(name)
        if name not in decided:
            raise ConfigError(f"{name} in [baseline] is not searched", "fixed settings belong in [train]")
        values[name] = unset(name, value)
    complete = train.with_values(values).as_dict()
    # An inactive parameter is recorded too, with its lower edge.
    return space.check(space.proposal(complete, {p.name: p.domain.edges[0] for p in space}), BASELINE)


def find_study(spec: str | None, base: str) -> Path:
    """The study file of ``--study``, a path or a name.  The current folder wins over what is shipped."""
    if spec is None:
        spec = (base in KNOWN_BASES and KNOWN_BASES[base].study) or DEFAULT_STUDY
    path = Path(spec)
    if path.suffix == ".toml" and path.is_file():
        return path
    name = path.name.removesuffix(".toml")
    shipped = {p.name: p for p in SHIPPED.glob("*.toml")}
    if path.parent == Path("."):
        local = Path("studies") / f"{name}.toml"
        for found in (Path(f"{name}.toml"), local, shipped.get(f"{name}.toml")):
            if found is not None and found.is_file():
                return found
    if path.is_file():
        raise ConfigError(f"{spec} is not a .toml file", "give a study file, or the name of a shipped study")
    known = sorted(n.removesuffix(".toml") for n in shipped)
    raise ConfigError(f"no study file {spec}", suggestion(name, known) or "shipped: " + ", ".join(known))


def study_name(given: str | None, definition: str, base: str, data: Path | None) -> str:
    """The folder's name under runs/: ``--name``, or one that the same command finds again."""
    if given is not None:
        return safe_name(given, "study name")
    parts = [base] if is_miniature(base) else []
    if not parts or definition != KNOWN_BASES[base].study:
        parts.append(definition)
    if data is not None:
        parts.append(data.resolve().name)
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in "-".join(parts).lower())
    return safe_name("-".join(filter(None, slug.split("-")))[:64].rstrip("-"), "study name")


assert SETTINGS.keys() >= set(NEUTRAL_SETTINGS)
