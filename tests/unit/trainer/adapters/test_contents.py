"""What a LoRA file of any tool is: its kind, the model it is for, its parts, and what is odd about it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.lorafiles import FILES, FOREIGN, SD1, XL, filled, lora
from trainer.adapters import lorafile
from trainer.adapters.contents import read_contents
from trainer.errors import ModelFileError
from trainer.tensorfile import to_bytes


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_every_tool_is_what_it_is(name, tmp_path):
    file = FILES[name]
    found = read_contents(file.write(tmp_path / "x.safetensors"))
    assert found.is_lora
    assert (found.kind, found.made_for.title, tuple(found.components)) == (file.kind, file.model, file.parts)
    notes = " | ".join(found.notes)
    assert all(words in notes for words in file.warns)
    assert bool(notes) == bool(file.warns)


@pytest.mark.parametrize("file", FOREIGN, ids=lambda file: file.model)
def test_another_architecture_is_named_and_never_one_of_ours(file, tmp_path):
    found = read_contents(file.write(tmp_path / "x.safetensors"))
    assert (found.made_for.title, found.made_for.families) == (file.model, ())
    assert tuple(found.components) == file.parts


@pytest.mark.parametrize(
    "metadata, title",
    [
        ({}, "SD1.5 or SDXL or SD2"),
        (SD1, "SD1.5"),
        (XL, "SDXL"),
        ({"ss_v2": "True", "ss_base_model_version": "sd_v2_v"}, "SD2"),
        ({"ss_base_model_version": "sd_1.5"}, "SD1.5"),  # ai-toolkit
        ({"ss_base_model_version": "sdxl_"}, "SDXL"),  # OneTrainer
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
    ],
)
def test_the_metadata_decides_where_the_shapes_cannot(metadata, title, tmp_path):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(lora(key, 1280, 1280), tmp_path / "x.safetensors", metadata or None)
    assert read_contents(tmp_path / "x.safetensors").made_for.title == title


def test_a_model_that_only_its_metadata_tells_apart_is_named(tmp_path):
    save_file(FILES["kohya SDXL"].tensors(), tmp_path / "x.safetensors", {"ss_base_model_version": "kolors"})
    assert read_contents(tmp_path / "x.safetensors").made_for[:2] == ("Kolors", ())


@pytest.mark.parametrize(
    "names, what",
    [
        ({"emb_params": (4, 768)}, r"an embedding \(textual inversion\) for SD1.5"),
        ({"clip_l": (4, 768), "clip_g": (4, 1280)}, r"an embedding \(textual inversion\) for SDXL"),
        ({"<sks>": (1, 768)}, "an embedding"),
        (
            {
                "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
                "first_stage_model.decoder.conv_in.weight": (4, 4, 3, 3),
            },
            "a full checkpoint of SD1.5",
        ),
        (
            {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048)},
            "the U-Net or transformer of SDXL",
        ),
        ({"control_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, "a ControlNet"),
        (
            {
                "controlnet_cond_embedding.conv_in.weight": (4, 4, 3, 3),
                "down_blocks.0.resnets.0.conv1.weight": (4, 4),
            },
            "a ControlNet",
        ),
        ({"lllite_unet_input_blocks_4_1_x.down.0.weight": (4, 4)}, "a ControlNet-LLLite"),
        ({"first_stage_model.encoder.conv_in.weight": (4, 3, 3, 3)}, "a VAE"),
        ({"decoder.conv_in.weight": (4, 4, 3, 3), "encoder.conv_in.weight": (4, 4, 3, 3)}, "a VAE"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "a text encoder"),
        ({"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)}, "an IP-Adapter"),
        ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "a full FLUX model"),
        (
            {"unet:0:up": (4, 4), "unet:0:down": (4, 4)},
            "a LoRA of the first lora tool, whose tensors have numbers",
        ),
    ],
)
def test_a_model_that_is_no_lora_is_named(names, what, tmp_path):
    save_file({name: filled(*shape) for name, shape in names.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFileError, match=f"contains no LoRA: it is {what}"):
        lorafile.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "it is empty"),
        (b"\0" * 4096, "its beginning is only zeros"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\n <html lang='en'>", "is a web page"),
        (b'{"error": "Unauthorized"}', "is an error message of a web server"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "is a pickle file"),
        (b"PK\x03\x04" + bytes(26) + b"lora.safetensors", "is a zip archive"),
        (b"\x80\x02}q\x00.", "is a pickle file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), r"is a picture \(PNG\)"),
        (b"\xff\xd8\xff\xe0" + bytes(40), r"is a picture \(JPEG\)"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(40), r"is a picture \(WebP\)"),
        (b"GGUF\x03\0\0\0" + bytes(40), "is a GGUF file"),
        (b"\x1f\x8b\x08" + bytes(40), "is an archive"),
        ("prompt: ein Bär\n".encode() * 400, "is a text file"),
        (b"\xff" * 8 + b"{}", "does not fit into the file"),
    ],
)
def test_what_is_no_safetensors_file_is_named(content, what, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=what):
        lorafile.read(tmp_path / "x.safetensors")


def test_a_cut_file_says_how_much_is_missing(tmp_path):
    path = FILES["kohya SDXL"].write(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="it ends 100 bytes too early"):
        lorafile.read(path)


def test_a_name_that_is_twice_in_the_header_is_refused(tmp_path):
    content = to_bytes({"a.lora_up.weight": torch.zeros(1, 1), "b.lora_up.weight": torch.zeros(1, 1)}, {})
    (tmp_path / "x.safetensors").write_bytes(content.replace(b'"b.lora_up', b'"a.lora_up'))
    with pytest.raises(ModelFileError, match=r"has the entry 'a\.lora_up\.weight' twice"):
        lorafile.read(tmp_path / "x.safetensors")


def test_settings_of_peft_count_as_alphas(tmp_path):
    """diffusers stores them in the file, PEFT beside it."""
    tensors = FILES["diffusers SDXL"].tensors()
    settings = {"unet.lora_alpha": 8, "unet.r": 2, "unet.alpha_pattern": {}}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    assert read_contents(tmp_path / "x.safetensors").notes == ()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert read_contents(tmp_path / "adapter_model.safetensors").notes != ()
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 2}')
    assert read_contents(tmp_path / "adapter_model.safetensors").notes == ()


def test_half_a_module_is_told(tmp_path):
    tensors = FILES["kohya SDXL"].tensors()
    del tensors["lora_te2_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight"]
    save_file(tensors, tmp_path / "x.safetensors", XL)
    notes = read_contents(tmp_path / "x.safetensors").notes
    assert notes == ("1 module not complete: lora_te2_text_model_encoder_layers_0_self_attn_q_proj",)


def test_the_layer_that_sdxl_does_not_use_is_named_as_such(tmp_path):
    """It stays zero in every LoRA that trains the first text encoder."""
    for prefix, unused in (("lora_te1", True), ("lora_te2", False), ("lora_unet", False)):
        tensors = FILES["kohya SDXL"].tensors()
        for name in tensors:
            if name.startswith(prefix) and "lora_up" in name:
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, tmp_path / "x.safetensors", XL)
        notes = lorafile.read(tmp_path / "x.safetensors").notes
        told = [note for note in notes if "are zero and change nothing" in note]
        assert len(told) == 1 and ("which SDXL does not use" in told[0]) == unused, notes


def test_values_that_are_broken_or_zero_are_told(tmp_path):
    for value, words in (
        (float("nan"), "3 of 4 modules hold NaN or infinity"),
        (0.0, "3 of 4 modules are zero"),
    ):
        tensors = FILES["kohya SDXL"].tensors()
        for name in tensors:
            if ("lora_up" in name and "unet" in name) or (name.startswith("lora_te2") and "up" in name):
                tensors[name] = torch.full_like(tensors[name], value)
        save_file(tensors, tmp_path / "x.safetensors", XL)
        assert any(words in note for note in lorafile.read(tmp_path / "x.safetensors").notes)
