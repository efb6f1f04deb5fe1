"""Templates of generated prompts, in addition to captions: one wording for real bases, one for the miniature.

Owns the wording. Does not own the choice; see ``evaluation.prompts.prompts``. Order matters: a smaller set takes
the first templates, so add new ones at the end, where they do not change existing sets. ``altered`` also fills
the gap if another kind runs out: 15 of a search set and 22 of a confirmation set if there are no captions at all.
"""

from __future__ import annotations

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
}
