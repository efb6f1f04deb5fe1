"""Standard: the study definition, images, references and prompts that a run is scored with.

Owns where each of them comes from: for a trial, for a run with transferred settings, and for any other run.
Reads files but loads no model; see ``hpo.judge.judge``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.images import SampleConfig, default_config
from evaluation.prompts import PromptSet, no_class_word
from hpo.judge.runfiles import RunFiles
from hpo.study import (
    CHARACTER,
    RUNS,
    SHIPPED,
    Inputs,
    StudyConfig,
    StudyFolder,
    TrialFolder,
    as_begun,
    build_study,
    find_study,
    origin_of,
    preset_of,
    prompt_sets,
    promptfiles,
    read_json,
    read_study,
    reference_paths,
    study_at,
)
from trainer.adapters import CONFIG_KEY, RESOLUTION
from trainer.bases import Base, is_miniature
from trainer.config import TrainConfig
from trainer.data import Dataset, read_picture, read_training_data, subject_of_names
from trainer.errors import ConfigError, DataError
from trainer.text import clean_text

SWEEP_STEPS = 25  # for checkpoints and comparisons, as LyCORIS (arXiv 2309.14859) evaluates; a search uses 20


@dataclass(frozen=True)
class Standard:
    """The study definition used for scoring.

    ``folder``: the study that the run comes from (as its trial or by transfer).  ``steps_apply``: whether
    ``[sampling] steps`` is used unchanged, instead of at least ``SWEEP_STEPS``.  ``clip``: the study's
    ``--clip``. ``says``: a line for the user if the origin of the definition is not obvious.
    """

    study: StudyConfig
    folder: StudyFolder | None
    steps_apply: bool
    clip: str | None = None
    says: str = ""


def standard(run: RunFiles, config: TrainConfig, named: str | None, data: Dataset) -> Standard:
    """The definition with prompts, encoders, formula and limits.

    It is taken from ``--definition``, else from the run's own study, else from the default study of the base for a
    style, if the class word of ``data`` says so, or for a character.
    """
    spec = config.pretrained_model_name_or_path
    mini = is_miniature(spec)
    folder = origin(run, config)
    if named is not None:
        if (place := _study_named(named)) is not None:
            found = _stored(place)
            if found is None:
                raise ConfigError(
                    f"{place.facts} has no study definition", "give a study file with --definition"
                )
            return Standard(
                found, folder, mini, _clip(place), f"scored with the definition of study {place.name}"
            )
        path = find_study(named, spec)
        shown = path.stem if _is_shipped(path) else clean_text(str(path))
        return Standard(
            read_study(path),
            folder,
            mini or not _is_shipped(path),
            says=f"scored with the definition of {shown}",
        )
    clip = _clip(folder) if folder else None
    found = _stored(folder) if folder else None
    if folder and found:
        says = f"scored with the definition of study {folder.name}, because the settings were transferred from it"
        return Standard(found, folder, mini, clip, "" if run.study else says)
    preset = preset_of(data.trigger, data.class_word) or CHARACTER
    path = find_study(None, spec, preset)
    is_shipped = _is_shipped(path)
    found = read_study(path, preset=preset if is_shipped else None)
    says = "judged as a style; --definition selects another definition" if found.preset.style else ""
    return Standard(found, folder, mini or not is_shipped, clip, says)


def _study_named(named: str) -> StudyFolder | None:
    """The study that ``--definition`` names: a path in its folder, or its name in runs/.  None: a study file."""
    path = Path(named)
    if path.suffix == ".toml":
        return None
    if ("/" in named or path.is_dir()) and (place := study_at(path)) is not None:
        return place
    place = StudyFolder(path)
    if place.facts.is_file():  # a copy without its database
        return place
    place = StudyFolder(RUNS / named)
    return place if "/" not in named and place.has_study else None


def _is_shipped(path: Path) -> bool:
    return path.resolve().parent == SHIPPED.resolve()


def _stored(folder: StudyFolder) -> StudyConfig | None:
    """The study definition in study.json."""
    known = facts(folder)
    sections = known.get("sections")
    return as_begun(build_study("study", sections), known.get("facts", {})) if sections else None


def _clip(folder: StudyFolder) -> str | None:
    given = facts(folder).get("inputs")
    return given.get("clip") if isinstance(given, dict) else None


def origin(run: RunFiles, config: TrainConfig) -> StudyFolder | None:
    """The study that the run comes from, as its trial or by transfer."""
    return run.study or _carried_over_from(run, config)


def transferred_from(run: RunFiles) -> TrialFolder | None:
    """The trial whose settings were transferred to this run; None for any other run."""
    if not run.own:
        return None
    config = run.config(None, None)
    found, folder = origin_of(config.training_comment), _carried_over_from(run, config)
    return folder.trial(found.trial) if found and folder else None


def _carried_over_from(run: RunFiles, config: TrainConfig) -> StudyFolder | None:
    """The study from which ``hpo transfer`` made the run's settings.

    The usual output folder of such a run is runs/NAME/transfer/output-FAMILY.
    """
    found = origin_of(config.training_comment)
    if found is None:
        return None
    above = run.output.resolve().parent
    for root in ([above.parent] if above.name == "transfer" else []) + [RUNS / found.study]:
        if (folder := StudyFolder(root)).facts.is_file():
            return folder
    return None


def facts(folder: StudyFolder) -> dict[str, Any]:
    """The contents of study.json."""
    found = read_json(folder.facts)
    forms = {"data": str, "references": list, "sampling": dict}
    if found is None or not all(isinstance(found.get(name), form) for name, form in forms.items()):
        raise ConfigError(f"cannot read {folder.facts}", "restore the file, or give the LoRA file itself")
    return found


def settings(run: RunFiles, inputs: Inputs, flags: str = "") -> TrainConfig:
    """The training settings.  Files of other tools need ``--base`` and ``--data``.

    ``flags``: suffix of these two options in hints (``-b`` for the second run of a comparison).
    """
    foreign = not run.own and CONFIG_KEY not in run.metadata()
    if foreign and not inputs.base:
        raise ConfigError(
            f"{run.settings} does not contain its base model",
            f"set it with --base{flags}, for example --base{flags} sdxl",
        )
    data = inputs.data
    if data is None and run.study is not None:
        data = Path(facts(run.study)["data"])
    config = run.config(inputs.base, data)
    if foreign:  # sd-scripts' metadata has no caption_extension, and few people use its default (.caption)
        config = config.with_values({"caption_extension": TrainConfig().caption_extension})
    if not config.train_data_dir and not config.dataset_config:
        raise DataError(
            f"the training images of {run.name} are unknown",
            f"set their folder with --data{flags}; prompts are made from its captions, and its images are not used as "
            "references",
        )
    return config


def training_data(run: RunFiles, config: TrainConfig, inputs: Inputs) -> Dataset:
    """The training images of the run.  For a trial, the references of its study are removed."""
    trigger, class_word = inputs.trigger, inputs.class_word
    folder = origin(run, config)
    if folder is not None and folder.prompts.is_file() and inputs.data is None:
        chosen = promptfiles.read(folder.prompts)
        trigger, class_word = trigger or chosen.trigger, class_word or chosen.class_word
    data = read_training_data(config, trigger=trigger, class_word=class_word)
    if not run.own:
        said = _trained_on(run)
        data = replace(data, trigger=data.trigger or said[0], class_word=data.class_word or said[1])
    if run.study is None:
        return data
    apart = {_sha(path) for path in _study_references(run.study)}
    return replace(data, items=tuple(item for item in data.items if item.sha256 not in apart))


def _trained_on(run: RunFiles) -> tuple[str | None, str | None]:
    """Trigger and class word in the names of the training folders, which sd-scripts stores in a LoRA's metadata."""
    metadata = run.metadata()
    for key in ("ss_tag_frequency", "ss_dataset_dirs"):
        try:
            folders = json.loads(metadata.get(key, ""))
        except ValueError:
            continue
        if isinstance(folders, dict) and (found := subject_of_names(map(str, folders))) != (None, None):
            return found
    return None, None


def _study_references(folder: StudyFolder) -> list[Path]:
    return [Path(str(path)) for path in facts(folder)["references"]]


def references(run: RunFiles, inputs: Inputs, data: Dataset, known: Standard) -> list[Path]:
    """The reference images for likeness.  None of them may be a training image."""
    if inputs.references:
        return reference_paths(inputs.references, data)
    if run.study is not None or (known.folder is not None and not data.held_out):
        assert known.folder is not None
        return _study_references(known.folder)
    if not data.held_out:
        raise DataError(
            f"{run.name} was trained on all {len(data.items)} images, so its likeness cannot be measured",
            "give images that it was not trained on with --references DIR, or move some to held_out/ before training",
        )
    return [item.path for item in data.held_out]


def check_unseen(run: RunFiles, paths: list[Path], data: Dataset) -> None:
    """Raise DataError if a reference is one of the training images (including regularization images)."""
    trained = {item.sha256 for item in data.items}
    for path in paths:
        if _sha(path) in trained:
            raise DataError(
                f"the reference {path} is also a training image of {run.name}",
                "use references that were not trained on",
            )


def _sha(path: Path) -> str:
    return read_picture(path).sha256


def sets(
    run: RunFiles, inputs: Inputs, study: StudyConfig, data: Dataset, count_tokens: Callable[[str], int]
) -> tuple[PromptSet, PromptSet | None]:
    """The search prompts and the confirmation prompts.  A trial uses those of its study."""
    if run.study is not None and inputs.prompts is None:
        later = run.study.confirmation
        return (
            promptfiles.read(run.study.prompts, count_tokens),
            promptfiles.read(later, count_tokens) if later.is_file() else None,
        )
    if not data.class_word and inputs.prompts is None:
        raise no_class_word()
    return prompt_sets(inputs, study, data, count_tokens)


def sampling(run: RunFiles, known: Standard, config: TrainConfig, base: Base) -> SampleConfig:
    """The sampling settings: those of the study for a trial, else those of the definition at training resolution."""
    if run.study is not None:
        fields = {f.name for f in dataclasses.fields(SampleConfig)}
        stored = facts(run.study)["sampling"]
        return SampleConfig(**{name: value for name, value in stored.items() if name in fields})
    said = run.own or not {CONFIG_KEY, RESOLUTION}.isdisjoint(run.metadata())
    side_px = config.resolution // 8 * 8 if said else base.native_resolution_px
    values = known.study.sample_values() | {"width_px": side_px, "height_px": side_px}
    if not known.steps_apply:
        values["steps"] = max(SWEEP_STEPS, values["steps"])
    return default_config(base, **(values | {"clip_skip": config.clip_skip}))


def other_words(data: Dataset, prompts: PromptSet) -> list[str]:
    """Texts on how trigger and class word of a run differ from those of another run's prompts."""
    pairs = {
        "trigger": (data.trigger, prompts.trigger),
        "class word": (data.class_word, prompts.class_word),
    }
    return [
        f"the {what} {clean_text(own)}, but the prompts use {clean_text(drawn)}"
        for what, (own, drawn) in pairs.items()
        if own and drawn and own.casefold() != drawn.casefold()
    ]
