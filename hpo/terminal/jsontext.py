"""What ``--json`` prints: one JSON value.

Owns its form: ASCII, so that nothing in it can control a terminal; numbers finite or null, as JSON has no others; a
path as text.  Does not own the contents; they are the command's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def json_text(value: Any) -> str:
    """The value as text."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """The value as JSON has it.  Infinity and not-a-number become null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):  # NumPy's float64 is one
        return float(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
