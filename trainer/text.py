"""Make text from outside safe to print: no terminal control sequences."""

from __future__ import annotations

import unicodedata


def clean_text(text: str) -> str:
    """``text``, safe to print on one line: no control characters, escape sequences or changes of text direction."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    kind = unicodedata.category(character)
    if character in "\t\n\r\v\f" or kind in ("Zl", "Zp"):
        return " "
    if kind == "Cs":  # half a surrogate pair, from a file name that is not UTF-8: cannot be printed
        return "\ufffd"
    return "" if kind in ("Cc", "Cf") else character
