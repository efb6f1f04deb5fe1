"""``hpo inspect``: what a LoRA file contains: modules, ranks, alphas, metadata.

Also works with files from other tools.  Reads only the header and the alphas, not the weights.  Control
characters in text from the file are removed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from trainer.adapters import CONFIG_KEY, lorafile
from trainer.bases import FAMILIES
from trainer.errors import ModelFileError
from trainer.files import sha256_file
from trainer.tensorfile import Header, read_header
from trainer.text import clean_text

LONG = 160  # maximum length of a metadata value in the table; --json shows it in full
# The end of a tensor's name: its role, and with it the kind of adapter.
_ENDINGS = re.compile(
    r"\.(?P<what>lora_down\.weight|lora_up\.weight|lora_A(?:\.\w+)?\.weight|lora_B(?:\.\w+)?\.weight"
    r"|lora\.down\.weight|lora\.up\.weight|lora_linear_layer\.(?:down|up)\.weight|lora_mid\.weight"
    r"|hada_\w+|lokr_\w+|dora_scale|lora_magnitude_vector(?:\.\w+)?|alpha|diff|diff_b|w_norm|b_norm|scalar)$"
)
_COMPONENTS = (
    ("lora_unet_", "U-Net"),
    ("unet.", "U-Net"),
    ("lora_te1_", "first text encoder"),
    ("lora_te2_", "second text encoder"),
    ("lora_te_", "text encoder"),
    ("text_encoder_2.", "second text encoder"),
    ("text_encoder.", "text encoder"),
)


@dataclass(frozen=True)
class Facts:
    """The contents of a LoRA file.  ``ranks`` and ``alphas`` count modules by value."""

    path: Path
    size_bytes: int
    sha256: str
    kind: str
    family: str
    modules: Mapping[str, int]
    ranks: Mapping[str, int]
    alphas: Mapping[str, int]
    types: Mapping[str, int]
    parameters: int
    other_tensors: tuple[str, ...]
    settings: Mapping[str, Any] | None
    metadata: Mapping[str, str]


def inspect(path: Path) -> Facts:
    """Read a file.  Raises ModelFileError if it is not a safetensors file or contains no adapter."""
    header = read_header(path)
    modules: dict[str, set[str]] = {}
    others = []
    for name in header.shapes:
        match = _ENDINGS.search(name)
        if match is None:
            others.append(name)
        else:
            modules.setdefault(name[: match.start()], set()).add(match["what"])
    if not modules:
        raise ModelFileError(
            f"{path} contains no LoRA",
            "give a LoRA file; the tensors here are " + ", ".join(clean_text(n[:80]) for n in others[:3]),
        )
    ranks: Counter[str] = Counter()
    parameters = 0
    for name, shape in header.shapes.items():
        size = 1
        for side in shape:
            size *= side
        parameters += 0 if name.endswith(".alpha") else size
    for module, parts in modules.items():
        ranks[_rank(header.shapes, module, parts)] += 1
    types, alphas = _stored(path, sum(1 for parts in modules.values() if "alpha" not in parts))
    return Facts(
        path=path,
        size_bytes=path.stat().st_size,
        sha256=sha256_file(path),
        kind=_kind(header.shapes, modules),
        family=_family(header),
        modules=dict(Counter(_component(module) for module in modules)),
        ranks=_by_count(ranks),
        alphas=_by_count(alphas),
        types=_by_count(types),
        parameters=parameters,
        other_tensors=tuple(others),
        settings=_settings(header.metadata),
        metadata=header.metadata,
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
        ("modules", _words(facts.modules)),
        ("rank", _words(facts.ranks, "modules")),
        ("alpha", _words(facts.alphas, "modules")),
        ("data type", _words(facts.types, "tensors")),
        ("parameters", f"{facts.parameters:,}"),
    ]
    if facts.other_tensors:
        rows.append(("other tensors", f"{len(facts.other_tensors)}: {', '.join(facts.other_tensors[:5])}"))
    _print(console, rows)
    if facts.settings is not None:
        console.print(Text("\nsettings", style="bold"))
        _print(
            console,
            [(name, "–" if value in (None, "") else str(value)) for name, value in facts.settings.items()],
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
    table = Table(box=None, padding=(0, 2), show_edge=False, show_header=False)
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


def _rank(shapes: Mapping[str, tuple[int, ...]], module: str, parts: set[str]) -> str:
    """The rank of a module: the dimension shared by its two factors."""
    for part in sorted(parts):
        shape = shapes[f"{module}.{part}"]
        first = re.fullmatch(r"(lora_down|lora_A.*|lora\.down|lora_linear_layer\.down)(\.weight)?", part)
        if shape and (first or part in ("hada_w1_b", "hada_w2_b", "lokr_w2_b", "lokr_w1_b")):
            return str(shape[0])
    return "full" if any(part.startswith("lokr_") for part in parts) else "–"


def _kind(shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, set[str]]) -> str:
    parts = set().union(*modules.values())
    if any(part.startswith("hada_") for part in parts):
        return "LoHa"
    if any(part.startswith("lokr_") for part in parts):
        return "LoKr"
    if "dora_scale" in parts or any(part.startswith("lora_magnitude_vector") for part in parts):
        return "DoRA"
    downs = [
        shape
        for name, shape in shapes.items()
        if re.search(r"(lora_down|lora_A[^/]*|lora\.down)\.weight$", name)
    ]
    return "LoCon" if any(len(shape) == 4 and shape[-1] > 1 for shape in downs) else "LoRA"


def _family(header: Header) -> str:
    version = header.metadata.get("ss_base_model_version", "")
    if version:
        return clean_text(version)[:40]
    return f"{FAMILIES[lorafile.family_of(header.metadata, header.shapes)].title} (guessed from the tensor names)"


def _component(module: str) -> str:
    return next((words for start, words in _COMPONENTS if module.startswith(start)), "other")


def _stored(path: Path, without_alpha: int) -> tuple[Counter[str], Counter[str]]:
    """Count the data types of the tensors and the values of the alphas."""
    types: Counter[str] = Counter()
    alphas: Counter[str] = Counter()
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 – not a dict
                if name.endswith(".alpha"):
                    alphas[f"{float(file.get_tensor(name).float().mean()):g}"] += 1
                else:
                    types[str(file.get_slice(name).get_dtype())] += 1
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelFileError(
            f"cannot read {path}: {clean_text(str(error))}", "the file is damaged; copy it again"
        ) from None
    if without_alpha:
        alphas["none (readers take the rank)"] += without_alpha
    return types, alphas


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
