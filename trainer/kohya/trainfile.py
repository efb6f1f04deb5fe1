"""The input of ``hpo train`` as settings.

Owns the precedence of values (``--set``, dataset file, file, defaults) and the source of each value. Does not own the
forms of files (``trainer.kohya.source``), the keys of sd-scripts (``trainer.kohya.read``) or datasets
(``trainer.data.subsets``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.config import SETTINGS, TrainConfig, squared
from trainer.data import read_dataset_file
from trainer.errors import ConfigError
from trainer.findings import Findings, collecting, piece
from trainer.kohya.keys import KNOWN_KEYS, NO_KOHYA_DEFAULT
from trainer.kohya.read import from_kohya, require_none_refused
from trainer.kohya.source import ITS_BASE, SAVED, Source, open_source, path_of, with_paths
from trainer.kohya.source import RUN_CONFIG as RUN_CONFIG
from trainer.overrides import read_override, read_setting
from trainer.paths import is_prompt_text
from trainer.text import clean_text
from trainer.tomlfile import as_text

KOHYA_FILLS, OUR_DEFAULTS = "sd-scripts' defaults", "this tool's defaults"
SAMPLES = ("sample_prompts", "sample_every_n_epochs", "sample_every_n_steps", "sample_at_first")
# Of two settings for the training length, giving one removes the other.
RIVALS = {"max_train_epochs": "max_train_steps", "max_train_steps": "max_train_epochs"}


@dataclass(frozen=True)
class TrainFile:
    """The settings of a run and their sources. ``origins`` names the source of each setting that is not a
    default; ``defaults`` says whose defaults are used for the rest. The lists contain lines for the user. ``health`` is
    the section [health], for the command that trains."""

    path: Path
    form: str
    config: TrainConfig
    origins: Mapping[str, str]
    defaults: str
    translated: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    output_dir: str | None = None
    health: Mapping[str, Any] = field(default_factory=dict)

    def require_all(self) -> TrainFile:
        """Raise ConfigError if any setting was refused, because the result would differ from the request."""
        require_none_refused(self.path, self.refused)
        return self

    def require_known(self) -> TrainFile:
        """Raise ConfigError if the file has keys that sd-scripts does not know (``--strict``)."""
        if self.unknown:
            raise ConfigError(
                f"{clean_text(str(self.path))} has settings that sd-scripts does not know: {'; '.join(self.unknown)}",
                "correct or remove these lines, or leave out --strict",
            )
        return self


Given = Mapping[str, tuple[Any, str]]  # setting → (value, where it comes from)


def read_train_file(
    path: Path,
    *,
    dataset: Path | None = None,
    sets: Iterable[str] = (),
    places: Mapping[str, Any] | None = None,
    needs_base: bool = True,
    either_is_kohya: bool = False,
    replaced: Collection[str] = (),
) -> TrainFile:
    """All settings of a run. ``dataset`` is a dataset file, ``sets`` are key=value texts, ``places`` are settings
    with their own command-line options (--base, --data). They are applied first, and only what results is checked.
    ``replaced``: keys of the file that the caller has its own value for (output_dir); they are not checked.
    ``either_is_kohya``: see ``trainer.kohya.source.open_source``.

    Raises ConfigError with everything that is wrong, or ModelFileError for a LoRA without training metadata.
    """
    if collecting():
        return _read(Path(path), dataset, list(sets), places or {}, needs_base, either_is_kohya, replaced)
    findings = Findings()
    file = None
    with findings.looking():
        file = _read(Path(path), dataset, list(sets), places or {}, needs_base, either_is_kohya, replaced)
    if findings.errors and file is not None:
        with findings.looking():
            file.require_all()
    findings.require_none_together(clean_text(str(path)))
    assert file is not None
    return file


def _read(
    path: Path,
    dataset: Path | None,
    sets: list[str],
    places: Mapping[str, Any],
    needs_base: bool,
    either_is_kohya: bool,
    replaced: Collection[str],
) -> TrainFile:
    source = open_source(path, either_is_kohya=either_is_kohya)
    given = _on_command_line(source, sets, places)
    source = _without_rivals(with_paths(source, {*given, *replaced}), given)
    dataset_given: dict[str, tuple[Any, str]] = {}
    notes = None
    if (place := _dataset_file(source, dataset, given)) is not None:
        with piece():
            notes = read_dataset_file(place)
        dataset_given = {"dataset_config": (str(place), "dataset file")}
        if notes is not None:
            dataset_given |= {name: (value, "dataset file") for name, value in notes.settings.items()}
            if "resolution" in given:
                dataset_given.pop("resolution_height", None)
    file = _resolved(source, {**dataset_given, **given})
    if notes is not None:
        file = replace(
            file,
            without_effect=(*file.without_effect, *notes.without_effect),
            refused=(*file.refused, *notes.refused),
        )
    return _without_lost_prompts(_filled(file, needs_base))


def _resolved(source: Source, given: Given) -> TrainFile:
    """The settings of a file with those that win over it."""
    if not source.is_kohya:
        values = {name: value for name, (value, _) in given.items()}
        return TrainFile(
            source.path,
            source.form,
            TrainConfig.of({**TrainConfig().as_dict(), **source.values, **squared(values)}),
            {
                **dict.fromkeys(source.values, source.origin),
                **{name: by for name, (_, by) in given.items() if by},
            },
            OUR_DEFAULTS,
            source.translated,
            source.without_effect,
            refused=source.refused,
            output_dir=source.output_dir,
            health=source.health,
        )
    table, ours = dict(source.values), {}
    for name, (value, by) in given.items():
        if name in KNOWN_KEYS and by != "dataset file":
            table[name] = value
        elif name in SETTINGS:
            ours[name] = value
            table.pop(name, None)
        else:
            table[name] = value
    table = {name: value for name, value in table.items() if name not in given or value is not None}
    file = from_kohya(source.path, table, sections=source.sections, ours=ours)
    return TrainFile(
        source.path,
        source.form,
        file.config,
        {name: given[name][1] if name in given else source.origin for name in file.given},
        KOHYA_FILLS,
        (*source.translated, *file.translated),
        (*source.without_effect, *file.without_effect),
        file.unknown,
        (*source.refused, *file.refused),
        file.differs,
        file.output_dir,
        source.health,
    )


def _on_command_line(
    source: Source, sets: list[str], places: Mapping[str, Any]
) -> dict[str, tuple[Any, str]]:
    """What the command line says: it wins. A key of sd-scripts, or any that stands in the file, can be set as well."""
    given: dict[str, tuple[Any, str]] = {}
    for text in sets:
        with piece():
            name, value = read_override(text)
            if not (source.is_kohya and (name in KNOWN_KEYS or name in source.values)):
                name, value = read_setting(text)
            given[name] = (path_of(name, value), "--set")
    for name, value in places.items():
        with piece():
            given[name] = (path_of(name, value), "command line")
    return given


def _without_rivals(source: Source, given: dict[str, tuple[Any, str]]) -> Source:
    """The source without settings that one on the command line replaces, with a line for each. ``given`` gets None
    for them where a default would come back."""
    values, lines = dict(source.values), list(source.translated)
    usual = {} if source.is_kohya else TrainConfig().as_dict()
    for name, rival in RIVALS.items():
        if given.get(name, (None, ""))[0] is None or rival in given:
            continue
        if (value := values.pop(rival, usual.get(rival))) is not None:
            lines.append(f"{rival} = {as_text(value)} → ignored, because {name} is given")
            if not source.is_kohya:
                given[rival] = (None, "")
    if "train_data_dir" in given and (file := values.pop("dataset_config", "")):
        lines.append(f"dataset_config = {as_text(file)} → ignored, because --data is given")
    return replace(source, values=values, translated=tuple(lines))


def _dataset_file(source: Source, dataset: Path | None, given: Given) -> Path | None:
    if dataset is not None or "train_data_dir" in given:
        return dataset if "train_data_dir" not in given else None
    value = given.get("dataset_config", (source.values.get("dataset_config"), ""))[0]
    return Path(value) if isinstance(value, str) and value else None


def _filled(file: TrainFile, needs_base: bool) -> TrainFile:
    """A file of sd-scripts with the settings that have no default in sd-scripts: our defaults are reported,
    the base must be given."""
    if file.defaults != KOHYA_FILLS:
        return file
    if needs_base and "pretrained_model_name_or_path" not in file.origins:
        known = [line for line in file.without_effect if line.startswith(ITS_BASE)]
        hint = known[0] if known else "set pretrained_model_name_or_path, or give --base"
        with piece():
            raise ConfigError(f"{clean_text(str(file.path))} does not name a base", hint)
    lines = [
        f"{name} (not in the file) → {getattr(file.config, name)}; sd-scripts has no default"
        for name in NO_KOHYA_DEFAULT
        if name not in file.origins
    ]
    return replace(file, translated=(*file.translated, *lines))


def _without_lost_prompts(file: TrainFile) -> TrainFile:
    """Settings from another machine, without sample images if the prompt file is missing here."""
    prompts = file.config.sample_prompts
    if file.origins.get("sample_prompts") != SAVED or is_prompt_text(prompts) or Path(prompts).is_file():
        return file
    usual = TrainConfig().as_dict()
    line = f"{', '.join(SAMPLES)}: the file {clean_text(prompts)} does not exist, so no sample images are generated"
    return replace(
        file,
        config=file.config.with_values({name: usual[name] for name in SAMPLES}),
        origins={name: origin for name, origin in file.origins.items() if name not in SAMPLES},
        without_effect=(*file.without_effect, line),
    )
