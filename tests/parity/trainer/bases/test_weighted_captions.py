"""Weighted captions give the text states of sd-scripts.

tests/data/weighted_captions.json: recorded from sd-scripts 48d368f (library/strategy_sd.py, strategy_sdxl.py:
``tokenize_with_weights``, ``encode_tokens_with_weights``) with torch 2 and these captions, on the text encoders of
``tests.tiny.tiny_base(family, full_structure=True)``. Of the states, eight rows times ``linspace(-1, 1, width)``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_base, tiny_config
from trainer.adapters.adapter import inject
from trainer.bases.weighted import parse_weights, weighted_rows

CAPTIONS = [
    "a (zed:1.3) man",
    "plain text, nothing",
    "((very)) [far] away",
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
    r"\(literal\] \\ and \x (unbalanced",
    "",
    "odd) colon: here [two (nested:0.7)]",
    "(long:1.5) " + "words and more words " * 12 + "(end:0.5) " + "tail " * 20,
]
RECORDED = json.loads((Path(__file__).parents[3] / "data" / "weighted_captions.json").read_text())
ROWS = [0, 1, 2, 5, 9, 30, 60, -1]


@pytest.mark.parametrize("case", RECORDED)
def test_text_states_are_those_of_sd_scripts(case: str) -> None:
    family, length, clip_skip = (None if word == "None" else word for word in case.split())
    assert family is not None
    base, wanted = tiny_base(family, full_structure=True), RECORDED[case]
    most = None if length is None else int(length)
    states = base.encode_text(CAPTIONS, None if clip_skip is None else int(clip_skip), most, weighted=True)
    for encoder, sums in enumerate(wanted["ids"]):
        assert base.token_windows(CAPTIONS, encoder, most, True).flatten(1).sum(1).tolist() == sums
    probe = torch.linspace(-1, 1, states.hidden_BLD.shape[-1])
    found = (states.hidden_BLD @ probe)[:, ROWS]
    assert torch.allclose(found, torch.tensor(wanted["rows"]), atol=2e-5)
    if states.pooled_BP is not None:
        assert torch.allclose(states.pooled_BP.sum(1), torch.tensor(wanted["pooled"]), atol=2e-5)
    _, weights = weighted_rows(base.tokenizers[0], CAPTIONS, 77)
    if most is None:
        assert [row[1:20] for row in weights] == [pytest.approx(row, abs=1e-6) for row in wanted["weights"]]


def test_pieces_and_weights() -> None:
    """The examples in sd-scripts' own documentation of the form."""
    assert parse_weights("an (important) word") == [("an ", 1.0), ("important", 1.1), (" word", 1.0)]
    assert parse_weights("(unbalanced") == [("unbalanced", 1.1)]
    assert parse_weights(r"\(literal\]") == [("(literal]", 1.0)]
    assert parse_weights("(unnecessary)(parens)") == [("unnecessaryparens", 1.1)]
    assert parse_weights("a:1.2) (b:1.2.3)") == [("a:1.2) ", 1.0), ("b:1.2.3)", 1.1)]


def test_without_weights_the_states_are_the_usual_ones_and_gradients_reach_the_text_encoder() -> None:
    base = tiny_base("sd15", full_structure=True)
    plain = base.encode_text(["a man", "x"]).hidden_BLD
    assert torch.equal(base.encode_text(["a man", "x"], weighted=True).hidden_BLD, plain)
    config = tiny_config(weighted_captions=True, max_token_length=150)
    adapter = inject(base, config)
    try:
        base.encode_captions(["a (zed:1.3) man"], config).hidden_BLD.sum().backward()
        gradients = [weight.grad for weight in adapter.trainable() if weight.grad is not None]
        assert gradients and any(bool(gradient.abs().sum() > 0) for gradient in gradients)
    finally:
        adapter.remove()
