"""Text for the extra metrics of a trial: the metric, the model, and what the value can be compared with.

Owns wording.  Does not own the metrics; see ``evaluation.gauges.gauge``.  A trial's result.json holds the raw values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpo.study import TrialFolder, read_json
from trainer.text import clean_text

NAMES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino_i": "DINO-I"}
# torchmetrics' CLIPScore uses OpenAI's weights and prints 100 × the cosine similarity.
OPENAI = ":openai"


def beside_lines(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per model, with raw values."""
    of_model: dict[str, list[str]] = {}
    for figure in figures:
        model, measure = clean_text(str(figure["model"])), str(figure["measure"])
        words = f"{NAMES.get(measure, clean_text(measure))} {float(figure['value']):.4f}"
        if measure == "clip_t" and model.endswith(OPENAI):
            words += " (× 100 is comparable to torchmetrics)"
        of_model.setdefault(model, []).append(words)
    return [f"{', '.join(words)} by {model}" for model, words in of_model.items()]


def trial_lines(trial: TrialFolder) -> list[str]:
    """The same lines for a finished trial, from its result.json.  Empty if it has no extra metrics."""
    figures = (read_json(trial.result) or {}).get("beside")
    try:
        return beside_lines(figures or [])
    except (AttributeError, KeyError, TypeError, ValueError):  # the file was edited by hand
        return []
