"""The additional models of a study: ``[study] also``, and the CLIP image tower if likeness uses another encoder.

Owns the meaning of each entry and the gauges built from it (``evaluation.gauges.gauge``).

    MODEL[:WEIGHTS] or an open_clip folder      CLIP-T and CLIP-I by that scorer
    folder or hub name of a Dinov2Model         likeness by that encoder
    hpsv2.1[:FILE], pickscore[:FOLDER], imagereward
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from evaluation.encoders import (
    Dinov2Encoder,
    ImageEncoder,
    Scorer,
    check_likeness,
    check_scorer,
    embed_references,
    is_likeness,
    load_likeness,
    load_scorer,
    self_test,
)
from evaluation.gauges.gauge import Gauge, LikenessGauge, TextGauge
from evaluation.gauges.preference import check_preference, is_preference, load_preference


def check(spec: str) -> None:
    """Check an entry before anything is loaded."""
    if is_preference(spec):
        check_preference(spec)
    elif is_likeness(spec):
        check_likeness(spec)
    else:
        check_scorer(spec)


def usual(scorer: Scorer, likeness: ImageEncoder, references: Sequence[Path]) -> tuple[Gauge, ...]:
    """The gauges of every study: CLIP-I if likeness uses another encoder, and the content encoder
    of a style study."""
    found: list[Gauge] = []
    if likeness is not scorer:
        found.append(LikenessGauge("clip_i", scorer, embed_references(references, scorer)))
    scene = getattr(likeness, "scene", None)
    if isinstance(scene, Dinov2Encoder):
        found.append(LikenessGauge("dino_i", scene, embed_references(references, scene)))
    return tuple(found)


def also(
    specs: Sequence[str],
    scorer: Scorer,
    references: Sequence[Path],
    device: str | torch.device,
    say: Callable[[str], None],
) -> tuple[Gauge, ...]:
    """The gauges that a study requests."""
    found: list[Gauge] = []
    for spec in specs:
        if is_preference(spec):
            found.append(load_preference(spec, device))
        elif is_likeness(spec):
            encoder = load_likeness(spec, scorer, device)
            found.append(LikenessGauge("dino_i", encoder, embed_references(references, encoder)))
        else:
            other = load_scorer(spec, device)
            self_test(other, say)
            found += [
                TextGauge(other),
                LikenessGauge("clip_i", other, embed_references(references, other)),
            ]
    return tuple(found)
