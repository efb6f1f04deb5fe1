"""Training files as Colab notebooks write them: their cells run, with each choice of their forms."""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_FORM = re.compile(r"^(\w+) *= *(.+?) *#@?\s*@?param *(\[.*?\]|\{.*?\})?", re.MULTILINE)


def write_notebook(path: Path, out: Path, *, leave_arguments: bool = False) -> int:
    """The TOML that a notebook writes: with its form as it is, and with each other choice of each list. With another
    optimizer the field for arguments of the optimizer is emptied, unless ``leave_arguments``: sd-scripts ends if they
    are those of another one."""
    cells = [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    texts = [_python("".join(cell["source"])) for cell in cells]
    texts = [text for text in texts if _WRITES.search(text) and "gen_img" not in text]
    folder = out / f"{path.absolute().parent.name}-{path.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    for name, changed in _choices(texts, leave_arguments):
        for number, text in enumerate(_run_cells(changed)):
            (folder / f"{name}-{number}.toml").write_text(text, encoding="utf-8")
            written += 1
    return written


# Cells that say something of the network, the optimizer or the training; not those that upload or draw.
_WRITES = re.compile(r"network_module *=|optimizer_type *=|[\"']network_module[\"']|train_batch_size *=")
# Fields for the optimizer, and the field for arguments of the one that is chosen first.
_OPTIMIZERS = ("optimizer_type", "optimizer")
_ARGUMENTS = re.compile(r"^(optimizer_args *= *).+?( *#@? *@?param)", re.MULTILINE)
_COMMAND = re.compile(r"^([ \t]*)[!%](?:[^\n]*\\\n)*[^\n]*$", re.MULTILINE)


def _python(cell: str) -> str:
    """A cell without commands of the shell and of the notebook, and without the start of everything."""
    return re.sub(r"^main\(\)\s*$", "", _COMMAND.sub(r"\1pass", cell), flags=re.MULTILINE)


def _choices(cells: Sequence[str], leave_arguments: bool) -> Iterator[tuple[str, list[str]]]:
    yield "default", list(cells)
    for place, cell in enumerate(cells):
        for match in _FORM.finditer(cell):
            name, value, listed = match.groups()
            try:
                choices = ast.literal_eval(listed) if (listed or "").startswith("[") else []
                choices = [*choices, *([True, False] if value in ("True", "False") else [])]
                for choice in [entry for entry in choices if entry != ast.literal_eval(value)]:
                    line = match[0].replace(value, repr(choice), 1)
                    changed = [*cells[:place], cell.replace(match[0], line, 1), *cells[place + 1 :]]
                    if name in _OPTIMIZERS and not leave_arguments:
                        changed = [_ARGUMENTS.sub(r'\1""\2', text) for text in changed]
                    yield f"{name}={re.sub(r'[^A-Za-z0-9.]+', '-', str(choice))[:40]}", changed
            except (SyntaxError, ValueError):
                continue


def _run_cells(cells: Sequence[str]) -> list[str]:
    """Run the cells, and return every training configuration among what they would write."""
    written: list[dict[str, Any]] = []
    toml = sys.modules["toml"]
    plain: Callable[[Any], str] = toml.dumps

    def keep(table: Any) -> str:
        written.append(table)
        return plain(table)

    toml.dumps = keep  # type: ignore[attr-defined]
    names: dict[str, Any] = {
        "__name__": "notebook",
        "open": lambda *_, **__: io.StringIO("MemTotal: 13000000 kB"),
        "print": lambda *_: None,
    }
    names["os"] = _os()
    try:
        for cell in cells:
            _run_cell(cell, names)
        _run_cell("create_config()" if "create_config" in names else "", names)
    finally:
        toml.dumps = plain  # type: ignore[attr-defined]
    return [
        plain(table)
        for table in written
        if "network_module" in json.dumps(table, default=str) and len(table) > 2
    ]


def _run_cell(cell: str, names: dict[str, Any]) -> None:
    """Run a cell; a name that an earlier cell would have set is a text. A cell that needs the Colab machine ends."""
    try:
        code = compile(re.sub(r"^import os\s*$", "", cell, flags=re.MULTILINE), "notebook", "exec")
    except SyntaxError as error:
        sys.stderr.write(f"  {error}\n")
        return
    for _ in range(40):
        try:
            signal.setitimer(signal.ITIMER_REAL, 2.0)
            exec(code, names)
            return
        except NameError as error:
            names[error.name] = _missing(str(error.name))
        except Exception as error:
            if "toml" in cell:
                sys.stderr.write(f"  {type(error).__name__}: {error}\n")
            return
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def _missing(name: str) -> Any:
    """A module that an earlier cell would have imported, or a text."""
    if name in ("ast", "glob", "random", "re", "time"):
        return importlib.import_module(name)
    return "meta_lat.json" if "json" in name else ""


def _os() -> ModuleType:
    """The module os, which changes no folder and makes none."""
    module = ModuleType("os")
    module.__dict__.update(os.__dict__)
    module.chdir = module.makedirs = lambda *_, **__: None  # type: ignore[attr-defined]
    module.walk = lambda *_: iter(())  # type: ignore[attr-defined]
    return module
