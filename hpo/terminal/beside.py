"""The words for figures beside the score: which measure, by which model, and what it may be compared with.

Owns wording.  The figures are ``evaluation.gauges.gauge``'s, kept raw in a trial's result.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpo.study import TrialFolder, read_json
from trainer.text import clean_text

NAMES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino_i": "DINO-I"}
# OpenAI's own weights are what torchmetrics' CLIPScore takes; it prints 100 times the cosine.
OPENAI = ":openai"


def beside_lines(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a model; raw values."""
    of_model: dict[str, list[str]] = {}
    for figure in figures:
        model, measure = clean_text(str(figure["model"])), str(figure["measure"])
        words = f"{NAMES.get(measure, clean_text(measure))} {float(figure['value']):.4f}"
        if measure == "clip_t" and model.endswith(OPENAI):
            words += " (× 100 is comparable to torchmetrics)"
        of_model.setdefault(model, []).append(words)
    return [f"{', '.join(words)} by {model}" for model, words in of_model.items()]


def trial_lines(trial: TrialFolder) -> list[str]:
    """The same of a finished trial, from its result.json; empty if it has none."""
    figures = (read_json(trial.result) or {}).get("beside")
    try:
        return beside_lines(figures or [])
    except (AttributeError, KeyError, TypeError, ValueError):  # of a file that is not this tool's any more
        return []
