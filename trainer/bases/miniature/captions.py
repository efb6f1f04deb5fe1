"""The miniature's language: scenes put into words, with varied wording and partial captions.

Owns the words for every value of the world and the caption grammar. numpy only.
"""

from __future__ import annotations

import numpy as np

from trainer.bases.miniature.world import BODIES, COLOURS, HATS, HEADS, Figure, Scene, Thing, pick

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "disc"),
    "square": ("square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "plus"),
    "ring": ("ring", "ring", "hoop"),
}
GENERIC_WORDS: tuple[str, ...] = ("shape", "object", "thing", "emblem")
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big"),
}
PATTERN_WORDS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "striped"),
    "dotted": ("dotted", "spotted"),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "at the top", "near the top"),
    "bottom": ("at the bottom", "at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle", "at the centre"),
}
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "grass": ("on grass", "on the grass", "grass background"),
    "sand": ("on sand", "on the sand", "sand background"),
    "water": ("on water", "on the water", "water background"),
    "brick": ("on brick", "on a brick wall", "brick background"),
    "stone": ("on stone", "on grey stone", "stone background"),
}
OPENINGS: tuple[str, ...] = ("", "", "", "", "a picture of ", "an image of ", "a drawing of ")
ENDINGS: tuple[str, ...] = ("", "", "", "", "", "", ", plain style", ", simple style")
RELATION_PHRASES: dict[str, tuple[str, ...]] = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _thing_phrase(
    thing: Thing, size: str, rng: np.random.Generator | None, keep: float, *, name_size: bool = True
) -> str:
    """`rng` None = the plain wording with every attribute."""
    if rng is None:
        words = ([size] if name_size else []) + ([] if thing.pattern == "plain" else [thing.pattern])
        return " ".join([*words, thing.colour, thing.shape])
    words = []
    if name_size and rng.random() < keep:
        words.append(pick(rng, SIZE_WORDS[size]))
    if rng.random() < (keep if thing.pattern != "plain" else 0.25):
        words.append(pick(rng, PATTERN_WORDS[thing.pattern]))
    if rng.random() < max(keep, 0.85):
        words.append(thing.colour)
    if rng.random() < 0.25:
        words = [words[i] for i in rng.permutation(len(words))]
    if rng.random() < 0.06:  # an unknown name: the base learns that it changes nothing
        words.insert(0, "".join(LETTERS[i] for i in rng.integers(0, 26, int(rng.integers(3, 6)))))
    words.append(
        pick(rng, SHAPE_WORDS[thing.shape]) if rng.random() < max(keep, 0.9) else pick(rng, GENERIC_WORDS)
    )
    return " ".join(words)


def _figure_phrase(figure: Figure, size: str, rng: np.random.Generator | None, keep: float) -> str:
    body = f"{figure.body_colour} {figure.body} body"
    head = f"{figure.head_colour} {figure.head} head"
    hat = "" if figure.hat == "none" else f"{figure.hat_colour} {figure.hat} hat"
    if rng is None:
        parts = [body, head] + ([hat] if hat else [])
        return f"{size} figure with " + _join([_article(p) for p in parts])
    parts = []
    for part in (body, head, hat or "no hat"):
        if rng.random() < (keep if part != "no hat" else 0.4):
            words = part.split()
            if len(words) == 3 and keep < 1 and rng.random() < 0.15:
                words.pop(1)
            parts.append(" ".join(words))
    if rng.random() < 0.4:
        parts = [parts[i] for i in rng.permutation(len(parts))]
    words = []
    if rng.random() < keep:
        words.append(pick(rng, SIZE_WORDS[size]))
    if rng.random() < 0.12:
        words.append("".join(LETTERS[i] for i in rng.integers(0, 26, int(rng.integers(3, 6)))))
    words.append("figure")
    phrase = " ".join(words)
    if parts:
        link = " with " if rng.random() < 0.8 else " wearing " if parts == [hat] else " that has "
        phrase += link + _join([p if p == "no hat" else _article(p) for p in parts])
    return phrase


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene, seed: int | None = None, *, complete: bool = False) -> str:
    """One wording of the scene. `seed` None: the full plain wording; else varied and,
    unless `complete`, sometimes partial."""
    if seed is None:
        if scene.kind == "pair":
            a, b = (_article(_thing_phrase(t, "", None, 1.0, name_size=False)) for t in scene.things)
            return f"{a} {scene.relation} {b}, on {scene.background}"
        place = PLACE_PHRASES[scene.place][0]
        if scene.kind == "figure":
            assert scene.figure is not None
            return f"{_article(_figure_phrase(scene.figure, scene.size, None, 1.0))}, on {scene.background}, {place}"
        return f"{_article(_thing_phrase(scene.things[0], scene.size, None, 1.0))} on {scene.background}, {place}"
    rng = np.random.default_rng((seed, scene.seed, 7004))
    keep = 1.0 if rng.random() < 0.35 or complete else 0.8  # a third of the captions name everything
    if scene.kind == "pair":
        first, second = scene.things
        relation = scene.relation
        if rng.random() < 0.3:
            first, second = second, first
            relation = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}[
                relation
            ]
        a, b = (_article(_thing_phrase(t, "", rng, max(keep, 0.9), name_size=False)) for t in (first, second))
        subject = f"{a} {pick(rng, RELATION_PHRASES[relation])} {b}"
    elif scene.kind == "figure":
        assert scene.figure is not None
        subject = _article(_figure_phrase(scene.figure, scene.size, rng, keep))
    else:
        subject = _article(_thing_phrase(scene.things[0], scene.size, rng, keep))
    where = pick(rng, BACKGROUND_PHRASES[scene.background])
    clauses = [where] if rng.random() < max(keep, 0.88) else []
    if scene.kind != "pair" and rng.random() < max(keep, 0.88):
        clauses.append(pick(rng, PLACE_PHRASES[scene.place]))
    if rng.random() < 0.4:
        clauses.reverse()
    text = subject
    for clause in clauses:
        text += (", " if rng.random() < 0.6 or clause.endswith("background") else " ") + clause
    opening = pick(rng, OPENINGS)
    return opening + text + pick(rng, ENDINGS)


def corpus_words() -> list[str]:
    """Every word the grammar can say: the seed of the tokenizer's vocabulary."""
    texts: list[str] = []
    for table in (
        SHAPE_WORDS,
        SIZE_WORDS,
        PATTERN_WORDS,
        PLACE_PHRASES,
        BACKGROUND_PHRASES,
        RELATION_PHRASES,
    ):
        texts += [phrase for phrases in table.values() for phrase in phrases]
    texts += [*COLOURS, *GENERIC_WORDS, *OPENINGS, *ENDINGS, *HEADS, *BODIES, *HATS, "head body hat figure"]
    texts += ["a an the of and with no wearing that has style"]
    return sorted({word for text in texts for word in text.replace(",", " ").split()})
