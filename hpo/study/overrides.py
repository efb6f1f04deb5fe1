"""``--set`` for study files: fix a setting, search it or change a value, and remove parameters without effect.

Owns the effect of a value on the sections.  Does not own the syntax (``trainer.overrides``) or the checks of
the sections, which run afterwards (``hpo.study.config``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hpo.study.space.derived import DERIVED, IMAGES_SEEN
from hpo.study.space.space import ELSEWHERE, baseline_name, settings_of
from trainer.checks import suggestion
from trainer.config import SETTINGS, TrainConfig, check_name
from trainer.errors import ConfigError
from trainer.overrides import read_override

Sections = dict[str, dict[str, Any]]
LENGTHS = (IMAGES_SEEN, "max_train_steps", "max_train_epochs")  # a study has one of them


def override(sections: Sections, sets: Iterable[str]) -> None:
    """Apply ``--set`` values to the sections, and remove parameters from [space] that then have no effect."""
    before = shadows(sections["train"], _decided(sections["space"]), sections["space"])
    given = [name for name in [_put(sections, text) for text in sets] if name]
    _drop_shadowed(sections, before)
    _drop_inactive(sections, given)


def shadows(
    train: Mapping[str, Any], decided: Collection[str], searched: Collection[str]
) -> list[tuple[str, str]]:
    """Pairs (setting that is given or searched, setting that has no effect because of it).

    ``decided``: the settings that are searched, ``searched``: the parameters that decide them.
    """
    found = []
    if train.get("max_train_steps") or IMAGES_SEEN in searched:
        by = "max_train_steps" if train.get("max_train_steps") else IMAGES_SEEN
        found.append((by, "max_train_epochs"))
    unet_only = bool(train.get("network_train_unet_only"))
    if unet_only:
        found.append(("network_train_unet_only", "text_encoder_lr"))
    # learning_rate is the default for components without their own learning rate
    if ("unet_lr" in train or "unet_lr" in decided) and (
        unet_only or "text_encoder_lr" in train or "text_encoder_lr" in decided
    ):
        found.append(("unet_lr", "learning_rate"))
    return found


def _put(sections: Sections, text: str) -> str | None:
    """Apply one ``--set key=value``: a setting, a range of the space, or section.key.

    Returns the name of the setting or parameter that is now fixed or has a new range.
    """
    key, value = read_override(text)
    section, dot, inner = key.partition(".")
    if dot:
        if section not in sections:
            raise ConfigError(
                f"--set {key}: no section {section}", suggestion(section, sections) or ", ".join(sections)
            )
        sections[section][inner] = value
        return None
    if isinstance(value, Mapping | list):
        _drop_other_lengths(sections, key)
        sections["space"][key] = value
        for setting in settings_of(key):
            sections["train"].pop(setting, None)
        return key
    if key in DERIVED:
        raise ConfigError(
            f"--set {key}: cannot be fixed to a single value",
            f"set {DERIVED[key].sets} instead, or give a range",
        )
    check_name(key)
    if key in ELSEWHERE:
        raise ConfigError(f"{key} cannot be set with --set", f"it is set by {ELSEWHERE[key]}")
    _drop_other_lengths(sections, key)
    sections["train"][key] = value
    _keep_ratios(sections, key, value)
    for name in [n for n in sections["space"] if key in settings_of(n)]:  # a fixed setting is not searched
        _drop(sections, name)
    return key


def _drop_other_lengths(sections: Sections, key: str) -> None:
    """A length by ``--set`` replaces a study's own: images_seen and each of kohya's two exclude each other."""
    if key not in LENGTHS or (key != IMAGES_SEEN and IMAGES_SEEN not in sections["space"]):
        return
    for name in LENGTHS:
        if name != key:
            sections["train"].pop(name, None)
            if name in sections["space"]:
                _drop(sections, name)


def _drop(sections: Sections, name: str) -> None:
    """Remove a parameter from the search."""
    del sections["space"][name]
    for setting in (*settings_of(name), baseline_name(name)):
        sections["baseline"].pop(setting, None)


def _drop_shadowed(sections: Sections, before: Collection[tuple[str, str]]) -> None:
    """Remove parameters that have no effect because of ``--set``.  Such a parameter in the file
    itself is an error."""
    now = shadows(sections["train"], _decided(sections["space"]), sections["space"])
    dead = {setting for name, setting in now if (name, setting) not in before}
    for name in [n for n in sections["space"] if dead & set(settings_of(n))]:
        _drop(sections, name)


def _drop_inactive(sections: Sections, given: Collection[str]) -> None:
    """Remove parameters that are always inactive because of ``--set``, and conditions that can no longer occur."""
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
    """The values that a parameter can have: its choices, or the one value if it is fixed.  Empty for a range."""
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


def _keep_ratios(sections: Sections, key: str, value: Any) -> None:
    """Keep the baseline's ratio when the setting that a ratio refers to is fixed (network_dim for network_alpha)."""
    baseline = sections["baseline"]
    for name, derivation in DERIVED.items():
        before = baseline.get(key, baseline.get("learning_rate") if key == "unet_lr" else None)
        known = [before, baseline.get(derivation.sets), value]
        if name in sections["space"] and key in derivation.needs and all(map(_positive, known)):
            baseline[derivation.sets] = baseline[derivation.sets] / before * value


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
