"""Shipped: traces of the usual settings as part of the package, so that a first ``hpo plan`` has nothing to trace.

Owns the file ``shipped.xz`` and its form; ``trainer.memory.makeshipped`` says which traces are in it, and makes it. A
shipped trace is found only under the same settings, the same networks and the same versions of the libraries; any
other question is traced as before. It is not bound to this tool's source code: a test compares shipped traces with
fresh ones.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig

# Lines of key, tab, JSON: traces have most in common, so one pack.
FILE = Path(__file__).with_name("shipped.xz")


def read(question: Mapping[str, Any], versions: Mapping[str, str]) -> Any:
    """The shipped answer to a question of ``store``, as its JSON table. Raises KeyError if there is none, and OSError,
    LZMAError or ValueError if the file is missing or damaged."""
    return _events_turned(json.loads(_lines()[key_of(question, versions)]))


def write(answers: Mapping[str, Any]) -> None:
    """Write the file: key → table."""
    lines = [f"{key}\t{json.dumps(_events_turned(answers[key]), separators=(',', ':'))}\n" for key in answers]
    FILE.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))
    _lines.cache_clear()


@lru_cache(maxsize=1)
def _lines() -> dict[str, str]:
    text = lzma.decompress(FILE.read_bytes()).decode()
    return dict(line.split("\t", 1) for line in text.splitlines())


def key_of(question: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The key of a question.  Settings with their default value are left out, so that a new setting changes no
    question. The build of a library (torch 2.10.0+cu128) makes no difference on the meta device."""
    usual = TrainConfig().as_dict()
    asked = dict(question)
    if "settings" in asked:
        asked["settings"] = {k: v for k, v in asked["settings"].items() if k not in usual or v != usual[k]}
    released = {name: text.split("+")[0] for name, text in versions.items() if name != "python"}
    text = json.dumps({**asked, "versions": released}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _events_turned(table: Any) -> Any:
    """A trace's events n, ~n (allocate and free block n) in the form 0, k (allocate the next block; free the one
    allocated k blocks ago), or back. Repeated layers are equal in this form: a tenth of the size when packed."""
    if not isinstance(table, dict) or "events" not in table:
        return table
    events, turned, allocated = table["events"], [], 0
    is_numbered = events[0] == 0 and any(event < 0 for event in events)
    for event in events:
        if is_numbered:
            turned.append(0 if event >= 0 else allocated - ~event)
        else:
            turned.append(allocated if event == 0 else ~(allocated - event))
        allocated += event >= 0 if is_numbered else event == 0
    return {**table, "events": turned}
