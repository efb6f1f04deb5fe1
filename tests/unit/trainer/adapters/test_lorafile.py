"""What a LoRA file promises: the adapter bitwise, kohya's metadata, and a clear no to anything else."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_base, tiny_config, tiny_prepared
from trainer.adapters import lorafile, private
from trainer.adapters.adapter import inject
from trainer.adapters.metadata import (
    CONFIG_KEY,
    dataset_metadata,
)
from trainer.config import TrainConfig
from trainer.errors import ConfigError, ModelFileError
from trainer.tensorfile import to_bytes


def randomise(adapter):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in adapter.trainable():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)


def written(base, path, **values):
    """(state of the rounded adapter, config); the base is clean again."""
    config = tiny_config(network_dim=4, network_alpha=3, output_name="mine", **values)
    adapter = inject(base, config)
    randomise(adapter)
    adapter.round_to(config.save_precision)
    lorafile.write(path, adapter, config, {"ss_tag_frequency": "{}"})
    state = adapter.state()
    adapter.remove()
    return state, config


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("conv_dim", [None, 2])
def test_what_was_written_is_attached_bitwise(family, conv_dim, tmp_path):
    base = tiny_base(family)
    state, _ = written(base, tmp_path / "a.safetensors", conv_dim=conv_dim, conv_alpha=1)
    file = lorafile.read(tmp_path / "a.safetensors")
    assert file.family == family
    adapter = lorafile.attach(base, file)
    again = adapter.state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)
    adapter.remove()


def test_weights_are_in_save_precision_and_alphas_exact(tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors", save_precision="bf16")
    tensors = load_file(tmp_path / "a.safetensors")
    assert {t.dtype for k, t in tensors.items() if k.endswith(".weight")} == {torch.bfloat16}
    alphas = {t for k, t in tensors.items() if k.endswith(".alpha")}
    assert all(a.shape == () and a.item() == 3.0 for a in alphas)


def test_the_bytes_depend_on_weights_and_settings_not_on_time(tmp_path):
    base = tiny_base("sd15")
    for name in ("a", "b"):
        written(base, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "family, version, architecture",
    [
        ("sd15", "sd_v1", "stable-diffusion-v1/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_metadata_is_what_kohyas_readers_look_for(family, version, architecture, tmp_path):
    base = tiny_base(family)
    _, config = written(base, tmp_path / "a.safetensors", conv_dim=2, conv_alpha=1)
    found = metadata(tmp_path / "a.safetensors")
    assert found["ss_base_model_version"] == version
    assert found["modelspec.architecture"] == architecture
    assert found["ss_v2"] == "False"
    assert found["ss_network_module"] == "networks.lora"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "3.0")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1.0"}
    assert found["ss_learning_rate"] == "0.001"
    assert found["ss_output_name"] == found["modelspec.title"] == "mine"
    assert found["ss_min_snr_gamma"] == "None"
    assert found["ss_tag_frequency"] == "{}"
    required = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}
    assert required <= {name.removeprefix("modelspec.") for name in found if name.startswith("modelspec.")}
    shared = {"pretrained_model_name_or_path": base.name, "train_data_dir": ""}
    assert TrainConfig(**json.loads(found[CONFIG_KEY])) == config.with_values(shared)


def test_no_path_of_this_machine_gets_into_the_file(tmp_path):
    base = tiny_base("sd15")
    places = {"train_data_dir": "/home/me/sks", "pretrained_model_name_or_path": "/home/me/x.safetensors"}
    written(base, tmp_path / "a.safetensors", **places)
    assert b"/home/me" not in (tmp_path / "a.safetensors").read_bytes()


def test_what_a_private_file_keeps_back_is_noted_before_it_exists(tmp_path, monkeypatch):
    base = tiny_base("sd15")
    config = tiny_config(no_metadata=True)
    adapter = inject(base, config)
    path, note = tmp_path / "a.safetensors", tmp_path / "metadata.json"

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(lorafile, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        lorafile.write(path, adapter, config, note=note)
    assert note.is_file() and not path.exists()
    monkeypatch.undo()
    note.unlink()
    lorafile.write(path, adapter, config, note=note)
    adapter.remove()
    assert CONFIG_KEY not in metadata(path) and CONFIG_KEY in private.metadata_of(path, note)


def test_the_metadata_says_how_long_it_was_trained_on_which_tags(tmp_path):
    base = tiny_base("sd15")
    config = tiny_config(conv_dim=2, lr_warmup_steps=0.5)
    adapter = inject(base, config)
    dataset = tiny_prepared(base, config, images=4, repeats=3).dataset
    lorafile.write(tmp_path / "a.safetensors", adapter, config, dataset_metadata(config, dataset))
    found = metadata(tmp_path / "a.safetensors")
    assert found["ss_num_train_images"] == "12"
    assert found["ss_max_train_steps"] == found["ss_steps"] == "12"
    assert (found["ss_epoch"], found["ss_lr_warmup_steps"]) == ("2", "6")
    assert json.loads(found["ss_tag_frequency"])[""]["a photo of sks"] == 4
    assert json.loads(found["ss_network_args"])["conv_alpha"] == "2.0"


FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    "values, message",
    [
        ({f"{FC1}.alpha": torch.ones(3)}, "has 3 alphas"),
        ({f"{FC1}.alpha": torch.tensor(torch.nan)}, "has alpha nan"),
        ({f"{FC1}.lora_down.weight": torch.tensor(1.0)}, r"has lora_down.weight of shape \(\)"),
        (
            {f"{FC1}.lora_down.weight": torch.ones(0, 16), f"{FC1}.lora_up.weight": torch.ones(32, 0)},
            r"of shape \(0, 16\)",
        ),
        ({f"{FC1}.lora_up.weight": torch.full((32, 4), torch.nan)}, "is not finite"),
        ({f"{FC1}.lora_up.weight": torch.ones(32, 4, dtype=torch.int32)}, "is not of floating-point numbers"),
        ({f"{FC1}.lora_A.weight": torch.ones(4, 16)}, "twice"),
        (
            {
                f"text_encoder.text_model.encoder.layers.0.mlp.fc1.{half}.weight": torch.ones(shape)
                for half, shape in (("lora_A", (4, 16)), ("lora_B", (32, 4)))
            },
            "twice, under two names",
        ),
    ],
)
def test_a_damaged_module_is_refused_by_name(values, message, tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match=message):
        lorafile.attach(base, changed(tmp_path / "a.safetensors", lambda tensors: tensors.update(values)))
    assert not hasattr(base.text_encoders[0], "peft_config")


@pytest.mark.parametrize("settings", ["[]", "3", '{"x.lora_alpha": 1, '])
def test_settings_of_peft_that_are_none_are_refused(settings, tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    facts = metadata(tmp_path / "a.safetensors") | {"lora_adapter_metadata": settings}
    save_file({k: t for k, t in tensors.items() if not k.endswith(".alpha")}, tmp_path / "a", facts)
    with pytest.raises(ModelFileError, match="lora_adapter_metadata gives"):
        lorafile.attach(base, lorafile.read(tmp_path / "a"))


def test_alpha_zero_means_the_rank_as_in_sd_scripts(tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors")
    file = changed(tmp_path / "a.safetensors", lambda t: t.update({f"{FC1}.alpha": torch.zeros(())}))
    adapter = lorafile.attach(base, file)
    assert [layer.target.alpha for layer in adapter.layers if layer.target.key == FC1] == [4.0]
    adapter.remove()


def test_the_model_hash_is_that_of_the_files_tensors(tmp_path):
    written(tiny_base("sd15"), tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata(tmp_path / "a.safetensors")["sshs_model_hash"] == hashlib.sha256(body).hexdigest()


def test_a_lora_of_the_other_family_is_refused(tmp_path):
    """D8 · weight 5 · A LoRA for another kind of model → Refused, with the kind of model that it is for."""
    written(tiny_base("sdxl"), tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match=r"LoRA for SDXL \(.*\); the base tiny-sd15 is SD1.5"):
        lorafile.attach(tiny_base("sd15"), lorafile.read(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_family_is_known_without_metadata(family, tmp_path):
    base = tiny_base(family)
    for values in ({}, {"network_train_unet_only": True}):
        written(base, tmp_path / "a.safetensors", **values)
        save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "bare.safetensors")
        assert lorafile.read(tmp_path / "bare.safetensors").family == family


def changed(path, change):
    tensors, facts = load_file(path), metadata(path)
    change(tensors)
    save_file(tensors, path, facts)
    return lorafile.read(path)


def test_a_key_that_no_module_has_is_named(tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors")
    stray = "lora_unet_down_blocks_9_attentions_0_proj_in.lora_up.weight"
    file = changed(tmp_path / "a.safetensors", lambda tensors: tensors.update({stray: torch.zeros(1)}))
    with pytest.raises(ModelFileError, match=f"1 entries of a.safetensors do not fit tiny-sd15: {stray}"):
        lorafile.attach(base, file)
    assert not hasattr(base.unet, "peft_config")


def test_half_a_module_is_refused(tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors")
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    file = changed(tmp_path / "a.safetensors", lambda tensors: tensors.pop(f"{key}.lora_up.weight"))
    with pytest.raises(ModelFileError, match=f"do not fit tiny-sd15: {key}"):
        lorafile.attach(base, file)


def test_a_lora_for_a_wider_model_is_refused(tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors")
    key = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    file = changed(tmp_path / "a.safetensors", lambda tensors: tensors.update({key: torch.zeros(4, 99)}))
    with pytest.raises(ModelFileError, match=r"mlp_fc1 .*lora_down.weight \(4, 99\)"):
        lorafile.attach(base, file)


@pytest.mark.parametrize("name", ["x.hada_t1", "x.lokr_t2", "model.diffusion_model.out.2.weight"])
def test_other_kinds_of_files_are_refused(name, tmp_path):
    save_file({name: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match="contains no LoRA"):
        lorafile.read(tmp_path / "a.safetensors")


def test_tensors_beside_a_lora_are_named_and_refused(tmp_path):
    save_file(
        {
            f"{FC1}.lora_down.weight": torch.ones(4, 16),
            f"{FC1}.lora_up.weight": torch.ones(32, 4),
            "more": torch.ones(2),
        },
        tmp_path / "a.safetensors",
    )
    with pytest.raises(ModelFileError, match="holds more than a LoRA: more"):
        lorafile.read(tmp_path / "a.safetensors")


def test_a_header_of_any_length_is_read(tmp_path):
    """A length whose first byte is 0x80, as a pickle's first byte, is a length all the same."""
    path = tmp_path / "a.safetensors"
    tensors = {"x.lora_up.weight": torch.zeros(1)}
    for fill in range(600):
        path.write_bytes(to_bytes(tensors, {"fill": "." * fill}))
        if path.read_bytes()[0] == 0x80:
            break
    else:
        raise AssertionError("no such length was made")
    assert lorafile.read(path).tensors.keys() == tensors.keys()


def test_an_empty_file_is_refused(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match="holds no tensors"):
        lorafile.read(tmp_path / "a.safetensors")


def test_control_characters_of_a_hostile_key_do_not_reach_the_terminal(tmp_path):
    save_file({"\x1b[31mred" * 100: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError) as caught:
        lorafile.read(tmp_path / "a.safetensors")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_file_without_alphas_has_scale_one(tmp_path):
    base = tiny_base("sd15")
    written(base, tmp_path / "a.safetensors")

    def drop(tensors):
        for key in [key for key in tensors if key.endswith(".alpha")]:
            del tensors[key]

    adapter = lorafile.attach(base, changed(tmp_path / "a.safetensors", drop))
    assert {layer.target.alpha / layer.target.rank for layer in adapter.layers} == {1.0}
    adapter.remove()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr"])
def test_training_can_begin_with_the_weights_of_a_file(kind, tmp_path):
    base = tiny_base()
    config = TrainConfig(
        network_type=kind, network_dim=2, network_alpha=1, conv_dim=2, seed=3, save_precision="float"
    )
    first = inject(base, config)
    with torch.no_grad():
        for number, weight in enumerate(first.trainable()):
            weight.add_(0.01 * (number % 7 + 1))
    first.round_to("float")
    path = tmp_path / "first.safetensors"
    lorafile.write(path, first, config)
    deltas = {layer.target.key: layer.delta().detach().clone() for layer in first.layers}
    first.remove()
    again = lorafile.begin(base, config.with_values({"network_weights": str(path), "seed": 4}))
    for layer in again.layers:
        torch.testing.assert_close(layer.delta().detach(), deltas[layer.target.key], rtol=1e-5, atol=1e-7)
    again.remove()
    for values, message in (
        # a LoKr of another rank may be whole where the first was in halves
        ({"network_dim": 3}, "other tensors" if kind == "LoKr" else "another rank or alpha"),
        ({"network_train_unet_only": True}, "has other tensors"),
    ):
        with pytest.raises(ConfigError, match=message):
            lorafile.begin(base, config.with_values({"network_weights": str(path), **values}))
        assert not hasattr(base.unet, "peft_config")
    fresh = lorafile.begin(base, config)
    assert any(not bool(layer.delta().any()) for layer in fresh.layers)
    fresh.remove()


def started(tmp_path, tensors, metadata=None, **values):
    """(network_weights of a file with these tensors, settings)"""
    save_file(tensors, tmp_path / "first.safetensors", metadata)
    config = TrainConfig(network_dim=2, network_alpha=1, save_precision="float", **values)
    return config.with_values({"network_weights": str(tmp_path / "first.safetensors")})


def test_training_begins_with_a_file_of_another_tool(tmp_path):
    """diffusers' names and halves: alpha is in the second one, so the file's alpha is its rank."""
    base = tiny_base()
    config = TrainConfig(network_dim=2, network_alpha=2, network_train_unet_only=True)
    first = inject(base, config)
    randomise(first)
    theirs, deltas = {}, {}
    for layer in first.layers:
        for half, weight in (("lora_A", layer.wrapped.lora_down), ("lora_B", layer.wrapped.lora_up)):
            theirs[f"unet.{layer.target.path}.{half}.weight"] = weight.detach().clone()
        deltas[layer.target.key] = layer.delta().detach().clone()
    first.remove()
    again = lorafile.begin(
        base, started(tmp_path, theirs, network_train_unet_only=True).with_values({"network_alpha": 2})
    )
    assert {layer.target.key for layer in again.layers} == deltas.keys()
    for layer in again.layers:
        torch.testing.assert_close(layer.delta().detach(), deltas[layer.target.key])


PROJ = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    "tensors, values, message",
    [
        (
            {f"{PROJ}.diff": (16, 16, 1, 1)},
            {},
            r"holds Full \(1 module\), and network_type is LoRA",
        ),
        ({"lora_unet_mid_block_attentions_0_norm.w_norm": (16,)}, {}, r"holds Norm \(1 module\)"),
        ({f"{PROJ}.lokr_w1": (4, 4), f"{PROJ}.lokr_w2": (4, 4)}, {}, "holds LoKr .*set network_type = LoKr"),
        (
            {
                f"{PROJ}.lora_down.weight": (2, 16, 1, 1),
                f"{PROJ}.lora_up.weight": (16, 2, 1, 1),
                f"{PROJ}.dora_scale": (16, 1),
            },
            {"network_type": "DoRA"},
            "has DoRA magnitudes per output",
        ),
        (
            {f"{FC1}.lora_down.weight": (2, 16), f"{FC1}.lora_up.weight": (32, 2)},
            {"network_type": "LoHa"},
            "holds LoRA .*set network_type = LoRA",
        ),
        (
            {
                "lora_unet_single_blocks_0_linear1.lora_down.weight": (2, 3072),
                "lora_unet_single_blocks_0_linear1.lora_up.weight": (21504, 2),
            },
            {},
            r"is a LoRA for FLUX \(.*\); the base is SD1.5",
        ),
    ],
)
def test_a_file_that_these_settings_cannot_go_on_with_is_refused_with_the_reason(
    tensors, values, message, tmp_path
):
    base = tiny_base()
    config = started(tmp_path, {name: torch.ones(shape) for name, shape in tensors.items()}, **values)
    with pytest.raises(ConfigError, match=message):
        lorafile.begin(base, config)
    assert not hasattr(base.unet, "peft_config")


def test_training_goes_on_with_a_tucker_file_as_a_locon(tmp_path):
    base = tiny_base()
    config = TrainConfig(
        network_dim=2, network_alpha=1, conv_dim=2, network_train_unet_only=True, save_precision="float"
    )
    fresh = inject(base, config)
    randomise(fresh)
    tensors, expected = {}, {}
    for layer in fresh.layers:
        key, down, up = layer.target.key, layer.wrapped.lora_down.detach(), layer.wrapped.lora_up.detach()
        tensors |= {f"{key}.alpha": torch.tensor(layer.target.alpha), f"{key}.lora_up.weight": up.clone()}
        if down.dim() == 4 and down.shape[-1] > 1:
            core, down = down[:, :2].clone(), down[:, :, :1, :1].clone()
            tensors[f"{key}.lora_mid.weight"] = core
            full = torch.einsum("rskl,si->rikl", core, down[:, :, 0, 0])
        else:
            full = down
        tensors[f"{key}.lora_down.weight"] = down.clone()
        expected[key] = up.flatten(1) @ full.flatten(1) * layer.wrapped.scaling["lora"]
    fresh.remove()
    begun = lorafile.begin(base, started(tmp_path, tensors, conv_dim=2, network_train_unet_only=True))
    assert any("lora_mid" in name for name in tensors)
    for layer in begun.layers:
        torch.testing.assert_close(layer.delta().detach(), expected[layer.target.key])
