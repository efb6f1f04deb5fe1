"""Prompts in the form of tags ("masterpiece, best quality, zkw, 1girl, red dress, sitting, beach"), for datasets whose
captions are tags.

Owns how captions of tags are told from sentences, which of their tags are outfits, poses and backgrounds, and the
prompts made of them.  Does not own the fixed wordings (``evaluation.prompts.templates``), or the choice and the length
of prompts (``evaluation.prompts.prompts``).
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from evaluation.prompts.templates import QUALITY

# A caption is tags if it has at least so many parts and most of them are this short (assumed; Danbooru's tags have
# three words at most, with few exceptions: "hair between eyes").
FEWEST_PARTS, MOST_WORDS, SHORT_SHARE = 3, 3, 0.8
MOST_OF_A_KIND = 12  # attributes of one kind; all combinations of more would only cost time
LEAST_OF_A_KIND = 8  # fewer are filled up, so that there are more combinations than planned prompts
MOST_PROMPTS = 40  # of a kind; 37 are needed if there are no captions
# Kinds of attributes by the last word of a tag, without plural s.  The names are Danbooru's.
OUTFITS = frozenset((
    "apron", "armor", "armour", "bikini", "blazer", "blouse", "boot", "bow", "cap", "cape", "cardigan", "cloak",
    "coat", "costume", "dress", "glasses", "glove", "gown", "hairband", "hat", "headband", "helmet", "hood", "hoodie",
    "jacket", "jean", "kimono", "leotard", "mask", "necktie", "pajama", "pant", "pantyhose", "ribbon", "robe",
    "sandal", "scarf", "shirt", "shoe", "short", "skirt", "sleeve", "sneaker", "sock", "suit", "sunglasses",
    "sweater", "swimsuit", "thighhigh", "tie", "uniform", "vest", "yukata",
))  # fmt: skip
BACKGROUNDS = frozenset((
    "alley", "background", "balcony", "bathroom", "beach", "bedroom", "bridge", "building", "cafe", "castle",
    "church", "city", "cityscape", "classroom", "cloud", "day", "desert", "fence", "field", "forest", "garden",
    "grass", "hallway", "house", "indoors", "kitchen", "lake", "library", "market", "moon", "mountain", "night",
    "ocean", "outdoors", "park", "pool", "rain", "river", "road", "rock", "roof", "rooftop", "room", "ruin",
    "scenery", "school", "sea", "shop", "sky", "snow", "space", "stage", "stair", "station", "street", "sun",
    "sunset", "temple", "town", "train", "tree", "village", "wall", "water", "waterfall", "window",
))  # fmt: skip
POSES = frozenset((
    "close-up", "focus", "grin", "portrait", "profile", "shot", "smile", "up", "view", "viewer",
))  # fmt: skip
# Poses by their first word.
POSE_STARTS = frozenset((
    "arms", "crouching", "dancing", "eating", "fighting", "from", "full", "hand", "hands", "holding", "jumping",
    "kneeling", "laughing", "leaning", "looking", "lying", "reading", "running", "sitting", "sleeping", "smiling",
    "squatting", "standing", "stretching", "swimming", "upper", "walking", "waving",
))  # fmt: skip
PEOPLE = {"1girl": ("girl", "woman", "female", "lady"), "1boy": ("boy", "man", "male", "guy"), "1other": ()}
# What fits whatever is shown, for captions that name too few.
USUAL_POSES = (
    "close-up", "from above", "from side", "from below", "wide shot", "centered", "from behind", "dutch angle"
)  # fmt: skip
USUAL_BACKGROUNDS = (
    "outdoors", "indoors", "beach", "forest", "city", "night sky", "snow", "flower field", "street", "white background"
)  # fmt: skip
STYLES = (
    "watercolor", "sketch, monochrome", "oil painting", "pixel art", "stained glass", "greyscale", "chibi", "lineart",
    "ukiyo-e", "mosaic",
)  # fmt: skip


def are_tags(captions: Iterable[str], separator: str = ",") -> bool:
    """Whether captions are tags: more than half of those that are not empty."""
    found = [_is_tags(caption, separator) for caption in captions if caption.strip()]
    return 2 * sum(found) > len(found)


def _is_tags(caption: str, separator: str) -> bool:
    parts = tags_of(caption, separator)
    short = sum(len(_words(part)) <= MOST_WORDS for part in parts)
    return len(parts) >= FEWEST_PARTS and short >= SHORT_SHARE * len(parts)


def tags_of(caption: str, separator: str = ",") -> list[str]:
    return [tag for part in re.split(rf"[\n{re.escape(separator)}]", caption) if (tag := part.strip())]


def tag_templates(
    captions: Iterable[str], trigger: str | None, class_word: str | None, separator: str = ","
) -> dict[str, tuple[str, ...]]:
    """Templates of the kinds altered, style and class-only for a subject.

    An altered prompt has an outfit, a pose and a background that occur in the captions, in a combination that no
    caption has.  The same captions give the same prompts, in any order.
    """
    told = [set(tags_of(caption, separator)) for caption in captions]
    known = Counter(tag for tags in told for tag in tags if _is_plain(tag, trigger))
    kinds = {tag: kind_of(tag) for tag in known}
    outfits, poses, backgrounds = (
        sorted((tag for tag in known if kinds[tag] == kind), key=lambda tag: (-known[tag], _hash(tag)))
        for kind in ("outfit", "pose", "background")
    )
    parts = (
        outfits[:MOST_OF_A_KIND] or [""],
        _filled(poses, USUAL_POSES),
        _filled(backgrounds, USUAL_BACKGROUNDS),
    )
    shown = {
        combination
        for tags in told
        for combination in itertools.product(
            *([tag for tag in part if not tag or tag in tags] for part in parts)
        )
    }
    new = [combination for combination in itertools.product(*parts) if combination not in shown]
    subject, someone = _subject(told, bool(trigger), class_word)
    return {
        "altered": tuple(_joined(*QUALITY, subject, *combination) for combination in _spread(new)),
        "style": tuple(_joined(*QUALITY, subject, style) for style in STYLES),
        "class-only": tuple(_joined(*QUALITY, someone, place) for place in USUAL_BACKGROUNDS[:5]),
    }


def kind_of(tag: str) -> str:
    """``outfit``, ``pose``, ``background``, or empty for everything else, such as the colour of hair."""
    words = _words(tag)
    first, last = words[0], words[-1]
    singular = last.removesuffix("s")
    if first in POSE_STARTS or last in POSES:
        return "pose"
    if last in OUTFITS or singular in OUTFITS:
        return "outfit"
    if first != "hair" and (last in BACKGROUNDS or singular in BACKGROUNDS):
        return "background"
    return ""


def _words(tag: str) -> list[str]:
    return tag.lower().replace("_", " ").split() or [""]


def _is_plain(tag: str, trigger: str | None) -> bool:
    """Whether a tag can stand in a prompt of its own: no weights, no trigger."""
    return not re.search(r"[(){}\[\]<>:\\]", tag) and not (trigger and trigger.lower() in tag.lower())


def _subject(told: Sequence[set[str]], has_trigger: bool, class_word: str | None) -> tuple[str, str]:
    """The subject as tags, with and without its trigger: "zkw, 1girl" where most captions say 1girl."""
    counted = next((tag for tag in PEOPLE if 2 * sum(tag in tags for tags in told) > len(told)), "")
    says_class = bool(class_word) and (class_word or "").lower() in PEOPLE.get(counted, ())
    someone = _joined("" if says_class else "{class}", counted)
    return (_joined("{trigger}", someone) if has_trigger else someone), someone


def _filled(found: Sequence[str], usual: Sequence[str]) -> list[str]:
    more = [tag for tag in usual if tag not in found]
    return [*found[:MOST_OF_A_KIND], *more[: max(0, LEAST_OF_A_KIND - len(found))]]


def _spread(combinations: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Some of the combinations, so that each tag is used about as often as any other of its kind."""
    left = sorted(combinations, key=lambda tags: _hash(_joined(*tags)))
    used: Counter[str] = Counter()
    chosen: list[tuple[str, ...]] = []
    while left and len(chosen) < MOST_PROMPTS:
        least = min(left, key=lambda tags: sum(used[tag] for tag in tags if tag))
        left.remove(least)
        used.update(least)
        chosen.append(least)
    return chosen


def _joined(*tags: str) -> str:
    return ", ".join(tag for tag in tags if tag)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
