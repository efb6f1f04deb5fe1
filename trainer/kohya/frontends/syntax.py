"""What is wrong with a line that is not valid TOML or JSON, as one can mend it."""

from __future__ import annotations

import re

from trainer.text import clean_text

_PLACE = re.compile(r"\(?at line (\d+), column \d+\)?")
_PATH = re.compile(r"^[A-Za-z]:")
_CONTROL = re.compile(r"[\b\t\n\f\r]")


def toml_mistake(text: str, error: Exception) -> tuple[str, str]:
    """(what is wrong, what to do) for an error of tomllib."""
    message = clean_text(str(error))
    match = _PLACE.search(message)
    lines = text.splitlines()
    if match is None or not lines:
        return (
            f"is not valid TOML: {message}",
            "correct its last line" if "end of document" in message else "correct it",
        )
    number = min(int(match[1]), len(lines))
    line = lines[number - 1]
    where = f"line {number} is not valid TOML: {clean_text(line.strip())[:120]}"
    hint = _toml_hint(line, message)
    return (f"{where}", hint) if hint else (f"{where} ({message})", "correct this line")


def _toml_hint(line: str, message: str) -> str:
    name, equals, value = line.partition("=")
    name, value = name.strip(), value.strip()
    bare = re.sub(r"\s+#.*$", "", value)
    if equals and re.search(r'"[^"]*\\[^"]*"?', value):
        return (
            "write paths in single quotes, or with /: a backslash in double quotes has a meaning of its own"
        )
    if equals and bare in ("True", "False"):
        return f"write {bare.lower()} in small letters"
    if equals and bare in ("None", "null", "nil", "none"):
        return "TOML has no such value; remove the line"
    if not equals and re.match(r"^\s*[\w\"'-]+\s*:", line):
        return "write key = value; key: value is YAML"
    if not equals and re.match(r"^\s*--\w", line):
        return "this is a flag of a command line; write key = value"
    if equals and value.count('"') % 2:
        return "a quote is missing"
    if equals and not value:
        return 'write a value, or remove the line; an empty text is ""'
    if equals and re.match(r"^[A-Za-z_./~\\]", bare) and bare not in ("true", "false", "inf", "nan"):
        return "write texts in quotes"
    if equals and re.match(r"^\d+(,\d{3})+$", bare):
        return "write numbers without a comma"
    if equals and re.match(r"^\d+,\d+$", bare):
        return 'write a number with a point, or a size in quotes: "512,512"'
    if "overwrite" in message or "twice" in message.lower() or "Cannot declare" in message:
        return f"{clean_text(name)[:80] or 'this'} stands twice; keep one"
    if equals and re.search(r"[“”‘’]", value):
        return 'write straight quotes: "…"'
    return ""


def json_mistake(text: str, message: str, number: int) -> tuple[str, str]:
    """(what is wrong, what to do) for an error of json in line ``number``."""
    lines = text.splitlines() or [""]
    line = lines[min(number, len(lines)) - 1]
    before = lines[number - 2].rstrip() if 1 < number <= len(lines) else ""
    where = f"line {number} is not valid JSON: {clean_text(line.strip())[:120]}"
    if re.search(r"\\", line) and "escape" in message.lower():
        return where, "write paths with / or with two backslashes"
    if re.search(r"^\s*(//|#)", line):
        return where, "JSON has no comments; remove it"
    if line.strip()[:1] in ("}", "]") and before.endswith(","):
        return where, "remove the comma in the line before"
    if re.search(r":\s*(True|False|None)\b", line):
        return where, "write true, false or null in small letters"
    if re.search(r"'", line) and '"' not in line:
        return where, "write double quotes"
    return f"{where} ({clean_text(message)})", "correct this line"


def broken_path(value: object) -> str | None:
    r"""What a Windows path in double quotes became: in "C:\new" TOML reads \n as the end of a line."""
    if isinstance(value, str) and _PATH.match(value) and _CONTROL.search(value):
        return re.sub(
            _CONTROL,
            lambda found: {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f"}.get(found[0], "\\r"),
            value,
        )
    return None
