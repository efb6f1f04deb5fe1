"""Which networks are on the card: decided from sizes, exact, and back where the outer work needs them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from evaluation.encoders import Dinov2Encoder, load_likeness, load_scorer
from evaluation.images.sampling import sample
from evaluation.images.settings import SampleConfig
from evaluation.prompts import Prompt, PromptSet
from tests.smallcard import SmallCard, on_card
from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters.adapter import inject
from trainer.bases import Base, needs
from trainer.card import Card, _send, card_of, frozen_bytes, nbytes
from trainer.loop import Conduct, loop

PROMPTS = PromptSet(tuple(Prompt(f"zkw {n}", f"cat {n}", "altered") for n in range(4)), (0,))
CONFIG = SampleConfig(width_px=64, height_px=64, steps=2, batch_size=2)


def layer(kilobytes: int) -> nn.Module:
    return nn.Linear(256, kilobytes, bias=False).requires_grad_(False)


def card_with(size: int, **networks: nn.Module) -> SmallCard:
    card = SmallCard(size * 1024)
    for name, network in networks.items():
        card.add(network, name)
    return card


def test_nothing_moves_while_everything_fits_and_never_on_a_cpu() -> None:
    a, b = layer(10), layer(20)
    card = card_with(100, a=a, b=b)
    with card.phase("one", a, work=60 * 1024):
        pass
    assert card.moved == [] and card.residents() == ["a", "b"]
    cpu = card_of("cpu")
    with cpu.phase("one", a, work=lambda: pytest.fail("a CPU's memory is not planned")):
        cpu.require(a)
    assert cpu.space(a) is None and cpu.total_bytes() is None and cpu is card_of(torch.device("cpu"))


def test_the_smallest_network_that_is_enough_leaves_and_comes_back_when_it_is_needed() -> None:
    a, b, c = layer(40), layer(20), layer(30)
    card = card_with(100, a=a, b=b, c=c)
    with card.phase("one", a, work=32 * 1024):  # 10 are free
        assert card.moved == ["-c"]
    with card.phase("two", c):
        assert card.moved == ["-c", "+c"] and card.residents() == ["a", "b", "c"]
    with card.phase("three", a, work=59 * 1024):
        assert card.residents() == ["a"]
    with card.phase("more than there is", a, work=10**9):
        assert card.residents() == ["a"], "what the phase needs stays, whatever happens then"


def test_after_inner_work_the_outer_work_finds_its_networks_and_its_room() -> None:
    unet, vae, scorer = layer(60), layer(30), layer(10)
    card = card_with(100, unet=unet, vae=vae, scorer=scorer)
    with card.phase("train", unet, work=None):
        assert card.residents() == ["unet"], "a step whose memory is not known has the card to itself"
        with card.phase("sample"):
            with card.phase("decode", vae, work=40 * 1024):
                assert card.residents() == ["vae"]
            with card.phase("denoise", unet, work=30 * 1024):
                assert card.residents() == ["unet"]
            with card.phase("decode", vae):
                assert card.residents() == ["unet", "vae"]
        assert card.residents() == ["unet"]
    card = card_with(100, unet=unet, vae=vae)
    with card.phase("train", unet, work=5 * 1024), card.phase("encode", unet, work=50 * 1024):
        assert card.moved == [], "the outer work has planned for its own networks"
    with (
        pytest.raises(ZeroDivisionError),
        card.phase("train", unet),
        card.phase("decode", vae, work=60 * 1024),
    ):
        1 / 0  # noqa: B018
    assert card.phase_name == ""


def test_a_network_may_compute_in_ram_while_others_train() -> None:
    unet, text = layer(50), layer(20)
    card = card_with(100, unet=unet, text=text)
    with card.phase("train", unet, work=0, in_ram=(text,)):
        assert card.residents() == ["unet"]
        with card.phase("encode text", text, work=5):
            card.require(text)
            assert card.residents() == ["unet"]
        with card.phase("sample"), card.phase("encode text", text):
            assert card.residents() == ["unet", "text"]
        assert card.residents() == ["unet"]


def test_a_network_that_is_gone_takes_no_room() -> None:
    a, b = layer(50), layer(40)
    card = card_with(100, a=a, b=b)
    assert card.space(a) == 50 * 1024
    del b
    gc.collect()
    assert card.residents() == ["a"] and card.free_bytes() == 50 * 1024


def test_weights_that_are_trained_stay_where_they_are() -> None:
    network = nn.Sequential(layer(10), nn.Linear(4, 4), nn.BatchNorm1d(4).requires_grad_(False))
    trained = [*network[1].parameters()]
    before = [weight.data_ptr() for weight in trained]
    assert frozen_bytes(network) == nbytes(network) - 20 * 4
    others = [weight for weight in network.parameters() if not weight.requires_grad]
    for weight in trained:  # to another device they could not go in a test; their place is what decides
        weight.grad = torch.ones_like(weight)
    _send(network, "cpu", keep_trained=True)
    assert [weight.data_ptr() for weight in trained] == before and all(w.device.type == "cpu" for w in others)


# A base


def bytes_of(base: Base) -> dict[str, int]:
    return {"unet": nbytes(base.unet), "vae": nbytes(base.vae), "text": sum(map(nbytes, base.text_encoders))}


def drawn(base: Base, folder: Path | None = None) -> list[bytes]:
    return [image.pixels_HW3.tobytes() for image in sample(base, PROMPTS, CONFIG, folder, identity="w")]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_images_are_the_same_bytes_on_a_card_that_holds_one_network_at_a_time(family: str) -> None:
    expected = drawn(tiny_base(family))
    base = tiny_base(family)
    own = bytes_of(base)
    large = on_card(base, 10**9)
    assert drawn(base) == expected and large.moved == []
    small = on_card(base, own["unet"] + needs.denoise_bytes(base.unet.config, 64, 4, 4))
    assert drawn(base) == expected
    assert max(own["vae"], own["text"]) <= small.size
    assert small.seen.keys() == {"encode text", "denoise", "decode"}
    name = base.name
    assert small.seen["denoise"] == {frozenset({f"{name} unet"})}
    assert small.seen["decode"] == {frozenset({f"{name} vae"})}
    texts = [move for move in small.moved if "text" in move and move.startswith("+")]
    assert len(texts) <= len(base.text_encoders), (
        "texts of all chunks are encoded first: the encoders come once"
    )


@pytest.mark.parametrize("trains_text", [False, True])
def test_training_is_the_same_bits_on_a_small_card_and_samples_between_steps_change_nothing(
    trains_text: bool,
) -> None:
    config = tiny_config(max_train_steps=3, max_train_epochs=None, network_train_unet_only=not trains_text)

    def run(base: Base, *, sampled: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        prepared = tiny_prepared(base, config)
        if trains_text:
            prepared.states = None
        adapter = inject(base, config)
        losses = []
        for event in loop.train(config, base, adapter, prepared, Conduct()):
            losses.append(getattr(event, "loss", 0.0))
            if sampled:
                drawn(base)
        state = adapter.state()
        adapter.remove()
        return losses, state

    losses, state = run(tiny_base("sdxl"), sampled=False)
    base = tiny_base("sdxl")
    card = on_card(base, sum(bytes_of(base).values()) + 400_000)
    found, weights = run(base, sampled=True)
    assert found == losses and all(weights[key].equal(value) for key, value in state.items())
    unet, vae = f"{base.name} unet", f"{base.name} vae"
    for there in card.seen["train"]:
        assert unet in there and vae not in there and (len(there) == 1) is not trains_text
    assert card.phase_name == ""


def test_a_network_that_is_away_comes_when_it_computes_outside_of_any_phase() -> None:
    base = tiny_base("sd15")
    card = on_card(base, 10**9)
    states = base.encode_text(["cat"])
    card.leave(base.unet)
    with torch.no_grad():
        base.predict(torch.zeros(1, 4, 8, 8), torch.zeros(1).long(), states, [])
    assert card.moved == [f"-{base.name} unet", f"+{base.name} unet"]


def test_encoders_come_when_they_score_and_say_the_same() -> None:
    base = tiny_base("sd15")
    picture = [image.pixels_HW3 for image in sample(base, PROMPTS, CONFIG)]
    scorer = load_scorer("mini-clip")
    likeness = cast(Dinov2Encoder, load_likeness("mini-likeness", scorer))
    expected = scorer.image_features(picture), likeness.image_features(picture), scorer.text_features(["cat"])
    card = on_card(base, nbytes(scorer._model) + 2_000_000_000)
    encoders = (scorer, likeness)
    for encoder in encoders:
        encoder.live_on(card, encoder.name)
        card.leave(encoder._model)
    card.size = nbytes(scorer._model) + 200_000_000  # what 32 images of this tower need is below that
    found = scorer.image_features(picture), likeness.image_features(picture), scorer.text_features(["cat"])
    assert all(a.equal(b) for a, b in zip(expected, found, strict=True))
    assert card.seen.keys() == {"score"} and f"+{scorer.name}" in card.moved


def test_a_device_has_one_card_and_a_base_computes_on_it() -> None:
    base = tiny_base("sd15")
    assert isinstance(base.card, Card) and base.card is card_of("cpu") and base.device == torch.device("cpu")
    assert base.to("cpu").card is card_of("cpu")
