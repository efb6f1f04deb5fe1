"""sample_prompts as sd-scripts reads it: a .txt, .toml or .json file, or the prompts themselves.

Owns the forms and what is said about them. Nothing here ends a training: what cannot be drawn is left out, and every
finding of a file is told at once, with its line. Source of the forms: library/train_util.py of sd-scripts
(``line_to_prompt_dict``, ``sample_images_common``, ``sample_image_inference``).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.paths import is_prompt_text, user_path
from trainer.reading import MAX_SETTINGS_BYTES, read_small
from trainer.text import clean_text

STEPS, SCALE = 30, 7.5  # sd-scripts' own, where a prompt names none
LEAST_SIDE_PX, MOST_SIDE_PX = 64, 8192  # sd-scripts raises a given side to 64
MOST_STEPS = 1000
SCALES = (1.0, 100.0)
SHOWN = 60
SAMPLER = "samples are drawn with DPM-Solver++ (2M)"
# flag → (key in TOML and JSON files, type, how a value looks to sd-scripts)
_FLAGS: dict[str, tuple[str, type, str]] = {
    "w": ("width", int, r"\d+"),
    "h": ("height", int, r"\d+"),
    "d": ("seed", int, r"\d+"),
    "s": ("sample_steps", int, r"\d+"),
    "l": ("scale", float, r"\d*\.?\d+|\d+\."),
    "n": ("negative_prompt", str, r".+"),
}
_KEYS = {key: kind for key, kind, _ in _FLAGS.values()} | {"prompt": str}
# flags and keys that sd-scripts reads and that change nothing here → why
_IDLE = {
    **dict.fromkeys(("ss", "sample_sampler"), SAMPLER),
    **dict.fromkeys(("g", "guidance_scale", "fs", "flow_shift"), "it is for Flux models"),
    **dict.fromkeys(("ctr", "cfg_trunc_ratio", "rcfg", "renorm_cfg"), "it is for Lumina models"),
    **dict.fromkeys(("cn", "controlnet_image"), "ControlNet images are not used"),
}
_STUCK = re.compile(r"\S(--(?:w|h|d|s|l|n|ss) \S+)", re.IGNORECASE)
_ALONE = "has flags without a prompt: left out; write them at the end of the prompt's line"


@dataclass(frozen=True)
class SamplePrompt:
    """One picture to draw."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    sample_steps: int
    scale: float


@dataclass(frozen=True)
class SamplePrompts:
    """The prompts that can be drawn, and a line about everything that was not taken as it stands."""

    prompts: tuple[SamplePrompt, ...] = ()
    findings: tuple[str, ...] = ()


def sample_prompts(config: TrainConfig) -> SamplePrompts:
    """The prompts of a run. Sizes default to the resolution, seeds to the run's. Raises nothing."""
    wanted = config.sample_every_n_epochs or config.sample_every_n_steps or config.sample_at_first
    text = config.sample_prompts
    if not text.strip():
        asked = ("sample images are requested, but sample_prompts is not set: none are drawn",)
        return SamplePrompts(findings=asked if wanted else ())
    try:
        return _Reading(config, *_rows(text)).done()
    except ConfigError as error:
        return SamplePrompts(findings=(f"{error.message}: no sample images are drawn",))


def _rows(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """What to call the prompts, and (place, line or table) of each. Raises ConfigError."""
    name = text.strip()
    if is_prompt_text(name):
        shown, content, ending = "sample_prompts", text, ".json" if name.startswith(("[", "{")) else ".txt"
    else:
        path = Path(user_path(name, "sample_prompts"))
        shown, content, ending = clean_text(str(path)), _content(path), path.suffix.lower()
    try:
        if ending == ".toml":
            return shown, _tables(_of_toml(tomllib.loads(content)))
        if ending == ".json":
            return shown, _tables(json.loads(content))
    except (ValueError, RecursionError) as error:
        if shown != "sample_prompts":  # a prompt may begin with a bracket
            raise ConfigError(f"{shown} is not a {ending} file: {clean_text(str(error))[:120]}") from None
    lines = ((f"line {number}", line) for number, line in enumerate(content.splitlines(), 1))
    return shown, [(place, line) for place, line in lines if line.strip() and line[0] != "#"]


def _content(path: Path) -> str:
    """The text of a file, without a byte order mark."""
    shown = clean_text(str(path))
    try:
        return read_small(path, MAX_SETTINGS_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"sample_prompts = {shown} is not a text in UTF-8") from None
    except FileNotFoundError:
        raise ConfigError(f"sample_prompts = {shown} does not exist") from None
    except OSError as error:
        raise ConfigError(f"sample_prompts = {shown} cannot be read ({error.strerror})") from None


def _of_toml(table: Mapping[str, Any]) -> list[Any]:
    """[prompt] holds what all prompts share, each [[prompt.subset]] is one of them."""
    common = table.get("prompt")
    if not isinstance(common, Mapping):
        raise ValueError("it has no table [prompt]")
    subsets = common.get("subset", [{}])
    shared = {name: value for name, value in common.items() if name != "subset"}
    if not isinstance(subsets, list):
        raise ValueError("prompt.subset is not a list of tables")
    return [{**shared, **row} if isinstance(row, Mapping) else row for row in subsets]


def _tables(rows: Any) -> list[tuple[str, Any]]:
    if not isinstance(rows, list):
        raise ValueError("it is not a list of prompts")
    return [(f"prompt {number}", row) for number, row in enumerate(rows, 1)]


class _Reading:
    """The prompts of one file, and what is said of them."""

    def __init__(self, config: TrainConfig, shown: str, rows: list[tuple[str, Any]]) -> None:
        self.config, self.shown, self.rows = config, shown, rows
        self.findings: list[str] = []
        self.ignored: dict[str, list[str]] = {}

    def done(self) -> SamplePrompts:
        found = [prompt for place, row in self.rows if (prompt := self._drawable(place, row)) is not None]
        if not self.rows:
            self.findings.append(f"{self.shown} has no prompts: no sample images are drawn")
        for what, places in self.ignored.items():
            self.findings.append(f"{self.shown}, {', '.join(places)}: {what}")
        return SamplePrompts(tuple(found), tuple(self.findings))

    def _say(self, place: str, text: str) -> None:
        self.findings.append(f"{self.shown}, {place} {text}")

    def _ignore(self, place: str, what: str) -> None:
        places = self.ignored.setdefault(what, [])
        if place not in places:
            places.append(place)

    def _drawable(self, place: str, row: Any) -> SamplePrompt | None:
        try:
            return self._prompt(place, row)
        except (ValueError, OverflowError):  # hundreds of digits
            self._say(place, "is left out: it has a number that is too large")
            return None

    def _prompt(self, place: str, row: Any) -> SamplePrompt | None:
        values = self._of_line(place, row) if isinstance(row, str) else self._of_table(place, row)
        if values is None:
            return None
        if not values.get("prompt"):
            self._say(place, _ALONE if isinstance(row, str) else "has no text in prompt: left out")
            return None
        width, height = (max(8, side // 8 * 8) for side in self.config.size_px)
        found = SamplePrompt(
            values["prompt"],
            values.get("negative_prompt", ""),
            self._side(place, "width", values.get("width"), width),
            self._side(place, "height", values.get("height"), height),
            values.get("seed", self.config.seed),
            max(1, min(MOST_STEPS, values.get("sample_steps", STEPS))),
            float(values.get("scale", SCALE)),
        )
        if found.sample_steps != values.get("sample_steps", STEPS):
            self._say(
                place,
                f"sample_steps {values['sample_steps']} becomes {found.sample_steps} (1 to {MOST_STEPS})",
            )
        return found if self._fits(place, found) else None

    def _fits(self, place: str, found: SamplePrompt) -> bool:
        """Whether it can be drawn; says all that is out of its limits."""
        limits = (
            ("width", found.width, 8, MOST_SIDE_PX),
            ("height", found.height, 8, MOST_SIDE_PX),
            ("seed", found.seed, 0, 2**63 - 1),
            ("scale", found.scale, *SCALES),
        )
        wrong = [
            f"{name} {value:g} is outside {low:g} to {high:g}" if name == "scale" else
            f"{name} {value} is outside {low} to {high}"
            for name, value, low, high in limits
            if not low <= value <= high
        ]  # fmt: skip
        if wrong:
            self._say(place, f"is left out: {', '.join(wrong)}")
        return not wrong

    def _side(self, place: str, name: str, given: int | None, usual: int) -> int:
        """A side in px: sd-scripts rounds it down to a multiple of 8, and up to 64."""
        if given is None:
            return usual
        side = max(LEAST_SIDE_PX, given // 8 * 8)
        if side != given:
            self._say(place, f"{name} {given} becomes {side}: a multiple of 8, at least {LEAST_SIDE_PX}")
        return side

    def _of_table(self, place: str, row: Any) -> dict[str, Any] | None:
        if not isinstance(row, Mapping):
            self._say(place, "is neither a text nor a table: left out")
            return None
        values, sound = {}, True
        for name, value in row.items():
            if name not in _KEYS:
                self._unknown(place, clean_text(str(name))[:SHOWN], str(name))
                continue
            kind = _KEYS[name]
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                word = {str: "a text", int: "a whole number", float: "a number"}[kind]
                self._say(place, f"is left out: {name} = {clean_text(str(value))[:SHOWN]} is not {word}")
                sound = False
            values[name] = value.strip() if isinstance(value, str) else value
        return values if sound else None

    def _of_line(self, place: str, line: str) -> dict[str, Any]:
        """``text --w 512 --h 768 --d 1 --s 20 --l 7 --n negative``"""
        line = line.strip()
        if line.startswith("--"):
            line = " " + line
        text, *flags = line.split(" --")
        values: dict[str, Any] = {"prompt": text.strip()}
        for stuck in _STUCK.findall(text):
            self._say(
                place,
                f"{clean_text(stuck)[:SHOWN]!r} has no space before it: drawn as text, as in sd-scripts",
            )
        for key, value in self._flags(place, flags):
            values[key] = value
        return values

    def _flags(self, place: str, flags: list[str]) -> Iterator[tuple[str, Any]]:
        for flag in flags:
            name, _, value = flag.partition(" ")
            shown = f"--{clean_text(flag)[:SHOWN]}"
            if name.lower() not in _FLAGS:
                self._unknown(place, f"--{clean_text(name)[:SHOWN]}" if name else shown, name.lower())
                continue
            key, kind, form = _FLAGS[name.lower()]
            match = re.match(form, value.strip())
            if match is None:
                self._say(place, f"{shown}: {key} is not a number: ignored" if kind is not str else
                          f"{shown}: {key} is empty: ignored")  # fmt: skip
                continue
            yield key, kind(match[0])

    def _unknown(self, place: str, shown: str, name: str) -> None:
        why = _IDLE.get(name)
        self._ignore(place, f"{shown} is ignored: {why}" if why else
                     f"{shown} is unknown and ignored, as by sd-scripts (known: --w --h --d --s --l --n)")  # fmt: skip
