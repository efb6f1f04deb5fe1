"""dim_from_weights and base_weights: training that starts from LoRA files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_base, tiny_config
from trainer.adapters import lorafile
from trainer.adapters.adapter import inject
from trainer.adapters.merge import base_weights, merge_base_weights
from trainer.bases import Base
from trainer.config import TrainConfig
from trainer.errors import ConfigError


def lora(base: Base, path: Path, seed: int = 1, **values: Any) -> TrainConfig:
    """A LoRA file with random weights."""
    config = tiny_config(**values)
    adapter = inject(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.trainable():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    adapter.round_to("float")
    lorafile.write(path, adapter, config.with_values({"save_precision": "float"}))
    adapter.remove()
    return config


def test_dim_from_weights_trains_the_modules_of_the_file_at_their_ranks(tmp_path: Path) -> None:
    base = tiny_base("sd15")
    path = tmp_path / "a.safetensors"
    lora(base, path, network_dim=3, network_alpha=1.5, conv_dim=2, conv_alpha=0.5)
    config = tiny_config(
        network_dim=16,
        network_alpha=16,
        network_weights=str(path),
        dim_from_weights=True,
        text_encoder_lr=0.0,
    )
    adapter = lorafile.begin(base, config)
    found = {(layer.target.rank, layer.target.alpha) for layer in adapter.layers}
    assert found == {(3, 1.5), (2, 0.5)}
    assert {layer.target.component for layer in adapter.layers} == {"unet"}
    state, given = adapter.state(), lorafile.read(path).tensors
    assert all(torch.equal(tensor, given[key].float()) for key, tensor in state.items())
    with pytest.raises(ConfigError, match=r"holds LoRA .*network_type is LoHa"):
        inject_other = config.with_values({"network_type": "LoHa"})
        lorafile.begin(tiny_base("sd15"), inject_other)


def test_dim_from_weights_needs_a_file() -> None:
    with pytest.raises(ConfigError, match="dim_from_weights has no file"):
        tiny_config(dim_from_weights=True)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoKr"])
def test_base_weights_are_merged_once_with_their_strengths(tmp_path: Path, kind: str) -> None:
    base = tiny_base("sd15")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(files):
        lora(base, path, seed, network_type=kind, network_dim=3, network_alpha=3)
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    identity = base.identity
    changes = []
    for path in files:
        adapter = lorafile.attach(base, lorafile.read(path))
        layer = next(layer for layer in adapter.layers if layer.target.path.endswith("to_q"))
        name = f"{layer.target.path}.weight"
        with torch.no_grad():
            ones = torch.eye(layer.wrapped.base_layer.weight.shape[1])
            changes.append((layer.wrapped(ones) - layer.wrapped.base_layer(ones)).T)
        adapter.remove()
    config = tiny_config(base_weights=";".join(map(str, files)), base_weights_multiplier="1,0.5")
    merge_base_weights(base, config)
    after = base.unet.state_dict()
    assert after.keys() == before.keys() and base.identity != identity
    if kind != "DoRA":  # whose second magnitude is relative to the weight that the first file left
        torch.testing.assert_close(
            after[name] - before[name], changes[0] + 0.5 * changes[1], atol=1e-5, rtol=1e-4
        )
    assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("text", ["1,x", "nan", "1,-inf"])
def test_a_multiplier_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="base_weights_multiplier"):
        merge_base_weights(tiny_base("sd15"), tiny_config(base_weights="a", base_weights_multiplier=text))


def test_files_to_merge_are_paths_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny_config(base_weights=" ~/a.safetensors ; b.safetensors", base_weights_multiplier="0.5")
    assert base_weights(config) == [(tmp_path / "a.safetensors", 0.5), (Path("b.safetensors"), 1.0)]
    with pytest.raises(ConfigError, match="Windows path"):
        base_weights(tiny_config(base_weights="C:\\loras\\a.safetensors"))


def test_modules_that_the_file_does_not_have_begin_as_new_and_are_said(tmp_path: Path) -> None:
    base, path, said = tiny_base("sd15"), tmp_path / "a.safetensors", list[str]()
    lora(base, path, network_dim=2, network_alpha=2, network_train_unet_only=True)
    config = tiny_config(network_dim=2, network_alpha=2, network_weights=str(path))
    adapter = lorafile.begin(base, config, said.append)
    given = lorafile.read(path).tensors
    for key, tensor in adapter.state().items():
        if key.startswith("lora_unet_"):
            assert torch.equal(tensor, given[key].float())
        elif key.endswith("lora_up.weight"):
            assert not tensor.any()
    (line,) = said
    assert "modules begin as new" in line and "lora_te_" in line
    adapter.remove()
    lora(base, path, network_dim=2, network_alpha=2, text_encoder_lr=1e-4, unet_lr=0.0)
    with pytest.raises(ConfigError, match="has other tensors"):  # nothing of the file would be trained
        lorafile.begin(base, config.with_values({"network_train_unet_only": True}))
