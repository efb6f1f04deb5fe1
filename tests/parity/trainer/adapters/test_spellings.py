"""One LoRA under the key names of every tool gives the same prediction, and forms that no adapter computes change the
weights as they should.  diffusers and ComfyUI's formula prove the first spelling (``test_lora_in_diffusers``,
``test_adapter_kinds``)."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.trainer.adapters.forms import wave
from tests.parity.trainer.adapters.test_adapter_kinds import prediction, written
from tests.tiny import tiny_base
from trainer.adapters import lorafile
from trainer.adapters.names import original_path, places_of
from trainer.errors import ModelFileError

FAMILIES = {"sd15": {"ss_base_model_version": "sd_v1"}, "sdxl": {"ss_base_model_version": "sdxl_base_v1-0"}}


def places(base):
    """kohya's key → (component, diffusers path, Stability's path in the U-Net)."""
    found = {}
    for place in places_of(base).values():
        original = original_path(base.unet, place.path) if place.component == "unet" else None
        found[place.key] = place.component, place.path.removeprefix("text_model."), original
    return found


def kohya_with_diffusers_blocks(component, path, original):
    return path.replace(".", "_") if component == "unet" else None


def respelled(base, tensors, spell, ending):
    """The tensors with other module names and endings; alphas are multiplied into the second half if dropped."""
    known = places(base)
    found = {}
    for name, tensor in tensors.items():
        key, _, part = name.partition(".")
        module = spell(key, *known[key])
        if part == "alpha":
            if ending is None:
                found[f"{module}.alpha"] = tensor
            continue
        if ending is None:
            found[f"{module}.{part}"] = tensor
            continue
        scale = tensors[f"{key}.alpha"] / tensors[f"{key}.lora_down.weight"].shape[0]
        value = tensor * scale if part == "lora_up.weight" else tensor
        found[module + ending[part == "lora_up.weight"]] = value.contiguous()
    return found


def diffusers(key, component, path, original):
    return f"unet.{path}" if component == "unet" else f"{component}.text_model.{path}"


def one_trainer(key, component, path, original):
    return f"unet.{original}" if component == "unet" else diffusers(key, component, path, original)


def comfyui(key, component, path, original):
    clip = "clip_g" if component == "text_encoder_2" else "clip_l"
    return (
        f"diffusion_model.{original}"
        if component == "unet"
        else f"text_encoders.{clip}.transformer.text_model.{path}"
    )


def processors(key, component, path, original):
    if component == "unet" and (
        match := re.fullmatch(r"(.+\.attn[12])\.(to_q|to_k|to_v|to_out)(?:\.0)?", path)
    ):
        return f"unet.{match[1]}.processor.{match[2]}_lora"
    return diffusers(key, component, path, original) + "_lora"


PEFT = (".lora_A.weight", ".lora_B.weight")
SPELLINGS = {
    "kohya's prefix, diffusers' blocks": (
        lambda key, component, path, original: (
            "lora_unet_" + path.replace(".", "_") if component == "unet" else key
        ),
        None,
    ),
    "kohya's prefix, Stability's blocks": (
        lambda key, component, path, original: (
            "lora_unet_" + original.replace(".", "_") if component == "unet" else key
        ),
        None,
    ),
    "text encoder without text_model": (lambda key, *_: key.replace("_text_model_", "_"), None),
    "te1": (lambda key, *_: key.replace("lora_te_", "lora_te1_"), None),
    "diffusers": (diffusers, PEFT),
    "diffusers, an adapter's name": (diffusers, (".lora_A.default_0.weight", ".lora_B.default_0.weight")),
    "diffusers before 0.26": (diffusers, (".lora.down.weight", ".lora.up.weight")),
    "diffusers, text encoders": (
        diffusers,
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ),
    "diffusers before 0.18": (processors, (".down.weight", ".up.weight")),
    "PEFT inside": (
        lambda key, component, path, original: diffusers(key, component, path, original).replace(
            ".", ".base_model.model.", 1
        ),
        PEFT,
    ),
    "OneTrainer": (one_trainer, None),
    "OneTrainer, diffusers' blocks": (diffusers, None),
    "ComfyUI": (comfyui, None),
    "LyCORIS without kohya": (
        lambda key, component, path, original: (
            "lycoris_" + path.replace(".", "_") if component == "unet" else key
        ),
        None,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_spelling_of_one_lora_gives_one_prediction(family, tmp_path):
    base = tiny_base(family)
    scored, _ = written(base, tmp_path / "a.safetensors", "LoCon", save_precision="float")
    tensors = load_file(tmp_path / "a.safetensors")
    for name, (spell, ending) in SPELLINGS.items():
        again = respelled(base, tensors, spell, ending)
        assert again.keys() != tensors.keys() or name in (
            "te1",
            "kohya's prefix, diffusers' blocks",
            "kohya's prefix, Stability's blocks",
        )
        save_file(again, tmp_path / "b.safetensors", FAMILIES[family])
        adapter = lorafile.attach(base, lorafile.read(tmp_path / "b.safetensors"))
        found = prediction(base)
        adapter.remove()
        torch.testing.assert_close(
            found, scored, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def weights_of(base):
    return [p.detach().clone() for model in base.components().values() for p in model.parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_differences_norms_and_biases_change_the_weights_and_leave_no_trace(family, tmp_path):
    base = tiny_base(family)
    before, plain = weights_of(base), prediction(base)
    tensors, changes = {}, []
    for number, place in enumerate({place.key: place for place in places_of(base).values()}.values()):
        is_norm = type(place.layer).__name__ in ("GroupNorm", "LayerNorm")
        for part, own in (
            ("w_norm" if is_norm else "diff", place.layer.weight),
            ("b_norm" if is_norm else "diff_b", place.layer.bias),
        ):
            if own is not None:
                tensors[f"{place.key}.{part}"] = wave(*own.shape, at=number) * 0.1
                changes.append((own, tensors[f"{place.key}.{part}"]))
    save_file(tensors, tmp_path / "a.safetensors", FAMILIES[family])
    adapter = lorafile.attach(base, lorafile.read(tmp_path / "a.safetensors"))
    found, fingerprint = prediction(base), adapter.fingerprint()
    adapter.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(base), strict=True))
    assert torch.equal(prediction(base), plain)
    with torch.no_grad():
        for own, added in changes:
            own.add_(added)
    torch.testing.assert_close(found, prediction(base), rtol=0, atol=2e-5)
    assert not torch.allclose(found, plain, atol=1e-2)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, tmp_path / "b.safetensors", FAMILIES[family])
    other = lorafile.attach(tiny_base(family), lorafile.read(tmp_path / "b.safetensors"))
    assert other.fingerprint() != fingerprint


def test_norms_beside_a_lora_are_attached_too(tmp_path):
    base = tiny_base("sd15")
    scored, _ = written(base, tmp_path / "a.safetensors", "LoRA", save_precision="float")
    norm = next(place for place in places_of(base).values() if place.path == "mid_block.attentions.0.norm")
    more = {f"{norm.key}.w_norm": torch.full((norm.layer.weight.numel(),), 0.5)}
    save_file(load_file(tmp_path / "a.safetensors") | more, tmp_path / "b.safetensors", FAMILIES["sd15"])
    adapter = lorafile.attach(base, lorafile.read(tmp_path / "b.safetensors"))
    with_norm = prediction(base)
    adapter.remove()
    assert not torch.allclose(with_norm, scored, atol=1e-3)
    norm.layer.weight.data.add_(0.5)
    adapter = lorafile.attach(base, lorafile.read(tmp_path / "a.safetensors"))
    torch.testing.assert_close(prediction(base), with_norm, rtol=0, atol=1e-5)
    adapter.remove()


@pytest.mark.parametrize("part, shape", [("diff", (3, 3)), ("diff_b", (3,)), ("w_norm", (3,))])
def test_a_difference_of_another_shape_is_refused_and_leaves_no_trace(part, shape, tmp_path):
    base = tiny_base("sd15")
    plain = prediction(base)
    written(base, tmp_path / "a.safetensors", "LoRA")
    key = "lora_unet_mid_block_attentions_0_" + ("norm" if part == "w_norm" else "proj_in")
    tensors = {k: t for k, t in load_file(tmp_path / "a.safetensors").items() if not k.startswith(key)}
    save_file(tensors | {f"{key}.{part}": torch.ones(shape)}, tmp_path / "b.safetensors", FAMILIES["sd15"])
    with pytest.raises(ModelFileError, match=f"1 entries of b.safetensors do not fit tiny-sd15: {key}"):
        lorafile.attach(base, lorafile.read(tmp_path / "b.safetensors"))
    assert torch.equal(prediction(base), plain)
