"""``hpo inspect``: what a LoRA file contains: kind, model, modules, ranks, alphas, metadata, and what is wrong with it.

Works with files of every tool (``trainer.adapters``).  Control characters in text from the file are removed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.adapters import CONFIG_KEY, contents, values
from trainer.config import TrainConfig
from trainer.files import sha256_file
from trainer.tensorfile import load_tensors
from trainer.text import clean_text

ALWAYS = ("learning_rate", "network_dim", "network_alpha", "train_batch_size", "resolution")  # default or not
LONG = 160  # maximum length of a metadata value in the table; --json shows it in full


@dataclass(frozen=True)
class Facts:
    """The contents of a LoRA file.  ``ranks`` and ``alphas`` count modules by value; ``family`` is the model it is for,
    in words; ``warnings`` are what a user should know."""

    path: Path
    size_bytes: int
    sha256: str
    kind: str
    family: str
    family_from: str
    form: str
    kinds: Mapping[str, int]
    modules: Mapping[str, int]
    ranks: Mapping[str, int]
    alphas: Mapping[str, int]
    types: Mapping[str, int]
    parameters: int
    embeddings: tuple[str, ...]
    other_tensors: tuple[str, ...]
    warnings: tuple[str, ...]
    settings: Mapping[str, Any] | None
    metadata: Mapping[str, str]


def inspect(path: Path) -> Facts:
    """Read a file.  Raises ModelFileError that names what it is, if it is no safetensors file or contains no LoRA."""
    found = contents.read_contents(path)
    if not found.is_lora:
        raise contents.no_lora(path, found)
    tensors = load_tensors(path)
    return Facts(
        path=path,
        size_bytes=path.stat().st_size,
        sha256=sha256_file(path),
        kind=found.kind,
        family=found.made_for.title,
        family_from=found.made_for.why,
        form=found.form,
        kinds=_by_count(Counter(found.kinds.values())),
        modules=found.components,
        ranks=_by_count(found.ranks),
        alphas=_by_count(values.alphas_of(found, tensors)),
        types=_by_count(Counter(kind for name, kind in found.types.items() if not name.endswith(".alpha"))),
        parameters=sum(
            math.prod(shape) for name, shape in found.shapes.items() if not name.endswith(".alpha")
        ),
        embeddings=tuple(found.keys.bundled),
        other_tensors=found.strays,
        warnings=(*found.notes, *values.value_notes(found, tensors)),
        settings=_settings(found.own_metadata),
        metadata=found.own_metadata,
    )


def as_json(facts: Facts) -> dict[str, Any]:
    """Everything, for scripts.  Metadata values that are JSON are parsed."""
    values = {name: getattr(facts, name) for name in Facts.__dataclass_fields__}
    values["path"] = str(facts.path)
    values["metadata"] = {name: _opened(text) for name, text in sorted(facts.metadata.items())}
    values["metadata"].pop(CONFIG_KEY, None)
    return values


def show(console: Console, facts: Facts) -> None:
    """Print everything, for people."""
    rows = [
        ("file", f"{facts.path} ({facts.size_bytes / 1e6:.2f} MB)"),
        ("sha256", facts.sha256),
        ("kind", f"{facts.kind} for {facts.family}"),
        ("model", f"{facts.family}: {facts.family_from}"),
        ("keys", facts.form),
        ("modules", _words(facts.modules)),
        ("rank", _words(facts.ranks, "modules")),
        ("alpha", _words(facts.alphas, "modules") or "–"),
        ("data type", _words(facts.types, "tensors")),
        ("parameters", f"{facts.parameters:,}"),
    ]
    if facts.embeddings:
        rows.append(("embeddings", ", ".join(facts.embeddings)))
    rows += [("warning", text) for text in facts.warnings]
    _print(console, rows)
    if facts.settings is not None:
        usual = TrainConfig().as_dict() if console.is_terminal else {}
        shown = {
            name: value
            for name, value in facts.settings.items()
            if name not in usual or value != usual[name] or name in ALWAYS
        }
        console.print(Text("\nsettings", style="bold"))
        _print(console, [(name, "–" if value in (None, "") else str(value)) for name, value in shown.items()])
        if left_out := len(facts.settings) - len(shown):
            console.print(
                Text(f"  and {left_out} with their defaults (the same command with | cat lists them)")
            )
    metadata = [(name, text) for name, text in sorted(facts.metadata.items()) if name != CONFIG_KEY]
    console.print(
        Text(
            "\nmetadata" if metadata else "\nno metadata: the file does not record how it was trained",
            style="bold",
        )
    )
    _print(
        console, [(n, t if len(t) <= LONG else f"{t[:LONG]} … ({len(t)} characters)") for n, t in metadata]
    )


def _print(console: Console, rows: list[tuple[str, str]]) -> None:
    table = Table(box=None, padding=(0, 1), show_edge=False, show_header=False)  # a sha256 fits 80 columns
    table.add_column(overflow="fold", style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(clean_text(name)), Text(clean_text(value)))
    console.print(table)


def _words(counts: Mapping[str, int], what: str = "") -> str:
    if len(counts) == 1 and what:
        return next(iter(counts))
    return ", ".join(f"{name}: {count} {what}".rstrip() for name, count in counts.items())


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def _settings(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    found = _opened(metadata.get(CONFIG_KEY, ""))
    return found if isinstance(found, dict) else None


def _opened(text: str) -> Any:
    if text[:1] not in ("{", "["):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
