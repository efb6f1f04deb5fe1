"""Kinds and options without a layer of PEFT: start, gradients, dropout, files, and removal."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters import lorafile
from trainer.adapters.adapter import Adapter, inject
from trainer.adapters.targets import count_weights
from trainer.bases import Base, Sizes
from trainer.config import TrainConfig
from trainer.errors import ConfigError, Interrupted
from trainer.events import Event
from trainer.loop.loop import Conduct, train

SIZES = Sizes((64, 64), (0, 0), (64, 64))
CASES: dict[str, dict[str, Any]] = {
    "tucker LoCon": {"network_type": "LoCon", "conv_dim": 2, "use_tucker": True},
    "tucker LoHa": {"network_type": "LoHa", "conv_dim": 2, "use_tucker": True},
    "tucker LoKr": {"network_type": "LoKr", "network_dim": 1, "conv_dim": 1, "factor": 2, "use_tucker": True},
    "scalar LoCon": {"network_type": "LoCon", "conv_dim": 2, "use_scalar": True},
    "full LoKr": {"network_type": "LoKr", "full_matrix": True, "conv_dim": 4},
    "LoKr 10000": {"network_type": "LoKr", "network_dim": 10000, "conv_dim": 10000},
    "LoKr both": {"network_type": "LoKr", "network_dim": 1, "decompose_both": True},
    "unbalanced LoKr": {"network_type": "LoKr", "network_dim": 1, "unbalanced_factorization": True},
    "norms": {"network_type": "LoRA", "train_norm": True},
    "norms of full": {"network_type": "LoHa", "train_norm": True, "lycoris_preset": "full"},
    "rs_lora": {"network_type": "LoRA", "rs_lora": True},
    "Full": {"network_type": "Full", "lycoris_preset": "full"},
    "IA3": {"network_type": "IA3", "lycoris_preset": "ia3"},
    "OFT": {"network_type": "OFT", "constraint": 0.5, "rescaled": True},
    "OFT blocks": {"network_type": "OFT", "network_dim": 2, "oft_blocks": True},
    "BOFT": {"network_type": "BOFT"},
    "GLoRA": {"network_type": "GLoRA", "conv_dim": 2},
    "DyLoRA": {"network_type": "DyLoRA", "network_dim": 4, "unit": 2},
    "LoRA-FA": {"network_type": "LoRA-FA"},
}
SAVED_AS_LORA = ("tucker LoCon", "scalar LoCon", "DyLoRA", "LoRA-FA", "rs_lora")


def settings(name: str, **more: Any) -> TrainConfig:
    return tiny_config(
        **({"network_dim": 4, "network_alpha": 2.0, "save_precision": "float"} | CASES[name] | more)
    )


def prediction(base: Base) -> Tensor:
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = base.encode_text(["a photo of sks", "a dog"])
    return base.predict(noisy, torch.tensor([100, 700]), states, [SIZES, SIZES])


def randomise(adapter: Adapter) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.trainable():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_kind_starts_at_the_base_and_leaves_it_as_it_was(name: str) -> None:
    base = tiny_base("sd15")
    modules = [dict(network.named_modules()) for network in base.components().values()]
    with torch.no_grad():
        before = prediction(base)
    config = settings(name)
    count = count_weights(base, config)
    adapter = inject(base, config)
    with torch.no_grad():
        torch.testing.assert_close(prediction(base), before, atol=2e-5, rtol=1e-4)
        randomise(adapter)
        assert float((prediction(base) - before).abs().max()) > 1e-4
    assert sum(weight.numel() for weight in adapter.trainable()) == count
    adapter.remove()
    assert [dict(network.named_modules()) for network in base.components().values()] == modules
    with torch.no_grad():
        assert torch.equal(prediction(base), before)


@pytest.mark.parametrize("name", ["tucker LoHa", "norms of full", "Full", "IA3", "OFT", "BOFT", "GLoRA"])
def test_every_trained_tensor_gets_a_gradient_and_nothing_else_does(name: str) -> None:
    base = tiny_base("sd15")
    adapter = inject(base, settings(name))
    randomise(adapter)
    prediction(base).square().mean().backward()
    trained = {id(weight) for weight in adapter.trainable()}
    with_gradient = {
        id(parameter)
        for network in base.components().values()
        for parameter in network.parameters()
        if parameter.grad is not None
    }
    assert with_gradient <= trained
    # the last layer of the text encoder has no influence on the U-Net's states of clip_skip
    assert len(with_gradient) >= 0.9 * len(trained)
    assert all(parameter.requires_grad for parameter in adapter.trainable())


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_same_prediction_and_training_goes_on_from_it(name: str, tmp_path: Path) -> None:
    base, path = tiny_base("sd15"), tmp_path / "a.safetensors"
    config = settings(name)
    adapter = inject(base, config)
    randomise(adapter)
    adapter.round_to("float")
    with torch.no_grad():
        expected = prediction(base)
    state = adapter.state()
    lorafile.write(path, adapter, config)
    adapter.remove()
    read = lorafile.attach(base, lorafile.read(path))
    with torch.no_grad():
        torch.testing.assert_close(prediction(base), expected, atol=2e-5, rtol=1e-4)
    kinds = {layer.target.kind for layer in read.layers}
    assert (kinds == {"LoRA"}) == (name in SAVED_AS_LORA)
    read.remove()
    again = lorafile.begin(base, config.with_values({"network_weights": str(path)}))
    found = again.state()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    again.load_state(state)


@pytest.mark.parametrize("name", ["tucker LoHa", "Full", "norms of full", "OFT"])
def test_rank_dropout_is_drawn_from_its_key_and_ends_with_training(name: str) -> None:
    base = tiny_base("sd15")
    adapter = inject(base, settings(name, rank_dropout=0.5, rank_dropout_rows=True))
    randomise(adapter)
    with torch.no_grad():
        whole = prediction(base)
        adapter.apply_dropout(1, 2, 3)
        dropped = prediction(base)
        assert torch.equal(prediction(base), dropped) and not torch.equal(dropped, whole)
        adapter.apply_dropout(1, 2, 4)
        assert not torch.equal(prediction(base), dropped)
        adapter.apply_dropout()
        assert torch.equal(prediction(base), whole)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr"])
def test_rank_dropout_of_lycoris_drops_rows_of_the_change_unscaled(kind: str) -> None:
    """LyCORIS lycoris/modules/locon.py, make_weight: ``weight *= rand(rows) > p``."""
    base = tiny_base("sd15")
    config = tiny_config(network_type=kind, network_dim=4, rank_dropout=0.5, rank_dropout_rows=True)
    adapter = inject(base, config)
    randomise(adapter)
    layer = next(layer for layer in adapter.layers if layer.target.path.endswith("to_q"))
    x = torch.randn(5, layer.wrapped.base_layer.weight.shape[1], generator=torch.Generator().manual_seed(3))
    number = adapter.layers.index(layer)
    with torch.no_grad():
        adapter.apply_dropout(7)
        dropped = layer.wrapped(x) - layer.wrapped.base_layer(x)
        rows = adapter.draws.kept_rows(number, layer)
        assert rows is not None and set(rows.tolist()) == {0.0, 1.0}
        weight = layer.wrapped.base_layer.weight
        merged = weight + layer.delta() * rows[:, None]
        if kind == "DoRA":
            merged = merged * layer.weights["dora_scale"] / merged.norm(dim=0, keepdim=True)
        torch.testing.assert_close(dropped, x @ (merged - weight).T, atol=1e-5, rtol=1e-4)


def test_dylora_trains_one_unit_at_the_scale_of_its_ranks() -> None:
    """sd-scripts networks/dylora.py: alpha / dim · √(dim / ranks in use), ranks before the unit constant."""
    base = tiny_base("sd15")
    adapter = inject(base, settings("DyLoRA"))
    randomise(adapter)
    layer = next(layer for layer in adapter.layers if layer.target.path.endswith("to_q"))
    adapter.apply_dropout(5)
    block = layer.wrapped.chance.block(2)
    x = torch.randn(3, layer.wrapped.base_layer.weight.shape[1])
    change = layer.wrapped(x) - layer.wrapped.base_layer(x)
    change.square().sum().backward()
    trained = sorted(ending for ending, weight in layer.weights.items() if weight.grad is not None)
    assert trained == [f"lora_down.{block:04}", f"lora_up.{block:04}"]
    downs = torch.cat([layer.weights[f"lora_down.{n:04}"] for n in range(block + 1)])
    ups = torch.cat([layer.weights[f"lora_up.{n:04}"] for n in range(block + 1)], dim=1)
    scale = 2.0 / 4 * (4 / (2 * (block + 1))) ** 0.5
    torch.testing.assert_close(change, x @ (ups @ downs * scale).T, atol=1e-6, rtol=1e-4)


def test_lora_fa_trains_the_second_half_only() -> None:
    adapter = inject(tiny_base("sd15"), settings("LoRA-FA"))
    assert {ending for layer in adapter.layers for ending in layer.weights} == {
        "lora_down.weight",
        "lora_up.weight",
    }
    assert len(adapter.trainable()) == len(adapter.layers)
    assert not any(layer.weights["lora_down.weight"].requires_grad for layer in adapter.layers)


def test_scale_weight_norms_limits_products_and_blocks_and_leaves_the_rest() -> None:
    for name, is_limited in (("tucker LoCon", True), ("OFT", True), ("Full", False)):
        adapter = inject(tiny_base("sd15"), settings(name))
        randomise(adapter)
        before = adapter.state()
        adapter.limit_norms(0.01)
        changed = any(not torch.equal(before[key], tensor) for key, tensor in adapter.state().items())
        assert changed is is_limited
        for layer in adapter.layers:
            if name == "tucker LoCon":
                assert float(layer.delta().norm()) <= 0.0101
            elif name == "OFT":
                assert float(layer.weights["oft_blocks"].norm()) <= 0.0101


@pytest.mark.parametrize("name", ["scalar LoCon", "DyLoRA"])
def test_a_resumed_run_is_the_same_run(name: str, tmp_path: Path) -> None:
    config = settings(
        name,
        max_train_steps=3,
        max_train_epochs=None,
        train_batch_size=2,
        module_dropout=0.2,
        **({} if name == "DyLoRA" else {"rank_dropout": 0.3, "rank_dropout_rows": True}),
    )

    def trained(stop_after: int | None, folder: Path) -> dict[str, Tensor]:
        base = tiny_base("sd15")
        adapter = inject(base, config)
        seen: list[Event] = []
        how = Conduct(checkpoints=folder, should_stop=lambda: len(seen) + 1 == stop_after)
        with contextlib.suppress(Interrupted):
            for event in train(config, base, adapter, tiny_prepared(base, config), how):
                seen.append(event)
        return adapter.state()

    straight = trained(None, tmp_path / "a")
    trained(1, tmp_path / "b")
    resumed = trained(None, tmp_path / "b")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_blocks_that_do_not_divide_a_layer_are_an_error_in_words() -> None:
    with pytest.raises(
        ConfigError, match=r"network_dim = 7 parts the outputs of a layer into 7 blocks, but one has \d+"
    ) as caught:
        inject(tiny_base("sd15"), settings("OFT blocks", network_dim=7))
    assert "divides" in caught.value.hint
