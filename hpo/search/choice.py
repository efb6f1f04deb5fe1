"""What ``hpo search`` searches for: the preset, the study file, its folder, and the words for the subject.

Owns the order in which the preset is decided: ``--preset``, ``--set study.preset``, the study if it was begun, the
study file, the dataset, a question, and last the character.  Reads folder names and small files; loads no images.
Does not own which words mean a style (``hpo.study.presets``).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.prompts import load_prompts, no_class_word
from hpo.study import (
    CHARACTER,
    PRESETS,
    SHIPPED,
    STYLE_PRESET,
    STYLE_WORD,
    Inputs,
    StudyConfig,
    StudyFolder,
    check_preset,
    find_folder,
    find_study,
    preset_of,
    read_json,
    read_study,
    study_folder,
    study_name,
)
from trainer.data import named_subject, shown
from trainer.errors import ConfigError, DataError
from trainer.text import clean_text

if TYPE_CHECKING:
    from hpo.search.session import SearchRequest

# (question, what may be answered; empty: any word; only "": any word or none) → the answer
Ask = Callable[[str, tuple[str, ...]], str]


@dataclass(frozen=True)
class SearchChoice:
    """A definition, the folder of its study, the completed inputs, lines for the user, and the options that answer
    what was asked."""

    config: StudyConfig
    folder: StudyFolder
    inputs: Inputs
    says: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Begun:
    """A study that this command would resume or take trials over from: its file, folder, and what study.json says."""

    path: Path
    folder: StudyFolder
    preset: str
    sections: Mapping[str, Any]
    inputs: Mapping[str, str]


def choose(request: SearchRequest) -> SearchChoice:
    """Decide all of it.  Raises ConfigError for a preset that the study was not begun with."""
    given = check_preset(request.preset) if request.preset is not None else _set_preset(request.sets)
    usual = find_study(request.study, request.inputs.base)
    own = _own_preset(usual, request)
    inputs, readable = _named(request.inputs)
    said = preset_of(inputs.trigger, inputs.class_word)
    begun = _begun(request, usual, given or own or said)
    source = None if begun is not None else _source(request, usual)
    inputs = _as_begun(inputs, begun or source)
    lines: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    if given is not None:
        preset = given
    elif own is not None:
        preset = own
        lines = _differs(f"{usual.name} says so", own, said, "")
    elif begun is not None:
        preset = begun.preset
        lines = _differs(f"study {begun.folder.name} was started so", preset, said, " and another name")
    elif source is not None:
        preset = source.preset
        without = " without --fork-from"
        lines = _differs(f"study {source.folder.name} was started so", preset, said, without)
    else:
        inputs, preset, lines, answers = _asked(inputs, said, request.ask if readable else None)
    known = begun or source
    if known is not None and known.preset == preset:
        path = known.path
    else:
        path = usual if request.study or (own and not given) else find_study(None, inputs.base, preset)
    folder = study_folder(study_name(request.name, path.stem, inputs.base, inputs.data, preset), request.runs)
    before = _stored(path, folder)
    if before is not None and before.preset != preset and request.preset is not None:
        raise ConfigError(
            f"study {folder.name} was started with preset {before.preset}",
            f"give the study with --preset {preset} a name of its own (hpo search NAME …), or leave --preset out",
        )
    kept = before or source or _source(request, usual)
    config = read_study(
        path,
        sets=request.sets,
        seed=request.seed,
        preset=None if own and not given else preset,
        before=kept.sections if kept else None,
    )
    if config.preset.style and not inputs.class_word and inputs.prompts is None:
        inputs = replace(inputs, class_word=STYLE_WORD)
    if readable and inputs.data is not None and not inputs.class_word and inputs.prompts is None:
        raise no_class_word()  # before anything is loaded
    return SearchChoice(config, folder, _as_given(request.inputs, inputs), lines, answers)


# What is known


def _set_preset(sets: tuple[str, ...]) -> str | None:
    """The value of ``--set study.preset``; None for one that is refused later."""
    found = [text.partition("=")[2].strip().strip("\"'") for text in sets if _sets_preset(text)]
    return found[-1] if found and found[-1] in PRESETS else None


def _sets_preset(text: str) -> bool:
    return text.partition("=")[0].strip() == "study.preset"


def _own_preset(path: Path, request: SearchRequest) -> str | None:
    """The preset that a study file names, if the file is the user's choice and not a default of this tool."""
    if request.study is None and path.resolve().parent == SHIPPED.resolve():
        return None
    found = read_study(path, sets=request.sets).sections["study"].get("preset")
    return None if found is None else str(found)


def _named(inputs: Inputs) -> tuple[Inputs, bool]:
    """Trigger and class word from the command line, the prompt file or the folders' names, and whether they
    could be read.  A file or folder that cannot be read is reported later, by what reads all of it."""
    trigger, class_word = inputs.trigger, inputs.class_word
    try:
        if inputs.prompts is not None:
            file = load_prompts(
                inputs.prompts, trigger=trigger, class_word=class_word, count_tokens=lambda text: 0
            )
            trigger, class_word = trigger or file.trigger, class_word or file.class_word
        if inputs.data is not None:
            folder = named_subject(inputs.data)
            trigger, class_word = trigger or folder[0], class_word or folder[1]
    except (ConfigError, DataError):
        return inputs, False
    return replace(inputs, trigger=trigger, class_word=class_word), True


def _begun(request: SearchRequest, usual: Path, wanted: str | None) -> _Begun | None:
    """The study that the command would resume: of ``wanted`` if there is one, else of any preset."""
    base, data = request.inputs.base, request.inputs.data
    presets = [CHARACTER] if request.name or request.study else list(PRESETS)
    found = []
    for preset in presets:
        path = usual if request.study else find_study(None, base, preset)
        name = study_name(request.name, path.stem, base, data, preset)
        stored = _stored(path, study_folder(name, request.runs))
        if stored is not None:
            found.append(stored)
    return next((study for study in found if study.preset == wanted), found[0] if found else None)


def _source(request: SearchRequest, usual: Path) -> _Begun | None:
    """The study of ``--fork-from``: a new study keeps what that one was begun with, or its trials would not fit."""
    if request.fork_from is None:
        return None
    source = _stored(usual, find_folder(request.fork_from, request.runs))
    if source is None or request.study:
        return source
    return replace(source, path=find_study(None, request.inputs.base, source.preset))


def _stored(path: Path, folder: StudyFolder) -> _Begun | None:
    found = read_json(folder.facts)
    if found is None or not isinstance(sections := found.get("sections"), dict):
        return None
    inputs, study = found.get("inputs"), sections.get("study")
    preset = study.get("preset", CHARACTER) if isinstance(study, dict) else CHARACTER
    return _Begun(path, folder, str(preset), sections, inputs if isinstance(inputs, dict) else {})


def _as_begun(inputs: Inputs, begun: _Begun | None) -> Inputs:
    """Words that neither the command nor the folder says, as they were when the study was begun."""
    if begun is None:
        return inputs
    trigger = inputs.trigger or begun.inputs.get("trigger")
    class_word = inputs.class_word or begun.inputs.get("class_word")
    return replace(inputs, trigger=trigger, class_word=class_word)


def _as_given(before: Inputs, now: Inputs) -> Inputs:
    """Words of a prompt file or folder are left to what reads it; answers and stored words are kept."""
    named, _ = _named(before)
    return replace(
        now,
        trigger=before.trigger if now.trigger == named.trigger else now.trigger,
        class_word=before.class_word if now.class_word == named.class_word else now.class_word,
    )


# What is said and asked


def _differs(why: str, preset: str, said: str | None, more: str) -> tuple[str, ...]:
    """A line if the dataset asks for a style and the study does not, or the other way round."""
    if said is None or (said == STYLE_PRESET) == (preset == STYLE_PRESET):
        return ()
    return (
        f"searched as {_a(preset)}, because {why}; the dataset is named as {_a(said)}: "
        f"for that, use --preset {said}{more}",
    )


def _asked(
    inputs: Inputs, said: str | None, ask: Ask | None
) -> tuple[Inputs, str, tuple[str, ...], tuple[str, ...]]:
    """The preset by the dataset's words; without them, by a question, whose answers are options as well."""
    if inputs.data is None:
        return inputs, CHARACTER, (), ()
    if said is not None:
        word = clean_text(inputs.class_word or inputs.trigger or "")
        others = " or ".join(name for name in PRESETS if name != said)
        what = "class word" if inputs.class_word else "trigger"
        return inputs, said, (f"searched as {_a(said)}: the {what} is {word} (for {others}: --preset)",), ()
    if ask is None or inputs.prompts is not None:
        return inputs, CHARACTER, (), ()
    folder = shown(inputs.data)
    preset = ask(f"what does {folder} show?", (CHARACTER, *(name for name in PRESETS if name != CHARACTER)))
    flags = ["--preset", preset]
    if preset != STYLE_PRESET:
        word = ask("in one word, as in the captions (girl, man, vase)", ()).strip()
        if not word:
            raise ConfigError("no class word was given", "give it with --class, for example --class girl")
        inputs, flags = replace(inputs, class_word=word), [*flags, "--class", word]
    if inputs.trigger is None:
        trigger = ask("its name in the captions, the trigger word (Enter: none)", ("",)).strip()
        inputs = replace(inputs, trigger=trigger or None)
        flags += ["--trigger", trigger] if trigger else []
    return inputs, preset, (f"to skip these questions: {shlex.join(flags)}",), tuple(flags)


def _a(preset: str) -> str:
    return f"an {preset}" if preset == "object" else f"a {preset}"
