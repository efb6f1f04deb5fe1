"""Known-answer test: six drawn images with captions that a scorer must match before it is used.

Owns the drawings, the recorded cosines of known weights, and the test. Does not own the loading
of models; see ``evaluation.encoders.embed``.

There are two tests. Weights whose cosines are recorded (by the sha256 of the file, whatever its name) must reproduce
them: a different activation function, mean, standard deviation or set of weights changes them, and open_clip does not
warn about any of these when it loads a file (mlfoundations/open_clip issues 771 and 915). With all other weights, the
drawings must match their own captions best: a random network sees no difference between them.

To record answers: ``python -c "from evaluation.encoders.answers import *;
print(cosines(load_scorer('MODEL:WEIGHTS')))"``
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from evaluation.encoders.embed import Scorer
from trainer.errors import ModelFileError

SIDE_PX = 224
STAR = [(112, 30), (136, 90), (200, 92), (148, 130), (168, 194), (112, 156), (56, 194), (76, 130), (24, 92),
        (88, 90)]  # fmt: skip
CROSS = [(92, 30), (132, 30), (132, 92), (194, 92), (194, 132), (132, 132), (132, 194), (92, 194), (92, 132),
         (30, 132), (30, 92), (92, 92)]  # fmt: skip
DRAWINGS: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "a red circle on a white background": lambda d: d.ellipse((40, 40, 184, 184), fill=(220, 20, 20)),
    "a blue square on a white background": lambda d: d.rectangle((45, 45, 179, 179), fill=(20, 40, 220)),
    "a green triangle on a white background": lambda d: d.polygon(
        [(112, 30), (200, 190), (24, 190)], fill=(20, 160, 40)
    ),
    "a yellow star on a white background": lambda d: d.polygon(STAR, fill=(250, 210, 0)),
    "a black cross on a white background": lambda d: d.polygon(CROSS, fill=(0, 0, 0)),
    "an orange ring on a white background": lambda d: d.ellipse(
        (40, 40, 184, 184), outline=(250, 130, 0), width=30
    ),
}
MUST_FIND = 4  # of the six; a network that sees no difference matches one
NEAR_ENOUGH = (
    0.001  # tolerance of a cosine (assumed); mini-clip's text tower without QuickGELU changes one by 0.003
)
# sha256 of a weights file → cosine of each drawing with its own caption, in order
KNOWN: dict[str, tuple[float, ...]] = {
    "9aaf3694e45df092e51ed7b9c9ce4d3b93df2726a0655f8fb9965c59d0c07c36": (  # mini-clip
        0.32450, 0.26748, -0.06950, -0.11709, 0.28132, 0.39672
    ),
}  # fmt: skip


def drawings() -> list[np.ndarray]:
    """The six drawings, uint8 (224, 224, 3)."""
    pictures = []
    for draw in DRAWINGS.values():
        sheet = Image.new("RGB", (SIDE_PX, SIDE_PX), "white")
        draw(ImageDraw.Draw(sheet))
        pictures.append(np.asarray(sheet))
    return pictures


def cosines(scorer: Scorer) -> np.ndarray:
    """Cosines of every drawing with every caption (6, 6)."""
    return (scorer.image_features(drawings()) @ scorer.text_features(list(DRAWINGS)).T).double().numpy()


def self_test(scorer: Scorer, say: Callable[[str], None] = lambda text: None) -> None:
    """Raise ModelFileError unless the scorer passes the test.

    ``say`` receives what had to be assumed about an unknown file: the six drawings cannot verify it.
    """
    answers = cosines(scorer)
    known = KNOWN.get(scorer.sha)
    if known is not None:
        off = float(np.abs(np.diag(answers) - np.array(known)).max())
        if off > NEAR_ENOUGH:
            raise ModelFileError(
                f"the scorer {scorer.name} fails its known-answer test: a cosine is off by {off:.4f}",
                "check that the activation (QuickGELU), mean, std and resizing are those it was trained with",
            )
        return
    if assumed := getattr(scorer, "assumed", ""):
        say(f"warning: {assumed}")
    found = int((answers.argmax(axis=1) == np.arange(len(answers))).sum())
    if found < MUST_FIND:
        raise ModelFileError(
            f"the scorer {scorer.name} cannot tell a red circle from a blue square: {found} of {len(answers)} "
            "drawings match their own caption",
            "use trained weights that fit this architecture, mean, std and tokenizer",
        )
