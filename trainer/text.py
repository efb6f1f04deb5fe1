"""Text from outside, made safe to print: nothing in it that a terminal would act on."""

from __future__ import annotations

import unicodedata


def clean_text(text: str) -> str:
    """``text`` safe to print on one line: no control characters, no escapes, no change of writing direction."""
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    kind = unicodedata.category(character)
    if character in "\t\n\r\v\f" or kind in ("Zl", "Zp"):
        return " "
    if kind == "Cs":  # half a surrogate pair, from a file name that is not UTF-8: cannot be printed
        return "\ufffd"
    return "" if kind in ("Cc", "Cf") else character
