"""StudyConfig: the definition of a study, read from a TOML file and checked before anything is loaded.

Owns the combination of the sections and the search for study files.  Does not own the effect of ``--set``
(``hpo.study.overrides``), parameters (``hpo.study.space.space``), paths and storage (``hpo.study.folder``)
or running trials (``hpo.search.worker``).
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.score import SIGNED, Formula, SafeguardLimits
from hpo.study.keeping import keep_as_begun
from hpo.study.overrides import override, shadows
from hpo.study.presets import CHARACTER, Sections, default_study, keep_wording, use_preset, word_style
from hpo.study.sections import (
    BELOW_ZERO,
    PRESETS,
    PromptSection,
    SamplingSection,
    ScorePreset,
    SearchSection,
    StudySection,
)
from hpo.study.space.file import read_space
from hpo.study.space.space import BASELINE, ELSEWHERE, Space, baseline_name, settings_of, unset_by
from hpo.study.thresholds import SECTION as HEALTH
from hpo.study.thresholds import Thresholds, read_thresholds
from trainer import checks
from trainer.bases import KNOWN_BASES, is_miniature
from trainer.checks import check_known, check_whole, read, suggestion
from trainer.config import SETTINGS, TrainConfig, check_name
from trainer.errors import ConfigError
from trainer.files import safe_name
from trainer.overrides import unset
from trainer.reading import MAX_SETTINGS_BYTES, read_small
from trainer.text import clean_text

DEFAULT_STUDY = "sd15-character"
SHIPPED = Path(__file__).parent.parent.parent / "studies"
Say = Callable[[str], None]  # prints one line for the user
NEUTRAL_SETTINGS = (*ELSEWHERE, "gradient_checkpointing", "cache_latents_to_disk", "vae_batch_size")


@dataclass(frozen=True)
class Inputs:
    """The data and models given on the command line."""

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
    """A checked study definition.  ``baseline`` is trial 0 as a proposal in ``space``.  ``sections`` are the
    tables it was built from, including ``--set``; ``build_study`` builds the same definition from them."""

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
    search: SearchSection = field(default_factory=SearchSection)
    health: Thresholds = field(default_factory=Thresholds)
    sections: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def preset(self) -> ScorePreset:
        return PRESETS[self.study.preset]

    @property
    def objectives(self) -> tuple[str, ...]:
        """The values that Optuna maximizes."""
        return self.study.objectives

    def config(self, suggested: Mapping[str, Any]) -> TrainConfig:
        """The training configuration of a proposal."""
        return self.space.config(suggested, self.train)

    def sample_values(self) -> dict[str, Any]:
        """Values for ``evaluation.images.settings.SampleConfig``, without those that default to the base's."""
        values = {k: v for k, v in dataclasses.asdict(self.sampling).items() if v is not None}
        size = {"width_px": self.train.resolution, "height_px": self.train.resolution}
        return {**size, **values, "clip_skip": self.train.clip_skip}

    def frozen(self) -> dict[str, str]:
        """The parts of the definition that must not change during the study: name → value as text."""
        facts = {f"[space] {name}": text for name, text in self.space.describe().items()}
        decided = {n for p in self.space for n in (*settings_of(p.name), *unset_by(p.name))}
        for name, value in self.train.as_dict().items():
            if name not in NEUTRAL_SETTINGS and name not in decided:
                facts[f"[train] {name}"] = str(value)
        if self.score.signed:
            facts[BELOW_ZERO] = self.score.below_zero
        return facts


def read_study(
    path: Path,
    *,
    sets: Iterable[str] = (),
    seed: int | None = None,
    preset: str | None = None,
    before: Mapping[str, Any] | None = None,
) -> StudyConfig:
    """Read a TOML file, apply ``--preset`` and ``--set``, and check the definition including all range limits.

    ``before``: the stored sections of this study if it was begun; it keeps the wording of its prompts and, where the
    file is a shipped one, a length in epochs.

    A file without ``[search] rate`` defines a study with ``balanced``; one begun before that existed keeps ``plain``.
    A file without ``[score] below_zero`` defines a study that is told signed values; in the stored definition of a
    begun study (``build_study``) the missing key means clipped ones.
    """
    try:
        table = tomllib.loads(read_small(path, MAX_SETTINGS_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the study file {path}: {error.strerror}", "check the path") from None
    except (ValueError, RecursionError) as error:  # invalid TOML or UTF-8, huge numbers, deep nesting
        raise ConfigError(
            f"{path} is not valid TOML: {clean_text(str(error))}", "fix the syntax at that position"
        ) from None
    if isinstance(score := table.setdefault("score", {}), dict):
        score.setdefault("below_zero", SIGNED)
    if isinstance(search := table.setdefault("search", {}), dict):
        search.setdefault(
            "rate", "balanced" if before is None else before.get("search", {}).get("rate", "plain")
        )
    try:
        sections = _sections(table)
        if preset is not None:
            use_preset(sections, preset)
        if before is not None:
            keep_as_begun(sections, before, shipped=path.resolve().parent == SHIPPED.resolve())
        override(sections, sets)
        word_style(sections)
        if before is not None:
            keep_wording(sections, before)
        return _built(path.stem, sections, seed)
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error.message}", error.hint) from None


SECTIONS = (
    "study", "train", "space", "baseline", "search", "prompts", "confirmation", "sampling", "score", "limits",
    HEALTH,
)  # fmt: skip


def build_study(
    name: str, table: Mapping[str, Any], *, sets: Iterable[str] = (), seed: int | None = None
) -> StudyConfig:
    """Build a definition from stored sections, word for word, with ``--set`` values."""
    sections = _sections(table)
    override(sections, sets)
    return _built(name, sections, seed)


def _sections(table: Mapping[str, Any]) -> Sections:
    for section in table:
        check_known(section, SECTIONS, "section", "the study file")
    check_whole(table, "the study file")
    return {name: dict(checks.section(table.get(name, {}), name)) for name in SECTIONS}


def _built(name: str, sections: Sections, seed: int | None) -> StudyConfig:
    if seed is not None:
        sections["study"]["seed"] = seed
    if not sections["space"]:
        raise ConfigError("[space] is empty", "search at least one setting, for example learning_rate")
    study = read(StudySection, sections["study"], "study")
    space = read_space(sections["space"])
    train = _train(sections["train"], space).with_values({"seed": study.seed})
    baseline = _baseline(sections["baseline"], space, train)
    space.check_edges(train, baseline)
    search = read(SearchSection, sections["search"], "search")
    if search.sampler == "cmaes" and len(study.objectives) > 1:
        raise ConfigError(
            "the sampler cmaes can search for one objective only, but this study has two",
            "use the sampler tpe, gp or random",
        )
    if search.pruner != "none" and len(study.objectives) > 1:
        raise ConfigError(
            f"the pruner {search.pruner} needs one objective, but this study has two",
            'remove it, or use objectives = ["score"]',
        )
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
        search,
        read_thresholds(sections[HEALTH]),
        sections=sections,
    )


def _train(body: Mapping[str, Any], space: Space) -> TrainConfig:
    decided = {setting: p.name for p in space for setting in settings_of(p.name)}
    for name in body:
        check_name(name)
        if name in ELSEWHERE:
            raise ConfigError(f"{name} does not belong in [train]", f"it is set by {ELSEWHERE[name]}")
        if name in decided:
            raise ConfigError(
                f"{name} is fixed in [train] and searched by {decided[name]}", "remove one of the two"
            )
    for name, setting in shadows(body, decided, {p.name for p in space}):
        if setting in decided or (setting in body and setting in unset_by(name)):
            where = "[train]" if name in body else "[space]"
            raise ConfigError(
                f"with {name} in {where}, {decided.get(setting, setting)} has no effect",
                "remove one of the two",
            )
    return TrainConfig().with_values({name: unset(name, value) for name, value in body.items()})


def _baseline(body: Mapping[str, Any], space: Space, train: TrainConfig) -> dict[str, Any]:
    """[baseline], which uses kohya's settings, as a proposal."""
    decided = {setting for p in space for setting in settings_of(p.name)}
    own = {p.name for p in space if baseline_name(p.name) == p.name and p.name not in decided}
    values, given = {}, {}
    for name, value in body.items():
        if name in own:
            given[name] = int(value) if isinstance(value, float) and value.is_integer() else value
            continue
        check_name(name)
        for p in space:
            if p.name in own and name in (*settings_of(p.name), *unset_by(p.name)):
                raise ConfigError(
                    f"{name} in [baseline] would mean another length for each batch size or folder; the study "
                    f"searches {p.name}",
                    f"write {p.name} = {p.domain.edges[0]} or more instead (--set baseline.{p.name}=…)",
                )
        if name not in decided:
            raise ConfigError(f"{name} in [baseline] is not searched", "move it to [train]")
        values[name] = unset(name, value)
    complete = train.with_values(values).as_dict()
    # Inactive parameters are recorded with their lower limit.
    found = space.proposal(complete, {p.name: p.domain.edges[0] for p in space})
    return space.check({**found, **given}, BASELINE)


def find_study(spec: str | None, base: str, preset: str = CHARACTER) -> Path:
    """Find the file for ``--definition``, a path or a name; if None, the default for base and preset.  The current
    folder takes precedence over shipped files, but a file that has the name of a shipped study by chance (settings of
    hpo train, say) is never the default: it has none of the sections of a study."""
    is_default = spec is None
    if spec is None:
        usual = (base in KNOWN_BASES and KNOWN_BASES[base].study) or DEFAULT_STUDY
        spec = default_study(usual, preset, SHIPPED)
    path = Path(spec)
    if path.suffix == ".toml" and path.is_file() and not is_default:
        return path
    name = path.name.removesuffix(".toml")
    shipped = {p.name: p for p in SHIPPED.glob("*.toml")}
    if path.parent == Path("."):
        here = Path(f"{name}.toml")
        if here.is_file() and (not is_default or _has_section(here)):
            return here
        for found in (Path("studies") / here, shipped.get(here.name)):
            if found is not None and found.is_file():
                return found
    if path.is_file():
        raise ConfigError(f"{spec} is not a .toml file", "use a study file, or the name of a shipped study")
    known = sorted(n.removesuffix(".toml") for n in shipped)
    raise ConfigError(
        f"no study file {spec}", suggestion(name, known) or "shipped studies: " + ", ".join(known)
    )


def _has_section(path: Path) -> bool:
    """Whether a file has a section of a study file. Its mistakes are for its reader."""
    try:
        text = read_small(path, MAX_SETTINGS_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return False
    return re.search(rf"^\s*\[({'|'.join(SECTIONS)})[\].]", text, re.MULTILINE) is not None


def study_name(
    given: str | None, definition: str, base: str, data: Path | None, preset: str = CHARACTER
) -> str:
    """The name of the study folder: NAME, or a name derived from the command, so that repeating it resumes.

    ``preset`` chooses the demo images if there is no ``data``.
    """
    if given is not None:
        return safe_name(given, "study name")
    parts = [base] if is_miniature(base) else []
    if not parts or definition != KNOWN_BASES[base].study:
        parts.append(definition)
    if data is not None:
        parts.append(data.resolve().name)
    elif preset != CHARACTER:
        parts.append(preset)
    slug = "".join(c if c.isascii() and c.isalnum() else "-" for c in "-".join(parts).lower())
    return safe_name("-".join(filter(None, slug.split("-")))[:64].rstrip("-"), "study name")


assert SETTINGS.keys() >= set(NEUTRAL_SETTINGS)
