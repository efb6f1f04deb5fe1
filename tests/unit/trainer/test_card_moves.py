"""Networks on and off the pretend card: tensors really move, mixing devices raises, and the card's size is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trainer.card
from evaluation.images.sampling import sample
from evaluation.images.settings import SampleConfig
from evaluation.prompts import Prompt, PromptSet
from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.bases import needs
from trainer.card import nbytes
from trainer.loop import Conduct, loop

pretendcard = pytest.importorskip("tests.pretendcard")

PROMPTS = PromptSet(tuple(Prompt(f"zkw {n}", f"cat {n}", "altered") for n in range(2)), (0,))
CONFIG = SampleConfig(width_px=64, height_px=64, steps=2, batch_size=1)
TRAINED = tiny_config(max_train_steps=2, max_train_epochs=None, mixed_precision="no", train_batch_size=1)


@pytest.fixture(autouse=True)
def a_new_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """No spare room, which is a hundred times these networks."""
    monkeypatch.setattr(trainer.card, "SPARE_BYTES", 0)
    trainer.card._card.cache_clear()


def drawn(base) -> np.ndarray:
    return np.stack([image.pixels_HW3 for image in sample(base, PROMPTS, CONFIG)])


def test_a_card_that_holds_one_network_at_a_time_draws_the_same_and_is_never_exceeded() -> None:
    expected = drawn(tiny_base("sdxl"))
    base = tiny_base("sdxl")
    largest = max(map(nbytes, base.modules()))
    size = largest + needs.decode_bytes(base.vae.config, 64, 64, 4)
    with pretendcard.pretend_card(size) as card:
        base.to("cuda")
        with card.count() as counts:
            found = drawn(base)
        assert (found == expected).all()
        assert counts.to_card_bytes > largest, "networks must have moved"
        places = {next(network.parameters()).device.type for network in base.modules()}
        assert places == {"cpu", "cuda"} and base.device.type == "cuda"


def test_samples_between_steps_leave_trained_weights_where_their_optimizer_has_them() -> None:
    def trained(base, *, samples: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        prepared, losses = tiny_prepared(base, TRAINED), []
        prepared.states = None  # the text encoders are trained
        adapter = inject(base, TRAINED)
        places = [weight.data_ptr() for weight in adapter.trainable()]
        for event in loop.train(TRAINED, base, adapter, prepared, Conduct()):
            losses.append(getattr(event, "loss", 0.0))
            if samples:
                drawn(base)
        assert [weight.data_ptr() for weight in adapter.trainable()] == places
        state = adapter.state()
        adapter.remove()
        return losses, state

    expected, weights = trained(tiny_base("sdxl"), samples=False)
    base = tiny_base("sdxl")
    with pretendcard.pretend_card(10**8) as card:
        base.to("cuda")
        with card.count() as counts:
            losses, found = trained(base, samples=True)
    assert losses == pytest.approx(expected, rel=1e-5) and counts.to_card_bytes > nbytes(base.vae)
    assert all(torch.allclose(found[key], value, atol=1e-6) for key, value in weights.items())
