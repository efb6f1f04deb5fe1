"""StudyConfig: what a study is, read from a TOML file and checked before anything is loaded.

Owns the study file's sections, ``--set``, where study files are found, and the facts that must not change
while a study goes on.  Does not own parameters (``hpo.study.space``), paths and storage
(``hpo.study.folder``) or the work (``hpo.search.worker``).
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.study.sections import (
    PRESETS,
    LimitSection,
    PromptSection,
    SamplingSection,
    ScorePreset,
    ScoreSection,
    StudySection,
    check_keys,
    read_section,
)
from hpo.study.space import BASELINE, DERIVED, ZERO_IS_UNSET, Space, settings_of
from hpo.study.spacefile import read_space
from trainer.bases import KNOWN_BASES, is_miniature
from trainer.config import SETTINGS, WITHOUT_INFLUENCE, TrainConfig, check_name, suggestion
from trainer.errors import ConfigError
from trainer.files import safe_name
from trainer.text import clean_text

DEFAULT_STUDY = "sd15-character"
SHIPPED = Path(__file__).parent.parent.parent / "studies"
# Settings that a study decides elsewhere, and the ones that change no result: not frozen with a study.
ELSEWHERE = {
    "pretrained_model_name_or_path": "--base",
    "train_data_dir": "--data",
    "output_name": "the trial's number",
    "seed": "--seed",
    "dataset_config": "--data",
    "hold_out_references": "the search itself",
    **dict.fromkeys(sorted(WITHOUT_INFLUENCE), "the search itself"),
}
LARGEST_WHOLE = 2**63 - 1  # TOML's own limit; more has no float, or no text
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
    score: ScoreSection = field(default_factory=ScoreSection)
    limits: LimitSection = field(default_factory=LimitSection)
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
        """Values for ``evaluation.images.sampling.SampleConfig``, less those that are left to the base."""
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
    check_keys(table, SECTIONS, "the study file", "section")
    _check_whole(table, "the study file")
    sections: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        body = table.get(section, {})
        if not isinstance(body, Mapping):
            raise ConfigError(f"[{section}] is not a section", f"write [{section}] on a line of its own")
        sections[section] = dict(body)
    before = _shadows(sections["train"], _decided(sections["space"]))
    given = [name for name in [_put(sections, text) for text in sets] if name]
    _drop_shadowed(sections, before)
    _drop_inactive(sections, given)
    if seed is not None:
        sections["study"]["seed"] = seed
    if not sections["space"]:
        raise ConfigError("[space] is empty", "search at least one setting, for example learning_rate")
    study = read_section(StudySection, sections["study"], "study")
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
        read_section(PromptSection, sections["prompts"], "prompts"),
        read_section(PromptSection, sections["confirmation"], "confirmation"),
        read_section(SamplingSection, sections["sampling"], "sampling"),
        read_section(ScoreSection, sections["score"], "score"),
        read_section(LimitSection, sections["limits"], "limits"),
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
    for name, setting in _shadows(body, decided):
        if setting in decided:
            where = "[train]" if name in body else "[space]"
            raise ConfigError(
                f"{name} in {where} leaves {decided[setting]} without effect", "keep one of the two"
            )
    return TrainConfig().with_values({name: _unset(name, value) for name, value in body.items()})


def _shadows(train: Mapping[str, Any], decided: Collection[str]) -> list[tuple[str, str]]:
    """(a setting that is given or searched, a setting that it leaves without effect)."""
    found = []
    if train.get("max_train_steps"):
        found.append(("max_train_steps", "max_train_epochs"))
    unet_only = bool(train.get("network_train_unet_only"))
    if unet_only:
        found.append(("network_train_unet_only", "text_encoder_lr"))
    # learning_rate is the rate of whatever has none of its own
    if ("unet_lr" in train or "unet_lr" in decided) and (
        unet_only or "text_encoder_lr" in train or "text_encoder_lr" in decided
    ):
        found.append(("unet_lr", "learning_rate"))
    return found


def _unset(name: str, value: Any) -> Any:
    """TOML has no null: 0 turns some settings off."""
    return None if name in ZERO_IS_UNSET and value == 0 and not isinstance(value, bool) else value


def _baseline(body: Mapping[str, Any], space: Space, train: TrainConfig) -> dict[str, Any]:
    """[baseline], written in kohya's settings, as a proposal."""
    decided = {setting for p in space for setting in settings_of(p.name)}
    values = {}
    for name, value in body.items():
        check_name(name)
        if name not in decided:
            raise ConfigError(f"{name} in [baseline] is not searched", "fixed settings belong in [train]")
        values[name] = _unset(name, value)
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


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One line for each fact that changed."""
    lines = []
    for name in [*before, *(n for n in now if n not in before)]:
        old, new = before.get(name), now.get(name)
        if not _same(name, old, new):
            lines.append(f"{name}: was {old or 'not there'}, is now {new or 'not there'}")
    return lines


def _same(name: str, old: str | None, new: str | None) -> bool:
    """A base is its contents, whatever it is called: the last word of its fact."""
    if name == "base" and old and new:
        return old.split()[-1] == new.split()[-1]
    return old == new


def check_unchanged(before: Mapping[str, str], now: Mapping[str, str], name: str) -> None:
    """Refuse to go on with a study that began with something else: its scores could not be compared."""
    known = {key: value for key, value in before.items() if key in now or key.startswith("[")}
    usual = {f"[train] {name}": str(value) for name, value in TrainConfig().as_dict().items()}
    # What an older version did not note cannot be compared; a setting that came later and has its default
    # changes nothing.
    now = {
        key: value
        for key, value in now.items()
        if key in before or (key.startswith("[") and usual.get(key) != value)
    }
    changed = difference(known, now)
    if changed:
        raise ConfigError(
            f"study {name} began with something else: " + "; ".join(changed[:5]),
            "give the new study another --name, or undo the change",
        )


def _put(sections: dict[str, dict[str, Any]], text: str) -> str | None:
    """One ``--set key=value``: a setting, a range of the space, or section.key.

    Returns the name of what is now fixed, or searched otherwise.
    """
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key or not raw:
        raise ConfigError(
            f"--set {text!r} has no value", "write --set key=value, for example --set network_dim=16"
        )
    value = _value(raw)
    _check_whole(value, f"--set {key}")
    section, dot, inner = key.partition(".")
    if dot:
        if section not in sections:
            raise ConfigError(
                f"--set {key}: no section {section}", suggestion(section, sections) or ", ".join(sections)
            )
        sections[section][inner] = value
        return None
    if isinstance(value, Mapping | list):
        sections["space"][key] = value
        for setting in settings_of(key):
            sections["train"].pop(setting, None)
        return key
    if key in DERIVED:
        raise ConfigError(
            f"--set {key}: a single value fixes nothing", f"set {DERIVED[key].sets} instead, or give a range"
        )
    check_name(key)
    if key in ELSEWHERE:
        raise ConfigError(f"{key} is not set with --set", f"it is decided by {ELSEWHERE[key]}")
    sections["train"][key] = value
    _keep_ratios(sections, key, value)
    for name in [n for n in sections["space"] if key in settings_of(n)]:  # what is fixed is not searched
        _drop(sections, name)
    return key


def _drop(sections: dict[str, dict[str, Any]], name: str) -> None:
    """Take a parameter out of the search."""
    del sections["space"][name]
    for setting in settings_of(name):
        sections["baseline"].pop(setting, None)


def _drop_shadowed(sections: dict[str, dict[str, Any]], before: Collection[tuple[str, str]]) -> None:
    """What ``--set`` leaves without effect is not searched.  What the file itself does is refused later."""
    now = _shadows(sections["train"], _decided(sections["space"]))
    dead = {setting for name, setting in now if (name, setting) not in before}
    for name in [n for n in sections["space"] if dead & set(settings_of(n))]:
        _drop(sections, name)


def _drop_inactive(sections: dict[str, dict[str, Any]], given: Collection[str]) -> None:
    """What ``--set`` makes inactive for good is not searched; conditions that cannot occur any more go."""
    for name, body in list(sections["space"].items()):
        off = body.get("inactive_when") if isinstance(body, dict) else None
        if not isinstance(off, dict) or not any(_was_given(other, given) for other in off):
            continue
        left = {}
        for other, values in off.items():
            left[other] = _listed(values)
            if not _was_given(other, given):
                continue
            possible = _possible(sections, other)
            if possible and all(value in left[other] for value in possible):
                _drop(sections, name)
                break
            if possible or other not in sections["space"]:
                left[other] = [v for v in left[other] if other in sections["space"] and v in possible]
        else:
            kept = {other: values for other, values in left.items() if values}
            sections["space"][name] = {**body, "inactive_when": kept}


def _decided(space: Iterable[str]) -> set[str]:
    return {setting for name in space for setting in settings_of(name)}


def _was_given(parameter: str, given: Collection[str]) -> bool:
    return parameter in given or any(setting in given for setting in settings_of(parameter))


def _possible(sections: Mapping[str, Mapping[str, Any]], parameter: str) -> list[Any]:
    """The values that a parameter can have now, if they are few; a fixed one has one."""
    body = sections["space"].get(parameter)
    if isinstance(body, Mapping):
        body = body.get("choices")
    if isinstance(body, list):
        return body
    if parameter in sections["space"] or parameter not in SETTINGS:
        return []
    return [sections["train"].get(parameter, getattr(TrainConfig(), parameter))]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _keep_ratios(sections: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    """Fixing what a searched ratio refers to (network_dim for network_alpha) keeps trial 0's ratio."""
    baseline = sections["baseline"]
    for name, derivation in DERIVED.items():
        before = baseline.get(key, baseline.get("learning_rate") if key == "unet_lr" else None)
        known = [before, baseline.get(derivation.sets), value]
        if name in sections["space"] and key in derivation.needs and all(map(_positive, known)):
            baseline[derivation.sets] = baseline[derivation.sets] / before * value


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _value(raw: str) -> Any:
    """A TOML value; a bare word is a text."""
    try:
        return tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        return raw
    except (ValueError, RecursionError) as error:  # endless digits or brackets
        raise ConfigError(
            f"--set … = {clean_text(raw)[:40]}… is no value: {clean_text(str(error))}", "write a shorter one"
        ) from None


def _check_whole(table: Any, where: str) -> None:
    """Refuse whole numbers that TOML does not promise: they have no float, and some no text."""
    left = [table]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list):
            left += value
        elif isinstance(value, int) and abs(value) > LARGEST_WHOLE:
            raise ConfigError(
                f"{where} has a whole number beyond {LARGEST_WHOLE}", "TOML's whole numbers have 64 bits"
            )


assert SETTINGS.keys() >= set(NEUTRAL_SETTINGS)
