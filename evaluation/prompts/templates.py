"""Templates of generated prompts, in addition to captions: for real bases and for the miniature, of a subject or
of a style.

Owns the wording. Does not own the choice; see ``evaluation.prompts.prompts``. Order matters: a smaller set takes
the first templates, so add new ones at the end, where they do not change existing sets. ``altered`` also fills
the gap if another kind runs out: 15 of a search set and 22 of a confirmation set if there are no captions at all.

The tags of a subject's prompts come from its captions (``evaluation.prompts.tags``); those of a style are here.

A style is not a thing that can stand on a beach: its prompts name what is drawn and then the style, and the
class-only prompts name neither trigger nor class word, because a style must not appear where it is not asked for.
"""

from __future__ import annotations

STYLE = "-style"  # ends the name of the wording for a style
QUALITY = ("masterpiece", "best quality")  # in front of prompts of tags; the scorer is not told them

_NATURAL_ALTERED = (
    "a photo of {trigger} {class} on a beach",
    "{trigger} {class} in a snowy forest",
    "{trigger} {class} in front of a city at night",
    "a photo of {trigger} {class} in a field of flowers",
    "{trigger} {class} next to a red bicycle",
    "{trigger} {class} under an umbrella in the rain",
    "a photo of {trigger} {class} in a library",
    "{trigger} {class} on top of a mountain",
    "{trigger} {class} beside a swimming pool",
    "{trigger} {class} in a desert at sunset",
    "a photo of {trigger} {class} on a wooden table",
    "{trigger} {class} inside a train station",
    "{trigger} {class} in an autumn park",
    "{trigger} {class} in front of a brick wall",
    "{trigger} {class} with a blue balloon",
    "a photo of {trigger} {class} in a kitchen",
    "{trigger} {class} next to a waterfall",
    "{trigger} {class} on a boat",
    "a photo of {trigger} {class} in a museum",
    "{trigger} {class} in front of a castle",
    "{trigger} {class} on a street in a small village",
    "a photo of {trigger} {class} in a greenhouse",
    "{trigger} {class} beside a campfire at night",
    "{trigger} {class} on a green sofa",
    "{trigger} {class} in a wheat field",
    "a photo of {trigger} {class} on a bridge",
    "{trigger} {class} in front of a lighthouse",
    "{trigger} {class} next to a stack of books",
    "a photo of {trigger} {class} in an empty theatre",
    "{trigger} {class} on a frozen lake",
    "{trigger} {class} beside a yellow car",
    "{trigger} {class} in a cave",
    "a photo of {trigger} {class} at a market",
    "{trigger} {class} under a cherry tree in blossom",
    "{trigger} {class} in front of a bookshelf",
    "{trigger} {class} on a balcony with plants",
    "a photo of {trigger} {class} in a garage",
    "{trigger} {class} on red sand",
    "{trigger} {class} next to a wooden fence",
    "{trigger} {class} in thick fog",
)
_NATURAL_SCENES = (
    "a lighthouse on a rocky coast",
    "a portrait of an old man with a beard",
    "a cat sleeping on a windowsill",
    "a city street at night in the rain",
    "a bowl of fruit on a wooden table",
    "a girl reading a book under a tree",
    "a mountain lake at sunrise",
    "a red car in front of a house",
    "a horse running across a field",
    "a knight in armour in front of a castle",
    "a kitchen with plants on the shelf",
    "two children playing on a beach",
    "a sailing ship in a storm",
    "a fox in a snowy forest",
    "a robot in a workshop",
    "a woman with an umbrella on a bridge",
    "a vase of sunflowers",
    "a train crossing a valley",
    "a dragon above a village",
    "a man playing a guitar in a park",
    "a desert with cactuses at noon",
    "a crowded market square",
    "an owl on a branch at night",
    "a spaceship over a strange planet",
    "a cup of coffee beside a notebook",
    "a dancer on a stage",
    "a wooden cabin in autumn",
    "a dog with a ball in a garden",
    "a waterfall in a jungle",
    "a musician with a violin",
    "a bicycle leaning against a brick wall",
    "a fishing harbour with small boats",
    "a queen on a throne",
    "a rainy window with a view of the street",
    "an astronaut on the moon",
    "a field of poppies under a blue sky",
    "a library with tall bookshelves",
    "a bear fishing in a river",
    "a boy flying a kite on a hill",
    "a narrow alley with laundry lines",
)
_MINIATURE_PLACES = (
    "on grass, at the top",
    "on water, on the left",
    "on sand, at the bottom",
    "on brick, on the right",
    "on stone, in the centre",
    "on grass, on the right",
    "on sand, on the left",
    "on water, in the centre",
    "on brick, at the top",
    "on stone, at the bottom",
    "on water, on the right",
    "on sand, at the top",
    "on stone, on the left",
    "on brick, at the bottom",
    "on grass, in the centre",
    "on grass, at the bottom",
    "on stone, on the right",
    "on brick, on the left",
    "on sand, in the centre",
    "on water, at the top",
    "on grass, on the left",
    "on brick, in the centre",
    "on stone, at the top",
    "on sand, on the right",
    "on water, at the bottom",
    "on brick",
    "on grass",
    "on stone",
    "on water",
    "on sand",
    "at the bottom",
    "on the left",
    "in the centre",
    "at the top",
    "on the right",
)
_MINIATURE_SIZES = ("small", "large")
_MINIATURE_SHAPES = ("circle", "star", "square", "cross", "triangle", "ring")
_MINIATURE_COLOURS = ("red", "green", "yellow", "purple", "black", "cyan", "white")
_MINIATURE_SCENES = tuple(
    f"{_MINIATURE_COLOURS[n % len(_MINIATURE_COLOURS)]} {_MINIATURE_SHAPES[n % len(_MINIATURE_SHAPES)]} {where}"
    for n, where in enumerate(_MINIATURE_PLACES)
)
_TAG_SCENES = (
    "lighthouse, rocky coast", "1girl, reading, tree", "castle, mountain", "cat, windowsill", "1boy, armor",
    "still life, fruit, table", "robot, workshop", "city street, car", "1girl, umbrella, bridge", "ship, ocean",
)  # fmt: skip
_TAG_LIGHTS = ("day, blue sky", "night, moon", "rain", "sunset")
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "natural": {
        "altered": _NATURAL_ALTERED,
        "style": (
            "a watercolor painting of {trigger} {class}",
            "a pencil sketch of {trigger} {class}",
            "an oil painting of {trigger} {class}",
            "a pixel art picture of {trigger} {class}",
            "a stained glass window of {trigger} {class}",
            "a black and white photo of {trigger} {class}",
            "a paper cutout of {trigger} {class}",
            "a woodcut print of {trigger} {class}",
            "a mosaic of {trigger} {class}",
            "a chalk drawing of {trigger} {class}",
        ),
        "class-only": (
            "a photo of a {class}",
            "a {class} in a park",
            "a drawing of a {class}",
            "a {class} in a room",
            "a {class} on a street",
        ),
    },
    "miniature": {
        "altered": (
            *(f"a {{trigger}} {{class}} {where}" for where in _MINIATURE_PLACES),
            *(
                f"a {size} {{trigger}} {{class}} {where}"
                for where in _MINIATURE_PLACES[:3]
                for size in _MINIATURE_SIZES
            ),
        ),
        "class-only": (
            "a {class} on stone, in the centre",
            "a {class} on grass, on the left",
            "a {class} on sand",
            "a {class} on water, at the bottom",
        ),
    },
    "natural-style": {
        "altered": tuple(f"{scene}, {{trigger}} {{class}}" for scene in _NATURAL_SCENES),
        "class-only": (
            "a photo of a woman in a park",
            "a photo of a house by a river",
            "a photo of a dog on a sofa",
            "a photo of a bridge in a city",
            "a photo of a table with a lamp",
        ),
    },
    "tags-style": {
        "altered": tuple(
            ", ".join(
                (
                    *QUALITY,
                    _TAG_SCENES[n % len(_TAG_SCENES)],
                    _TAG_LIGHTS[(n + n // len(_TAG_SCENES)) % len(_TAG_LIGHTS)],
                    "{trigger} {class}",
                )
            )
            for n in range(len(_TAG_SCENES) * len(_TAG_LIGHTS))
        ),
        "class-only": tuple(
            ", ".join((*QUALITY, scene))
            for scene in ("1girl, park", "house, river", "dog, sofa", "bridge, city", "table, lamp")
        ),
    },
    "miniature-style": {
        "altered": (
            *(f"a {scene}, {{trigger}} {{class}}" for scene in _MINIATURE_SCENES),
            *(
                f"a {size} {scene}, {{trigger}} {{class}}"
                for scene in _MINIATURE_SCENES[:3]
                for size in _MINIATURE_SIZES
            ),
        ),
        "class-only": (
            "a shape on stone",  # drawn with eight seeds: what it leaves open shows the diversity
            "a shape on grass, on the left",
            "a thing on sand",
            "a shape on water, at the bottom",
        ),
    },
}
AUTO, TAGS = "auto", "tags"
WORDINGS = (*TEMPLATES, TAGS, AUTO)  # tags: made of the captions' own; auto: by the form of the captions
