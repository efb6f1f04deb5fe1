"""Weighted captions: ``(word:1.2)`` counts more, ``[word]`` less, as in the web UIs and sd-scripts.

Owns parsing and the weight of each token. The states of a token are multiplied by its weight, without rescaling
(sd-scripts library/strategy_base.py: ``_get_weighted_input_ids``; strategy_sd.py: ``encode_tokens_with_weights``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROUND, SQUARE = 1.1, 1 / 1.1  # the weight of (word) and of [word]
# a backslash with the bracket it escapes, a bracket, ":1.2)", ")", "]", plain text, a colon alone
_PARTS = re.compile(r"\\[()\[\]\\]?|[(\[]|:(?P<weight>[+-]?[\d.]+)\)|[)\]]|[^\\()\[\]:]+|:")


def parse_weights(caption: str) -> list[tuple[str, float]]:
    """A caption in pieces of one weight each. Brackets multiply; a backslash makes a bracket plain text; brackets that
    are not closed count until the end."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _PARTS.finditer(caption):
        part, weight = match[0], _number(match["weight"])
        if part.startswith("\\"):
            pieces.append((part[1:], 1.0))
        elif part in opened:
            opened[part].append(len(pieces))
        elif weight is not None and opened["("]:
            multiply(opened["("].pop(), weight)
        elif part == ")" and opened["("]:
            multiply(opened["("].pop(), ROUND)
        elif part == "]" and opened["["]:
            multiply(opened["["].pop(), SQUARE)
        else:
            pieces.append((part, 1.0))
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for start in opened[bracket]:
            multiply(start, factor)
    return _merged(pieces) or [("", 1.0)]


def _number(text: str | None) -> float | None:
    """A weight; None for a text such as 1.2.3, which is part of the caption."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _merged(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def weighted_rows(
    tokenizer: Any, captions: Sequence[str], length: int
) -> tuple[list[list[int]], list[list[float]]]:
    """For each caption its token ids between a start and an end token, at most ``length``, and ``length`` weights."""
    rows, weights = [], []
    for caption in captions:
        ids: list[int] = []
        factors: list[float] = []
        for text, weight in parse_weights(caption):
            found = tokenizer(text)["input_ids"][1:-1]
            ids += found
            factors += [weight] * len(found)
        ids, factors = ids[: length - 2], factors[: length - 2]
        rows.append([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
        weights.append([1.0, *factors, *[1.0] * (length - 1 - len(factors))])
    return rows, weights


def apply_weights(states_BLD: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """States times the weight of their token, in the states' dtype."""
    weights_BL1 = torch.tensor(weights, device=states_BLD.device, dtype=torch.float32)[..., None]
    return (states_BLD.float() * weights_BL1).to(states_BLD.dtype)
