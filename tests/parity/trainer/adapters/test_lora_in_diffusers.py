"""A LoRA file loads in diffusers and gives the same output as the scored adapter, with kohya's key names.

The names are also checked literally in tests/unit/trainer/bases/test_bases.py: diffusers accepts names that
ComfyUI and A1111 do not, so loading in diffusers proves nothing about those programs.
"""

import re

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_base, tiny_config, tiny_pipeline
from trainer.adapters import lorafile
from trainer.adapters.adapter import inject
from trainer.bases.base import Sizes
from trainer.bases.load import load_base

SIZES = Sizes((64, 64), (0, 0), (64, 64))
KEYS = {
    "sd15": re.compile(
        r"lora_(unet_(down_blocks|mid_block|up_blocks)_|te_text_model_encoder_layers_)\w+\.\w+(\.weight)?"
    ),
    "sdxl": re.compile(
        r"lora_(unet_(input_blocks|middle_block|output_blocks)_|te[12]_text_model_encoder_layers_)\w+\.\w+(\.weight)?"
    ),
}


def randomise(adapter):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.trainable():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)


def prediction(base):
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = base.encode_text(["a photo of sks", "a dog"])
        return states, base.predict(noisy, torch.tensor([100, 700]), states, [SIZES, SIZES])


def exported(base, tmp_path, **values):
    """(path of the file, what the rounded adapter predicted); the base is clean again."""
    config = tiny_config(network_dim=4, network_alpha=3, **values)
    adapter = inject(base, config)
    randomise(adapter)
    adapter.round_to(config.save_precision)
    states, predicted = prediction(base)
    path = tmp_path / "lora.safetensors"
    lorafile.write(path, adapter, config)
    adapter.remove()
    return path, states, predicted


def in_diffusers(base, path):
    """What the same networks predict after diffusers' load_lora_weights."""
    pipeline = tiny_pipeline(base)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
    result = prediction(base)
    pipeline.unload_lora_weights()
    return result


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "float"])
def test_diffusers_gives_the_scored_adapters_output(family, precision, tmp_path):
    """C7 · weight 5 · A saved LoRA means something else to other programs → diffusers draws with the file what
    was scored here.
    """
    base = tiny_base(family)
    _, plain = prediction(base)
    path, states, scored = exported(base, tmp_path, save_precision=precision)
    theirs, predicted = in_diffusers(base, path)
    assert not torch.allclose(scored, plain, atol=1e-3)
    torch.testing.assert_close(theirs.hidden_BLD, states.hidden_BLD, rtol=0, atol=2e-6)
    torch.testing.assert_close(predicted, scored, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["mini-sd15", "mini-sdxl"])
def test_on_the_shipped_miniatures_too(name, tmp_path):
    base = load_base(name, dtype=torch.float32)
    path, states, scored = exported(base, tmp_path)
    assert all(KEYS[base.family].fullmatch(key) for key in load_file(path))
    theirs, predicted = in_diffusers(base, path)
    torch.testing.assert_close(theirs.hidden_BLD, states.hidden_BLD, rtol=0, atol=1e-4)
    torch.testing.assert_close(predicted, scored, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_gives_the_same_for_locon_with_its_own_conv_dim_and_alpha(family, tmp_path):
    base = tiny_base(family)
    path, _, scored = exported(base, tmp_path, conv_dim=2, conv_alpha=1)
    _, predicted = in_diffusers(base, path)
    torch.testing.assert_close(predicted, scored, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family, modules", [("sd15", 264), ("sdxl", 986)])
def test_the_full_key_set_loads_in_diffusers_with_the_same_output(family, modules, tmp_path):
    base = tiny_base(family, full_structure=True)
    path, _, scored = exported(base, tmp_path)
    keys = load_file(path).keys()
    assert len(keys) == 3 * modules
    assert all(KEYS[family].fullmatch(key) for key in keys)
    _, predicted = in_diffusers(base, path)
    torch.testing.assert_close(predicted, scored, rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unet_only_file_loads_in_diffusers(family, tmp_path):
    base = tiny_base(family)
    path, _, scored = exported(base, tmp_path, network_train_unet_only=True)
    _, predicted = in_diffusers(base, path)
    torch.testing.assert_close(predicted, scored, rtol=0, atol=2e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_file_that_diffusers_wrote_gives_the_same_output_here(family, tmp_path):
    """Files from save_lora_weights, with diffusers' key names, are read correctly."""
    from diffusers.utils import convert_state_dict_to_diffusers, recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    base = tiny_base(family)
    torch.manual_seed(1)
    for name, model in base.components().items():
        paths = list(base.lora_names()[name])
        settings = LoraConfig(r=4, lora_alpha=4, target_modules=paths, init_lora_weights=False)
        inject_adapter_in_model(settings, model, adapter_name="lora")
    _, expected = prediction(base)
    layers = {
        f"{'unet' if name == 'unet' else name}_lora_layers": convert_state_dict_to_diffusers(
            get_peft_model_state_dict(model, adapter_name="lora")
        )
        for name, model in base.components().items()
    }
    type(tiny_pipeline(base)).save_lora_weights(str(tmp_path), **layers)
    for model in base.components().values():
        recurse_remove_peft_layers(model)
        del model.peft_config
    file = lorafile.read(tmp_path / "pytorch_lora_weights.safetensors")
    again = lorafile.attach(base, file)
    _, predicted = prediction(base)
    torch.testing.assert_close(predicted, expected, rtol=0, atol=2e-6)
    again.remove()
