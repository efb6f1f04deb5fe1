"""Standard: what a run is judged by – which study's definition, which images, references and prompts.

Owns where each of them comes from, for a trial, for a run whose settings a study was carried over to, and for
any other.  Reads files and loads no model (``hpo.judge.judge``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.images import SampleConfig, default_config
from evaluation.prompts import PromptSet, no_class_word
from hpo.judge.runfiles import RunFiles
from hpo.study import (
    RUNS,
    SHIPPED,
    Inputs,
    StudyConfig,
    StudyFolder,
    build_study,
    find_study,
    prompt_sets,
    promptfiles,
    read_json,
    read_study,
    reference_paths,
)
from trainer.adapters import CONFIG_KEY, RESOLUTION
from trainer.bases import Base, is_miniature
from trainer.config import TrainConfig
from trainer.data import Dataset, read_picture, read_training_data
from trainer.errors import ConfigError, DataError
from trainer.text import clean_text

SWEEP_STEPS = 25  # for checkpoints and comparisons, as LyCORIS (arXiv 2309.14859) evaluates; a search uses 20
# training_comment of a transfer's settings
_TRANSFERRED = re.compile(r"(?P<study>.+) trial \d+, mapping \S+")


@dataclass(frozen=True)
class Standard:
    """``folder``: the study that the run comes from, its trial or carried over.  ``steps_apply``: [sampling]
    steps are this run's own, not those of a search.  ``clip``: --clip as the study was given it.  ``says``:
    where the definition is from, where that is not plain."""

    study: StudyConfig
    folder: StudyFolder | None
    steps_apply: bool
    clip: str | None = None
    says: str = ""


def standard(run: RunFiles, config: TrainConfig, named: str | None) -> Standard:
    """Which prompts, encoders, formula and limits: those of --study, else of the run's own study, else those
    that go with the base."""
    spec = config.pretrained_model_name_or_path
    mini = is_miniature(spec)
    folder = run.study or _carried_over_from(run, config)
    if named is not None:
        place = StudyFolder(Path(named))
        if place.facts.is_file():
            found = _stored(place)
            if found is None:
                raise ConfigError(f"{place.facts} holds no definition", "give a study file")
            return Standard(found, folder, mini, _clip(place), f"judged as study {place.name}")
        path = find_study(named, spec)
        shown = path.stem if _is_shipped(path) else clean_text(str(path))
        return Standard(
            read_study(path), folder, mini or not _is_shipped(path), says=f"judged as {shown} says"
        )
    clip = _clip(folder) if folder else None
    found = _stored(folder) if folder else None
    if folder and found:
        says = "" if run.study else f"judged as study {folder.name}, whose settings were carried over to it"
        return Standard(found, folder, mini, clip, says)
    path = find_study(None, spec)
    return Standard(read_study(path), folder, mini or not _is_shipped(path), clip)


def _is_shipped(path: Path) -> bool:
    return path.resolve().parent == SHIPPED.resolve()


def _stored(folder: StudyFolder) -> StudyConfig | None:
    """The definition in study.json."""
    sections = facts(folder).get("sections")
    return build_study("study", sections) if sections else None


def _clip(folder: StudyFolder) -> str | None:
    given = facts(folder).get("inputs")
    return given.get("clip") if isinstance(given, dict) else None


def _carried_over_from(run: RunFiles, config: TrainConfig) -> StudyFolder | None:
    """The study whose ``hpo transfer`` wrote the run's settings: it trains into runs/NAME/transfer/output-FAMILY."""
    match = _TRANSFERRED.fullmatch(config.training_comment)
    if not match:
        return None
    above = run.output.resolve().parent
    for root in ([above.parent] if above.name == "transfer" else []) + [RUNS / match["study"]]:
        if (folder := StudyFolder(root)).facts.is_file():
            return folder
    return None


def facts(folder: StudyFolder) -> dict[str, Any]:
    """study.json."""
    found = read_json(folder.facts)
    forms = {"data": str, "references": list, "sampling": dict}
    if found is None or not all(isinstance(found.get(name), form) for name, form in forms.items()):
        raise ConfigError(f"{folder.facts} cannot be read", "restore it, or give the LoRA's file itself")
    return found


def settings(run: RunFiles, inputs: Inputs, flags: str = "") -> TrainConfig:
    """How it was trained.  A file of another program does not say on which base and images.  ``flags``: the
    end of the options that say it (``-b``)."""
    foreign = not run.own and CONFIG_KEY not in run.metadata()
    if foreign and not inputs.base:
        raise ConfigError(
            f"{run.settings} does not say which base model it is for",
            f"give it with --base{flags}, for example --base{flags} sdxl",
        )
    data = inputs.data
    if data is None and run.study is not None:
        data = Path(facts(run.study)["data"])
    config = run.config(inputs.base, data)
    if foreign:  # sd-scripts' metadata does not tell how captions end, and its default is used by few
        config = config.with_values({"caption_extension": TrainConfig().caption_extension})
    if not config.train_data_dir and not config.dataset_config:
        raise DataError(
            f"it is not known on which images {run.name} was trained",
            f"give their folder with --data{flags}: prompts are made of its captions, and none of it may judge the "
            "LoRA",
        )
    return config


def training_data(run: RunFiles, config: TrainConfig, inputs: Inputs, known: Standard) -> Dataset:
    """What the run was trained on, references left out for a study's trial."""
    trigger, class_word = inputs.trigger, inputs.class_word
    if known.folder is not None and known.folder.prompts.is_file() and inputs.data is None:
        chosen = promptfiles.read(known.folder.prompts)
        trigger, class_word = trigger or chosen.trigger, class_word or chosen.class_word
    data = read_training_data(config, trigger=trigger, class_word=class_word)
    if run.study is None:
        return data
    apart = {_sha(path) for path in _study_references(run.study)}
    return replace(data, items=tuple(item for item in data.items if item.sha256 not in apart))


def _study_references(folder: StudyFolder) -> list[Path]:
    return [Path(str(path)) for path in facts(folder)["references"]]


def references(run: RunFiles, inputs: Inputs, data: Dataset, known: Standard) -> list[Path]:
    """The images that judge likeness: none of them was trained on."""
    if inputs.references:
        return reference_paths(inputs.references, data)
    if run.study is not None or (known.folder is not None and not data.held_out):
        assert known.folder is not None
        return _study_references(known.folder)
    if not data.held_out:
        raise DataError(
            f"{run.name} was trained on all {len(data.items)} images, so its likeness cannot be claimed",
            "give images that it has not seen with --references DIR (before training: put some into held_out/)",
        )
    return [item.path for item in data.held_out]


def check_unseen(run: RunFiles, paths: list[Path], data: Dataset) -> None:
    """Raise DataError for a reference among the training images, regularisation images included."""
    trained = {item.sha256 for item in data.items}
    for path in paths:
        if _sha(path) in trained:
            raise DataError(
                f"{path} is trained on too, by {run.name}",
                "references must be images that training does not see",
            )


def _sha(path: Path) -> str:
    return read_picture(path).sha256


def sets(
    run: RunFiles, inputs: Inputs, study: StudyConfig, data: Dataset, count_tokens: Callable[[str], int]
) -> tuple[PromptSet, PromptSet | None]:
    """The search and the confirmation prompts: the study's own for its trials."""
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
    """The study's way for its trials; else the definition's at the size it was trained at."""
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
    """How a run's trigger and class word differ from those of prompts that were made for another."""
    pairs = {
        "trigger": (data.trigger, prompts.trigger),
        "class word": (data.class_word, prompts.class_word),
    }
    return [
        f"the {what} {clean_text(own)}, and is drawn with {clean_text(drawn)}"
        for what, (own, drawn) in pairs.items()
        if own and drawn and own.casefold() != drawn.casefold()
    ]
