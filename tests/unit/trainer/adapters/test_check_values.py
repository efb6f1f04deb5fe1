"""What a dry run can tell of a LoRA file without its base: the same that a training would end at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trainer.adapters import check_start, check_values
from trainer.adapters.contents import read_contents
from trainer.config import TrainConfig
from trainer.errors import ConfigError, ModelFileError
from trainer.tensorfile import read_header, to_bytes

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
SOUND = {
    f"{NAME}.lora_down.weight": torch.ones(4, 768),
    f"{NAME}.lora_up.weight": torch.ones(320, 4),
    f"{NAME}.alpha": torch.tensor(1.0),
}


def _file(folder: Path, change: Callable[[str, Tensor], Tensor | None] = lambda _, tensor: tensor) -> Path:
    tensors = {key: change(key, tensor) for key, tensor in SOUND.items()}
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None},
        folder / "x.safetensors",
    )
    return folder / "x.safetensors"


def test_a_sound_file_passes(tmp_path: Path) -> None:
    check_values(_file(tmp_path))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda key, tensor: tensor * float("nan") if "lora_up" in key else tensor, "NaN"),
        (lambda key, tensor: None if "lora_up" in key else tensor, "not complete"),
        (lambda key, tensor: tensor[:2] if "lora_down" in key else tensor, "uneven rank"),
        (lambda _, tensor: tensor.to(torch.int8), "floating-point"),
    ],
)
def test_what_no_base_can_be_given_is_named(
    change: Callable[[str, Tensor], Tensor | None], what: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFileError, match=what):
        check_values(_file(tmp_path, change))


def test_halves_of_different_rank_are_noted_by_inspect(tmp_path: Path) -> None:
    path = _file(tmp_path, lambda key, tensor: tensor[:2] if "lora_down" in key else tensor)
    assert any("halves of different rank" in note for note in read_contents(path).notes)


def test_another_rank_than_the_settings_is_told_from_the_header(tmp_path: Path) -> None:
    path = str(_file(tmp_path))
    check_start(TrainConfig(network_weights=path, network_dim=4), "sd15")
    check_start(TrainConfig(network_weights=path, network_dim=8, dim_from_weights=True), "sd15")
    with pytest.raises(ConfigError, match="has rank 4, and network_dim is 8") as caught:
        check_start(TrainConfig(network_weights=path, network_dim=8), "sd15")
    assert "network_dim = 4" in caught.value.hint


def test_words_of_a_locale_without_utf8_do_not_lose_the_file(tmp_path: Path) -> None:
    """Under LC_ALL=C the command line's ü arrives as two undecoded bytes."""
    word = "für".encode().decode("ascii", "surrogateescape")
    (tmp_path / "x.safetensors").write_bytes(to_bytes({"a": torch.zeros(1)}, {"ss_training_comment": word}))
    assert read_header(tmp_path / "x.safetensors")
    assert "für".encode() in (tmp_path / "x.safetensors").read_bytes()
