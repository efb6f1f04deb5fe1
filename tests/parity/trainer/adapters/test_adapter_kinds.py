"""Every kind of adapter gives the same output as its file in ComfyUI (comfy/weight_adapter) and A1111
(extensions-builtin/Lora). Their formulas are reimplemented here on merged weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_base, tiny_config, tiny_pipeline
from trainer.adapters import lorafile
from trainer.adapters.adapter import inject
from trainer.bases.base import Sizes
from trainer.errors import ModelFileError

SIZES = Sizes((64, 64), (0, 0), (64, 64))
KINDS = ["LoRA", "LoCon", "DoRA", "LoHa", "LoKr"]
ENDINGS = {
    "LoRA": {"lora_down.weight", "lora_up.weight", "alpha"},
    "LoCon": {"lora_down.weight", "lora_up.weight", "alpha"},
    "DoRA": {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"},
    "LoHa": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    "LoKr": {"lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha"},
}


def settings(kind, **values):
    conv = {} if kind == "LoRA" else {"conv_dim": 2, "conv_alpha": 1}
    return tiny_config(**({"network_type": kind, "network_dim": 3, "network_alpha": 1.5} | conv | values))


def randomise(adapter, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers:
            for ending, weight in layer.weights.items():
                draw = torch.randn(weight.shape, generator=generator)
                if ending == "dora_scale":
                    weight.mul_(1 + 0.1 * draw)
                else:
                    weight.copy_(draw * 0.2)


def prediction(base):
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = base.encode_text(["a photo of sks", "a dog"])
        return base.predict(noisy, torch.tensor([100, 700]), states, [SIZES, SIZES])


def written(base, path, kind, **values):
    """(what the rounded adapter predicted, its state); the base is clean again."""
    config = settings(kind, **values)
    adapter = inject(base, config)
    randomise(adapter)
    adapter.round_to(config.save_precision)
    predicted, state = prediction(base), adapter.state()
    lorafile.write(path, adapter, config)
    adapter.remove()
    return predicted, state


def modules_of(tensors):
    modules = {}
    for name, tensor in tensors.items():
        key, _, ending = name.partition(".")
        modules.setdefault(key, {})[ending] = tensor.float()
    return modules


def scale(alpha, dim):
    return 1.0 if dim is None else alpha / dim


def comfyui_weight(weight, parts):
    """W' of ComfyUI at strength 1: alpha / dim, then the difference, then dora_scale on W + ΔW's columns."""
    alpha = parts["alpha"].item()
    if "lora_up.weight" in parts:
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        difference = torch.mm(up.flatten(1), down.flatten(1)) * scale(alpha, down.shape[0])
    elif "hada_w1_a" in parts:
        left = parts["hada_w1_a"] @ parts["hada_w1_b"]
        difference = left * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        difference = difference * scale(alpha, parts["hada_w1_b"].shape[0])
    else:
        dim = parts["lokr_w2_b"].shape[0] if "lokr_w2_b" in parts else None
        w1, w2 = parts["lokr_w1"], parts.get("lokr_w2")
        w2 = parts["lokr_w2_a"] @ parts["lokr_w2_b"] if w2 is None else w2
        w1 = w1[..., None, None] if w2.dim() == 4 else w1
        difference = torch.kron(w1, w2) * scale(alpha, dim)
    merged = weight + difference.reshape(weight.shape)
    if "dora_scale" in parts:
        dims = [dim for dim in range(weight.dim()) if dim != 1]
        norm = merged.square().sum(dim=dims, keepdim=True).sqrt()
        merged = merged * (parts["dora_scale"] / norm)
    return merged


def a1111_weight(weight, parts):
    """W' of the A1111 versions that scale by alpha / dim after the magnitude."""
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    merged = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    norm = merged.transpose(0, 1).reshape(merged.shape[1], -1).norm(dim=1, keepdim=True)
    norm = norm.reshape(merged.shape[1], *[1] * (weight.dim() - 1)).transpose(0, 1)
    change = merged * (parts["dora_scale"] / norm) - weight
    return weight + change * (parts["alpha"].item() / down.shape[0])


def merged_prediction(base, path, formula):
    """The prediction of the base with the file merged into its weights by another program's formula."""
    places = {
        key: (component, module)
        for table in (base.lora_names(), base.conv_names())
        for component, names in table.items()
        for module, key in names.items()
    }
    kept = []
    for key, parts in modules_of(load_file(path)).items():
        component, module = places[key]
        layer = base.components()[component].get_submodule(module)
        kept.append((layer, layer.weight.data.clone()))
        layer.weight.data = formula(layer.weight.data, parts)
    predicted = prediction(base)
    for layer, weight in kept:
        layer.weight.data = weight
    return predicted


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float", "fp16"])
def test_comfyui_makes_the_scored_output_of_every_kinds_file(family, kind, precision, tmp_path):
    base = tiny_base(family)
    plain = prediction(base)
    path = tmp_path / "a.safetensors"
    scored, _ = written(base, path, kind, save_precision=precision)
    assert not torch.allclose(scored, plain, atol=1e-3)
    merged = merged_prediction(base, path, comfyui_weight)
    torch.testing.assert_close(merged, scored, rtol=0, atol=1e-5)


def test_a1111_makes_the_scored_output_of_a_dora_file(tmp_path):
    base = tiny_base("sd15")
    scored, _ = written(base, tmp_path / "a.safetensors", "DoRA")
    merged = merged_prediction(base, tmp_path / "a.safetensors", a1111_weight)
    torch.testing.assert_close(merged, scored, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_every_kind_is_attached_bitwise(family, kind, tmp_path):
    base = tiny_base(family)
    scored, state = written(base, tmp_path / "a.safetensors", kind)
    adapter = lorafile.attach(base, lorafile.read(tmp_path / "a.safetensors"))
    again = adapter.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert torch.equal(prediction(base), scored)
    adapter.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_of_every_kind_changes_nothing_and_all_of_it_learns(kind):
    base = tiny_base("sd15")
    before = prediction(base)
    adapter = inject(base, settings(kind))
    assert torch.equal(prediction(base), before)
    optimizer = torch.optim.SGD(adapter.trainable(), lr=1e-2)
    for _ in range(2):  # weights that start at zero keep the gradients of others at zero for one step
        states = base.encode_text(["a cat"])
        noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        base.predict(noisy, torch.tensor([300]), states, [SIZES]).square().sum().backward()
        optimizer.step()
    missing = [
        f"{layer.target.key}.{ending}"
        for layer in adapter.layers
        for ending, weight in layer.weights.items()
        if weight.grad is None or not weight.grad.any()
    ]
    assert missing == []
    adapter.remove()
    assert torch.equal(prediction(base), before)


@pytest.mark.parametrize("family, modules", [("sd15", 264 + 86), ("sdxl", 986 + 66)])
@pytest.mark.parametrize("kind", ["LoCon", "DoRA", "LoHa", "LoKr"])
def test_the_full_module_set_has_this_kinds_names(family, modules, kind):
    base = tiny_base(family, full_structure=True)
    adapter = inject(base, settings(kind, conv_dim=2))
    found = modules_of(adapter.state())
    adapter.remove()
    assert len(found) == modules
    assert {ending for parts in found.values() for ending in parts} == ENDINGS[kind]
    known = {
        key for table in (base.lora_names(), base.conv_names()) for n in table.values() for key in n.values()
    }
    assert found.keys() == known


def test_a_dora_per_output_as_peft_and_lycoris_write_it_is_read_as_peft_computes_it(tmp_path):
    """LyCORIS (by default) and PEFT store one magnitude per output; such files are read correctly."""
    from diffusers.utils import recurse_remove_peft_layers
    from peft import LoraConfig, inject_adapter_in_model

    base = tiny_base("sd15")
    paths = [*base.lora_names()["unet"], *base.conv_names()["unet"]]
    keys = base.lora_names()["unet"] | base.conv_names()["unet"]
    config = LoraConfig(r=2, lora_alpha=1, target_modules=paths, use_dora=True, init_lora_weights=False)
    torch.manual_seed(3)
    inject_adapter_in_model(config, base.unet)
    tensors = {}
    for path in paths:
        layer = base.unet.get_submodule(path)
        magnitude = layer.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            magnitude.mul_(1 + 0.1 * torch.randn(magnitude.shape))
        ones = [1] * (layer.base_layer.weight.dim() - 1)
        tensors |= {
            f"{keys[path]}.lora_down.weight": layer.lora_A["default"].weight.detach().clone(),
            f"{keys[path]}.lora_up.weight": layer.lora_B["default"].weight.detach().clone(),
            f"{keys[path]}.alpha": torch.tensor(1.0),
            f"{keys[path]}.dora_scale": magnitude.detach().clone().reshape(-1, *ones),
        }
    expected = prediction(base)
    recurse_remove_peft_layers(base.unet)
    del base.unet.peft_config
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"})
    adapter = lorafile.attach(base, lorafile.read(tmp_path / "a.safetensors"))
    torch.testing.assert_close(prediction(base), expected, rtol=0, atol=1e-5)
    adapter.remove()


def changed(path, change):
    file = lorafile.read(path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, file.metadata)
    return lorafile.read(path)


KEY = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    "kind, change",
    [
        ("LoHa", lambda tensors: tensors.pop(f"{KEY}.hada_w2_b")),
        ("LoKr", lambda tensors: tensors.pop(f"{KEY}.lokr_w1")),
        ("LoKr", lambda tensors: tensors.update({f"{KEY}.lokr_w1": torch.zeros(3, 3)})),
        ("DoRA", lambda tensors: tensors.pop(f"{KEY}.lora_up.weight")),
        ("DoRA", lambda tensors: tensors.update({f"{KEY}.dora_scale": torch.ones(5, 1)})),
        ("LoRA", lambda tensors: tensors.update({f"{KEY}.hada_w1_a": torch.zeros(3, 3)})),
    ],
)
def test_a_module_that_is_partial_mixed_or_misshapen_is_named(kind, change, tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors", kind)
    file = changed(tmp_path / "a.safetensors", change)
    with pytest.raises(ModelFileError, match=f"1 entries of a.safetensors do not fit tiny-sd15: {KEY}"):
        lorafile.attach(base, file)
    assert not hasattr(base.unet, "peft_config")


def test_of_many_keys_that_do_not_fit_the_first_five_are_named(tmp_path):
    written(tiny_base("sd15", full_structure=True), tmp_path / "a.safetensors", "LoRA")
    with pytest.raises(ModelFileError) as caught:
        lorafile.attach(tiny_base("sd15"), lorafile.read(tmp_path / "a.safetensors"))
    assert caught.value.message.count("lora_") >= 5
    assert caught.value.message.endswith(" …")


def test_a_file_of_two_kinds_gives_every_module_its_own(tmp_path):
    """As LyCORIS writes with a preset that gives some modules another algorithm: one kind is attached as an adapter,
    the rest as differences."""
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors", "LoHa")
    written(base, tmp_path / "b.safetensors", "LoRA")
    other = {k: v for k, v in load_file(tmp_path / "b.safetensors").items() if k.startswith(KEY)}

    def mix(tensors):
        for name in [name for name in tensors if name.startswith(f"{KEY}.")]:
            del tensors[name]
        tensors.update(other)

    file = changed(tmp_path / "a.safetensors", mix)
    assert file.contents.kind == "LoHa + LoRA"
    adapter = lorafile.attach(base, file)
    found = prediction(base)
    adapter.remove()
    expected = merged_prediction(base, tmp_path / "a.safetensors", comfyui_weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_diffusers_does_not_read_loha_and_lokr(kind, tmp_path):
    """As stated in docs/adapters.md: diffusers raises an error."""
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors", kind)
    with pytest.raises(Exception, match=r"(?i)lora|renamed|invalid|keys"):
        tiny_pipeline(base).load_lora_weights(
            str(tmp_path), weight_name="a.safetensors", use_safetensors=True
        )


def test_diffusers_reads_a_dora_file_without_its_magnitudes(tmp_path):
    """As stated in docs/adapters.md: the image differs."""
    base = tiny_base("sd15")
    scored, _ = written(base, tmp_path / "a.safetensors", "DoRA")
    pipeline = tiny_pipeline(base)
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors", use_safetensors=True)
    assert not torch.allclose(prediction(base), scored, atol=1e-3)
