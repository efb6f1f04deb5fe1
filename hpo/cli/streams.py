"""Output streams that cannot show every sign: a pipe or terminal that is not UTF-8 (LC_ALL=C, cp1252, ascii).

Owns what is written instead of a sign that stdout or stderr cannot show. No command may end because of its own
output. Loads nothing but the standard library.
"""

from __future__ import annotations

import codecs
import os
import sys
from typing import Any

HANDLER = "hpo-plain"
ASCII = "ascii_plain"  # a name that click does not take for a misconfigured terminal and replace by UTF-8
PLAIN = {
    "–": "-", "—": "-", "−": "-", "‑": "-", "→": "->", "←": "<-", "×": "x", "·": "*", "•": "*", "…": "...",
    "±": "+/-", "≈": "~", "≤": "<=", "≥": ">=", "“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ",
    "─": "-", "━": "-", "│": "|", "┃": "|", "█": "#",
}  # fmt: skip


def plain(error: UnicodeError) -> tuple[str, int]:
    """The error handler: a similar sign in ASCII, else a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(PLAIN.get(sign, "?") for sign in signs), error.end


def _ascii_under_another_name(name: str) -> codecs.CodecInfo | None:
    if name != ASCII:
        return None
    known = codecs.lookup("ascii")
    return codecs.CodecInfo(
        known.encode,
        known.decode,
        known.streamreader,
        known.streamwriter,
        known.incrementalencoder,
        known.incrementaldecoder,
        name=ASCII,
    )


def open_closed() -> None:
    """Give standard streams that are closed, as a service or ``<&- >&-`` leaves them, a place that holds nothing.

    Else Python has no such stream, and the next file that is opened takes its number.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def show_everything() -> None:
    """Let stdout and stderr replace the signs that their encoding lacks. Call it before anything is printed.

    UTF-8 lacks signs as well: the undecodable bytes of a file's name.
    """
    codecs.register_error(HANDLER, plain)
    codecs.register(_ascii_under_another_name)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            _replace_signs(stream)


def _replace_signs(stream: Any) -> None:
    try:
        is_ascii = codecs.lookup(stream.encoding or "ascii").name == "ascii"
        stream.reconfigure(encoding=ASCII if is_ascii else None, errors=HANDLER)
    except (OSError, ValueError, LookupError):  # closed, or detached by a test's runner
        return
