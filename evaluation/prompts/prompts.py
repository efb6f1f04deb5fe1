"""Prompt sets: rendered texts, scored texts and seeds, fixed for a whole study.

Owns the choice, the trigger → class word rule, token limits, the file format and the hash. Does not
own the wording of templates (``evaluation.prompts.templates``), sampling
(``evaluation.images.sampling``) or scoring (``evaluation.score.score``).

The scored text is derived from the rendered text and never written separately, so the two cannot drift apart.
The trigger is replaced by the class word because a rare token has an arbitrary text embedding (LyCORIS, arXiv
2309.14859, D.4).  The id of a prompt is the hash of its text: adding a prompt changes no other image.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import tomlkit

from evaluation.prompts.kinds import CLASS_SEEDS, KINDS, SEARCH_COUNTS, SEARCH_SEEDS
from evaluation.prompts.tags import tag_templates
from evaluation.prompts.templates import QUALITY, STYLE, TAGS, TEMPLATES
from trainer.checks import suggestion
from trainer.errors import ConfigError
from trainer.files import write_atomic
from trainer.reading import MAX_SETTINGS_BYTES, read_small

MAX_TOKENS = 75  # CLIP's 77 without start and end tokens; later tokens are truncated silently
_FLAG = re.compile(r"(^|\s)--(w|h|d|s|l|n|ss|g|cn) \S", re.IGNORECASE)  # of sd-scripts' sample prompts
SHOWN_LINES = 8
SHORT_TOKENS = 40  # of generated prompts: CLIP gives late tokens little weight (Long-CLIP, arXiv 2403.15378)

CountTokens = Callable[[str], int]  # text → number of tokens, without start and end: ``Base.token_count``


@dataclass(frozen=True)
class Prompt:
    """One prompt. ``text`` is rendered, ``scored_text`` is what the scorer compares the image with.

    If it has ``seeds``, they replace those of the set.  ``told``: what the untrained base is asked for, where that is
    not the scored text.
    """

    text: str
    scored_text: str
    kind: str
    seeds: tuple[int, ...] = ()
    told: str = ""

    @property
    def class_text(self) -> str:
        """What the untrained base draws: the text with the class word instead of the trigger."""
        return self.told or self.scored_text

    @property
    def id(self) -> str:
        """First 16 hex digits of the sha256 of the text. The noise of an image depends only on this
        id and the seed."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def asks_for_subject(self) -> bool:
        """Whether likeness is measured (a class-only prompt must not show the subject)."""
        return self.kind != "class-only"


@dataclass(frozen=True)
class PromptSet:
    """Prompts × seeds of a study. ``notes`` are shown to the user once and are not part of the hash.

    ``quality``: tags that are drawn and not scored, since no image shows that it is a masterpiece.
    """

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    trigger: str | None = None
    class_word: str | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    quality: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = [p.id for p in self.prompts]
        twice = [p.text for p in self.prompts if ids.count(p.id) > 1]
        if twice:
            raise ConfigError(f"the prompt {twice[0]!r} appears twice", "remove one of them")
        if len(self.prompts) < 2:
            raise ConfigError(
                "a prompt set needs at least 2 prompts",
                "add a prompt: the chance level is measured between prompts",
            )
        if not any(p.asks_for_subject for p in self.prompts):
            raise ConfigError(
                "every prompt is class-only",
                "add prompts with {trigger}: likeness needs images of the subject",
            )
        for seeds in (self.seeds, *(p.seeds for p in self.prompts if p.seeds)):
            if not seeds or len(set(seeds)) != len(seeds):
                raise ConfigError(
                    f"seeds {list(seeds)} are empty or repeated", "give a list of different whole numbers"
                )
            if any(isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**63 for s in seeds):
                raise ConfigError("seeds must be whole numbers from 0", "write for example seeds = [0, 1]")

    @property
    def hash(self) -> str:
        """sha256 of everything that decides images and scores: texts, scored texts, kinds and seeds, in any order."""
        rows = sorted(
            [p.text, p.scored_text, p.kind, *([sorted(p.seeds)] if p.seeds else [])] for p in self.prompts
        )
        return hashlib.sha256(json.dumps([rows, sorted(self.seeds)]).encode()).hexdigest()

    def seeds_of(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt.seeds or self.seeds

    @property
    def jobs(self) -> tuple[tuple[Prompt, int], ...]:
        """(prompt, seed) of every image, prompt by prompt."""
        return tuple((prompt, seed) for prompt in self.prompts for seed in self.seeds_of(prompt))

    @property
    def image_count(self) -> int:
        return len(self.jobs)

    @property
    def size(self) -> str:
        """The size of the set in words, for example ``15 prompts × 2 seeds, 1 × 8``."""
        counts = Counter(len(self.seeds_of(prompt)) for prompt in self.prompts).items()
        (first, seeds), *more = [(prompts, seeds) for seeds, prompts in counts]
        words = f"{first} prompt{'s'[: first > 1]} × {seeds} seed{'s'[: seeds > 1]}"
        return ", ".join([words, *(f"{prompts} × {seeds}" for prompts, seeds in more)])


def scored_text(text: str, trigger: str | None, class_word: str | None) -> str:
    """``text`` with the trigger replaced by the class word (``zkw girl`` and ``zkw`` both become ``girl``)."""
    if not trigger or not _names(trigger, text):
        return text
    if not class_word:
        raise no_class_word()
    plain = re.sub(_whole(trigger), lambda _: class_word, text, flags=re.IGNORECASE)
    word = re.escape(class_word)
    return re.sub(
        rf"(?<!\w){word}(?:\s*,?\s+{word})+(?!\w)", lambda _: class_word, plain, flags=re.IGNORECASE
    )


def _whole(word: str) -> str:
    return rf"(?<!\w){re.escape(word)}(?!\w)"


def _names(trigger: str, text: str) -> bool:
    return re.search(_whole(trigger), text, re.IGNORECASE) is not None


def no_class_word() -> ConfigError:
    return ConfigError(
        "no class word is given; the scored texts need it",
        "give it with --class, for example --class girl (for a style: --class style), or in the folder name: "
        "10_trigger class",
    )


def without_quality(text: str, quality: Sequence[str]) -> str:
    """``text`` without these tags; the whole text if there is nothing else."""
    if not quality:
        return text
    kept = [tag for tag in re.split(r"\s*,\s*", text) if tag.lower() not in quality]
    return ", ".join(kept) or text


def make_prompt(
    template: str, kind: str, trigger: str | None, class_word: str | None, quality: Sequence[str] = ()
) -> Prompt:
    """A prompt from plain text, or from text with {trigger} and {class}.  ``quality``: tags that are not scored."""
    if kind not in KINDS:
        raise ConfigError(
            f"kind {kind!r} is not known", suggestion(kind, KINDS) or "use one of " + ", ".join(KINDS)
        )
    if "{class}" in template and not class_word:
        raise no_class_word()
    text = template.replace("{trigger}", trigger or "").replace("{class}", class_word or "")
    text = " ".join(unicodedata.normalize("NFC", text).split())
    stray = re.search(r"[{}][^{}]*[}]?", text)
    if stray:
        raise ConfigError(
            f"{stray.group()!r} in the prompt {template!r} is not known",
            "only {trigger} and {class} can be used",
        )
    if not text:
        raise ConfigError(f"the prompt {template!r} is empty", "describe what the image should show")
    plain = scored_text(text, trigger, class_word)
    if kind == "class-only" and plain != text:
        raise ConfigError(f"the class-only prompt {text!r} contains the trigger", "use {class} only")
    scored = without_quality(plain, quality)
    return Prompt(text, scored, kind, told="" if scored == plain else plain)


def shorten(text: str, count_tokens: CountTokens, limit: int = SHORT_TOKENS) -> str:
    """``text`` cut after the last clause that ends within ``limit`` tokens, or inside the first clause
    if it is longer."""
    if count_tokens(text) <= limit:
        return text
    ends = [m.start() for m in re.finditer(r"[,;.:]\s", text)] or []
    words = [m.start() for m in re.finditer(r"\s", text)]
    for places in (ends, words):
        for end in reversed(places):
            shorter = text[:end].rstrip(" ,;.:")
            if shorter and count_tokens(shorter) <= limit:
                return shorter
    raise ConfigError(f"the first word of {text[:40]!r} is longer than {limit} tokens", "shorten the caption")


def _as_prompt(caption: str, trigger: str | None, class_word: str | None, count_tokens: CountTokens) -> str:
    """A caption as a prompt template: shortened, and with the trigger in front if it was cut off."""
    text = caption.replace("{", "(").replace("}", ")")
    short = shorten(text, count_tokens)
    if not trigger or not _names(trigger, text) or _names(trigger, short):
        return short
    head = " ".join(word for word in (trigger, class_word) if word) + ","
    room = max(1, SHORT_TOKENS - count_tokens(head))
    return f"{head} {shorten(text, count_tokens, room)}"


def generate(
    captions: Iterable[str],
    *,
    trigger: str | None,
    class_word: str | None,
    count_tokens: CountTokens,
    words: str = "natural",
    separator: str = ",",
    counts: Mapping[str, int] = SEARCH_COUNTS,
    seeds: Sequence[int] = SEARCH_SEEDS,
    class_seeds: int = CLASS_SEEDS,
    exclude: PromptSet | None = None,
) -> PromptSet:
    """A prompt set from the dataset's captions (train-like) and ``TEMPLATES[words]`` (the other kinds; ``tags``: from
    the tags of the captions, which ``separator`` divides).

    Captions are taken in the order of their hashes, so the choice does not depend on file names. If a kind
    has too few prompts, altered templates fill the gap. Prompts in ``exclude`` are not used, so a
    confirmation set is disjoint.
    """
    used = {p.id for p in exclude.prompts} if exclude else set()
    ordered = sorted(
        {" ".join(c.split()) for c in captions} - {""}, key=lambda c: hashlib.sha256(c.encode()).digest()
    )
    short = {c: _as_prompt(c, trigger, class_word, count_tokens) for c in ordered}
    quality = QUALITY if words in (TAGS, TAGS + STYLE) else ()
    templates = tag_templates(ordered, trigger, class_word, separator) if words == TAGS else TEMPLATES[words]
    if quality:
        templates = {
            kind: tuple(_fitted(text, trigger, class_word, count_tokens) for text in texts)
            for kind, texts in templates.items()
        }
    make = partial(make_prompt, trigger=trigger, class_word=class_word, quality=quality)
    sources = {"train-like": tuple(short.values()), **templates}
    chosen: dict[str, Prompt] = {}
    missing = 0
    for kind in KINDS:
        chosen, lacking = _take(chosen, used, sources.get(kind, ()), kind, counts.get(kind, 0), make)
        missing += lacking
    chosen, lacking = _take(chosen, used, sources["altered"], "altered", missing, make)
    notes = []
    cut = [c for c, s in short.items() if len(s) != len(c) and any(p.text == s for p in chosen.values())]
    if cut:
        notes.append(f"{len(cut)} captions were shortened to {SHORT_TOKENS} tokens to serve as prompts")
    if lacking:
        planned = len(chosen) + lacking
        notes.append(f"{len(chosen)} of {planned} planned prompts: there are no more captions or templates")
    for prompt in chosen.values():
        if count_tokens(prompt.text) > MAX_TOKENS:
            raise ConfigError(
                f"trigger and class word are too long for prompts: {prompt.text!r}", "use shorter ones"
            )
    prompts = _with_class_seeds(list(chosen.values()), seeds, class_seeds)
    return PromptSet(prompts, tuple(seeds), trigger, class_word, tuple(notes), quality)


def _fitted(text: str, trigger: str | None, class_word: str | None, count_tokens: CountTokens) -> str:
    """A template of tags as a prompt, without its last tags if it is too long.  One that would lose its subject stays
    as it is: its length is reported."""
    whole = text.replace("{trigger}", trigger or "").replace("{class}", class_word or "")
    short = shorten(whole, count_tokens)
    return short if not trigger or not _names(trigger, whole) or _names(trigger, short) else whole


def _with_class_seeds(prompts: list[Prompt], seeds: Sequence[int], count: int) -> tuple[Prompt, ...]:
    """Give the first class-only prompt ``count`` seeds, starting with those of the set, if the set has fewer."""
    first = next((n for n, p in enumerate(prompts) if not p.asks_for_subject), None)
    if first is not None and count > len(seeds):
        more = range(max(seeds) + 1, max(seeds) + 1 + count - len(seeds))
        prompts[first] = replace(prompts[first], seeds=(*seeds, *more))
    return tuple(prompts)


def _take(
    chosen: dict[str, Prompt],
    used: set[str],
    templates: Iterable[str],
    kind: str,
    count: int,
    make: Callable[[str, str], Prompt],
) -> tuple[dict[str, Prompt], int]:
    """``chosen`` with up to ``count`` more prompts of ``kind``, and how many are missing."""
    more = dict(chosen)
    for template in templates:
        if len(more) - len(chosen) == count:
            break
        prompt = make(template, kind)
        if prompt.id not in used:
            more.setdefault(prompt.id, prompt)
    return more, count - (len(more) - len(chosen))


def load_prompts(
    path: Path, *, trigger: str | None, class_word: str | None, count_tokens: CountTokens
) -> PromptSet:
    """A hand-written prompt set: TOML ([[prompts]] text, kind; seeds), or plain text with one prompt a line.

    ``trigger`` and ``class`` at the top of a TOML file are used if the arguments are None. Raises ConfigError
    for prompts that the text encoder would truncate.
    """
    try:
        content = read_small(path, MAX_SETTINGS_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"cannot read the prompt file {path}: {why}", "give a .toml or .txt file in UTF-8"
        ) from None
    quality: tuple[str, ...] = ()
    if path.suffix.lower() == ".toml":
        rows, seeds, trigger, class_word, quality = _read_toml(path, content, trigger, class_word)
    else:
        lines = [line.strip() for line in content.splitlines()]
        _refuse_flags(path, lines)
        rows = [(line, "altered", ()) for line in lines if line and not line.startswith("#")]
        seeds = SEARCH_SEEDS
    prompts = tuple(
        replace(make_prompt(text, kind, trigger, class_word, quality), seeds=own) for text, kind, own in rows
    )
    for prompt in prompts:
        tokens = count_tokens(prompt.text)
        if tokens > MAX_TOKENS:
            raise ConfigError(
                f"{path}: the prompt {prompt.text[:40]!r}… has {tokens} tokens; it would be truncated at {MAX_TOKENS}",
                f"shorten it, best to {SHORT_TOKENS} tokens or fewer",
            )
    return PromptSet(prompts, seeds, trigger, class_word, quality=quality)


def _refuse_flags(path: Path, lines: Sequence[str]) -> None:
    """Raise ConfigError for a file of sample prompts: scored images have the sizes and seeds of their study."""
    found = [str(number) for number, line in enumerate(lines, 1) if _FLAG.search(line) and line[0] != "#"]
    if found:
        more = ", …" if len(found) > SHOWN_LINES else ""
        raise ConfigError(
            f"{path} has flags such as --w 512 in line {', '.join(found[:SHOWN_LINES])}{more}, which would be drawn "
            "as text",
            "remove them; sizes, steps and seeds are set in the study's definition, under [sampling]",
        )


def _read_toml(
    path: Path, content: str, trigger: str | None, class_word: str | None
) -> tuple[list[tuple[str, str, tuple[int, ...]]], tuple[int, ...], str | None, str | None, tuple[str, ...]]:
    try:
        table = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # invalid TOML, too many digits or brackets
        raise ConfigError(
            f"{path} is not valid TOML: {error}", "see docs/evaluation.md for an example"
        ) from None
    _check_keys(path, table, ("prompts", "seeds", "trigger", "class", "quality"))
    rows = table.get("prompts", [])
    seeds = table.get("seeds", list(SEARCH_SEEDS))
    if (
        not isinstance(rows, list)
        or not all(isinstance(row, dict) for row in rows)
        or not _are_numbers(seeds)
        or not all(_are_numbers(row.get("seeds", [0])) and row.get("seeds") != [] for row in rows)
    ):
        raise ConfigError(
            f"{path}: prompts or seeds have the wrong form",
            "write seeds = [0, 1] and [[prompts]] with text = …",
        )
    for key in ("trigger", "class"):
        if not isinstance(table.get(key, ""), str):
            raise ConfigError(f"{path}: {key} = {table[key]!r} is not a text", f'write {key} = "…"')
    quality = table.get("quality", [])
    if not isinstance(quality, list) or not all(isinstance(tag, str) for tag in quality):
        raise ConfigError(
            f"{path}: quality = {quality!r} is not a list of tags", 'write quality = ["best quality"]'
        )
    pairs = []
    for row in rows:
        _check_keys(path, row, ("text", "kind", "seeds"))
        text, kind = row.get("text"), row.get("kind", "altered")
        if not isinstance(text, str) or not isinstance(kind, str):
            raise ConfigError(f"{path}: a prompt without a text: {row}", 'write text = "…"')
        pairs.append((text, kind, tuple(row.get("seeds", ()))))
    trigger, class_word = trigger or table.get("trigger"), class_word or table.get("class")
    return pairs, tuple(seeds), trigger, class_word, tuple(tag.lower() for tag in quality)


def _are_numbers(seeds: Any) -> bool:
    """Whether a value may be a list of seeds; PromptSet checks it completely."""
    return isinstance(seeds, list) and all(isinstance(s, int | float) and abs(s) < 2**63 for s in seeds)


def _check_keys(path: Path, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(
                f"{path}: unknown key {key}", suggestion(key, known) or "known: " + ", ".join(known)
            )


def save_prompts(prompts: PromptSet, path: Path) -> None:
    """Write the set as a TOML file. ``load_prompts`` reads it back to the same hash."""
    document = tomlkit.document()
    if prompts.trigger:
        document["trigger"] = prompts.trigger
    if prompts.class_word:
        document["class"] = prompts.class_word
    if prompts.quality:
        document["quality"] = list(prompts.quality)  # drawn, not scored
    document["seeds"] = list(prompts.seeds)
    rows = tomlkit.aot()
    for prompt in prompts.prompts:
        row = tomlkit.table()
        row["text"], row["kind"] = prompt.text, prompt.kind
        if prompt.seeds:
            row["seeds"] = list(prompt.seeds)
        rows.append(row)
    document["prompts"] = rows
    write_atomic(path, tomlkit.dumps(document))
