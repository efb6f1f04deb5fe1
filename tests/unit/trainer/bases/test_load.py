"""Tests of load_base: the same networks from a folder and from a single file, and clear errors otherwise."""

import dataclasses
import json
import os
import pickle
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.singlefile import save_single_file
from tests.tiny import save_folder, tiny_base
from trainer.bases import detect, families
from trainer.bases import load as load_module
from trainer.bases.hub import require_network, weight_files
from trainer.bases.load import load_base
from trainer.errors import ModelFileError, first_line
from trainer.tensorfile import Header, load_tensors, read_header


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A diffusers folder of each family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: save_folder(tiny_base(family), root / family) for family in ("sd15", "sdxl")}


@pytest.fixture
def folder(folders, tmp_path):
    """A folder of SD1.5 that a test may modify."""
    return shutil.copytree(folders["sd15"], tmp_path / "model")


@pytest.fixture(scope="module")
def narrow_configs(tmp_path_factory):
    """The configurations of narrow bases with full structure, and their single files."""
    root = tmp_path_factory.mktemp("configs")
    files = {}
    for family in ("sd15", "sdxl"):
        base = tiny_base(family, full_structure=True)
        save_folder(base, root / family)
        files[family] = save_single_file(base, root / f"{family}.safetensors")
    return root, files


def narrow_families(monkeypatch, root):
    """The families with narrow networks: detected by their widths instead of 768 and 2048."""
    monkeypatch.setattr(families, "CONFIGS", root)
    for name, width in (("sd15", 16), ("sdxl", 32)):
        narrow = dataclasses.replace(families.FAMILIES[name], context_width=width)
        monkeypatch.setitem(families.FAMILIES, name, narrow)


def assert_same_networks(first, second):
    for a, b in zip(first.modules(), second.modules(), strict=True):
        mine, theirs = a.state_dict(), b.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_folder_gives_back_the_networks_frozen_and_ready(family, folders):
    base, original = load_base(str(folders[family])), tiny_base(family)
    assert_same_networks(base, original)
    assert (base.family, base.name) == (family, family)
    assert not any(p.requires_grad for module in base.modules() for p in module.parameters())
    assert not any(module.training for module in base.modules())
    caption = ["Wow! a cat"]
    assert torch.equal(base.encode_text(caption).hidden_BLD, original.encode_text(caption).hidden_BLD)
    assert torch.equal(base.alphas_cumprod, original.alphas_cumprod)


@pytest.mark.parametrize(
    ("name", "message"), [("missing.ckpt", "there is no file"), ("a0.png", "a0.png is not a model file")]
)
def test_a_path_that_holds_no_model_is_called_that(tmp_path, name, message):
    (tmp_path / "a0.png").write_bytes(b"x" * 50)
    with pytest.raises(ModelFileError, match=message):
        load_base(str(tmp_path / name))


def test_an_endpoint_is_shown_without_its_password(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    with pytest.raises(ModelFileError, match=r"http://127\.0\.0\.1:9 does not answer") as caught:
        require_network("org/name")
    assert "secret" not in str(caught.value) and "user" not in str(caught.value)


def test_the_identity_is_that_of_the_content_not_of_the_place(folders, folder):
    first = load_base(str(folders["sd15"])).identity
    assert load_base(str(folder)).identity == first
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights)
    assert load_base(str(folder)).identity != first


def swap_words(tokenizer):
    words = tokenizer["model"]["vocab"]
    words["a</w>"], words["b</w>"] = words["b</w>"], words["a</w>"]


@pytest.mark.parametrize(
    "file, change",
    [
        ("text_encoder/config.json", lambda config: config.update(hidden_act="gelu")),
        ("unet/config.json", lambda config: config.update(resnet_time_scale_shift="default", act_fn="gelu")),
        ("vae/config.json", lambda config: config.update(scaling_factor=0.2)),
        ("scheduler/scheduler_config.json", lambda config: config.update(beta_end=0.013)),
        ("tokenizer/tokenizer.json", swap_words),
        ("tokenizer/tokenizer_config.json", lambda config: config.update(pad_token="!")),
        ("tokenizer/tokenizer_config.json", lambda config: config.update(model_max_length=40)),
    ],
)
def test_whatever_changes_what_the_networks_compute_changes_the_identity(file, change, folders, folder):
    """It is the key of cached captions and latents: stale ones would be used silently."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    assert load_base(str(folder)).identity != load_base(str(folders["sd15"])).identity


def test_who_wrote_a_configuration_and_when_is_not_part_of_the_identity(folders, folder):
    edit(folder / "unet/config.json", _diffusers_version="0.6.0", _name_or_path="/home/x")
    edit(folder / "scheduler/scheduler_config.json", _diffusers_version="0.6.0")
    edit(folder / "text_encoder/config.json", transformers_version="4.0", dtype="float16")
    assert load_base(str(folder)).identity == load_base(str(folders["sd15"])).identity


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_weights_are_loaded_in_the_wanted_type(family, folders):
    base = load_base(str(folders[family]), dtype=torch.float16)
    assert base.compute_dtype == torch.float16
    assert base.unet.dtype == torch.float16
    assert base.vae.dtype == (torch.float16 if family == "sd15" else torch.float32)
    assert load_base(str(folders[family]), dtype=torch.bfloat16, no_half_vae=True).vae.dtype == torch.float32


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_single_file_in_the_original_layout_gives_the_same_networks(
    family, narrow_configs, monkeypatch, tmp_path
):
    root, files = narrow_configs
    narrow_families(monkeypatch, root)
    base = load_base(str(files[family]))
    assert_same_networks(base, tiny_base(family, full_structure=True))
    assert base.family == family
    assert len(base.tokenizers[-1]) == 49_408
    assert base.tokenizers[-1].pad_token_id == (49_407 if family == "sd15" else 0)
    if family == "sd15":
        renamed = shutil.copy(files[family], tmp_path / "renamed.safetensors")
        assert load_base(str(renamed)).identity == base.identity


def test_diffusers_reads_the_same_single_file_alike(narrow_configs):
    """The converter in these tests is verified against diffusers' loader."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    root, files = narrow_configs
    for family in ("sd15", "sdxl"):
        original = tiny_base(family, full_structure=True)
        for kind, name, model in (
            (UNet2DConditionModel, "unet", original.unet),
            (AutoencoderKL, "vae", original.vae),
        ):
            loaded = kind.from_single_file(str(files[family]), config=str(root / family), subfolder=name)
            mine, theirs = model.state_dict(), loaded.state_dict()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def single(path, **shapes):
    """A file with the tensors that identify the original layout; ``shapes`` override or, if None, remove tensors."""
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": (4, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (2, 768),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (2, 2),
        "first_stage_model.decoder.conv_in.weight": (2, 2),
    }
    tensors |= {name: shape for name, shape in shapes.items()}
    save_file({name: torch.zeros(shape) for name, shape in tensors.items() if shape is not None}, path)
    return str(path)


K = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({K: (2, 1024)}, "is an SD2.x model"),
        ({K: (2, 1280)}, "is the SDXL refiner"),
        ({K: (2, 4096)}, "text states of width 4096 in cross-attention"),
        ({IN: (4, 9, 3, 3)}, "is an inpainting model"),
        ({IN: (4, 8, 3, 3)}, "InstructPix2Pix"),
        ({"edm_mean": (1,)}, "is an EDM model"),
        ({TEXT: None}, "has no text encoder"),
        ({"first_stage_model.decoder.conv_in.weight": None}, "has no VAE"),
        ({K: (2, 2048)}, "has no first text encoder"),
        ({"lora_unet_mid_block_x.lora_up.weight": (1,)}, "is a LoRA"),
        ({"model.diffusion_model.double_blocks.0.x": (1,)}, "is a Flux model"),
        ({"model.diffusion_model.joint_blocks.0.x": (1,)}, "is an SD3 model"),
        ({"control_model.x": (1,)}, "is a ControlNet"),
        ({IN: None, K: None}, "has no U-Net in the original layout"),
        ({}, r"\(unet\) lacks \d+ of 686 tensors"),
    ],
)
def test_a_single_file_of_another_kind_is_refused_by_name(shapes, message, tmp_path):
    with pytest.raises(ModelFileError, match=message):
        load_base(single(tmp_path / "x.safetensors", **shapes))


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_v_prediction_folder_says_so_and_its_schedule_ends_in_pure_noise(folder):
    schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    plain = load_base(str(folder))
    edit(folder / "scheduler/scheduler_config.json", **schedule)
    base = load_base(str(folder))
    assert (plain.prediction_type, base.prediction_type) == ("epsilon", "v_prediction")
    assert base.alphas_cumprod[-1] == 2.0**-24 < plain.alphas_cumprod[-1]
    assert base.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0].item())


@pytest.mark.parametrize(
    "shapes, metadata, schedule",
    [
        ({}, {}, {}),
        ({"v_pred": (0,)}, {}, {"prediction_type": "v_prediction"}),
        (
            {"v_pred": (0,), "ztsnr": (0,)},
            {},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        ({}, {"modelspec.prediction_type": "v"}, {"prediction_type": "v_prediction"}),
        ({}, {"modelspec.prediction_type": "epsilon"}, {}),
    ],
)
def test_a_single_file_says_what_it_predicts(shapes, metadata, schedule):
    assert detect.schedule_of_file(Header(shapes, metadata)) == schedule


@pytest.mark.parametrize(
    "file, values, message",
    [
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "is an inpainting model"),
        ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "is the SDXL refiner"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a Flux model"),
        ("model_index.json", {"_class_name": "Nonsense"}, "is a Nonsense"),
        ("unet/config.json", {"in_channels": 9}, "is an inpainting model"),
        ("unet/config.json", {"cross_attention_dim": 1024}, "is an SD2.x model"),
        ("unet/config.json", {"block_out_channels": [8, 32]}, "tensors with a different shape"),
        (
            "unet/config.json",
            {"down_block_types": ["NoSuchBlock"]},
            "configuration of unet is invalid",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "is a sample model"),
        ("text_encoder/config.json", {"vocab_size": 300}, "tensors with a different shape"),
        ("unet/config.json", {"in_channels": [4]}, r"unet/config.json: in_channels = \[4\] is not a whole"),
        ("unet/config.json", {"cross_attention_dim": [16, 16]}, r"cross_attention_dim = \[16, 16\]"),
        ("unet/config.json", {"sample_size": [8, 8]}, r"sample_size = \[8, 8\]"),
        ("unet/config.json", {"sample_size": None}, "sample_size = None"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ("scheduler/scheduler_config.json", {"beta_start": "0.1"}, "scheduler_config.json: beta_start = 0.1"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 1000}, r"trained_betas = \[0.1"),
    ],
)
def test_a_folder_of_another_kind_is_refused_by_name(file, values, message, folder):
    edit(folder / file, **values)
    with pytest.raises(ModelFileError, match=message):
        load_base(str(folder))


@pytest.mark.parametrize(
    "file, message",
    [
        ("model_index.json", "has no model_index.json"),
        ("unet/config.json", "is missing"),
        ("unet/diffusion_pytorch_model.safetensors", "has no weights"),
        ("scheduler/scheduler_config.json", "is missing"),
        ("tokenizer/tokenizer.json", "is not a CLIP tokenizer|has 2 tokens"),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(file, message, folder):
    (folder / file).unlink()
    with pytest.raises(ModelFileError, match=message):
        load_base(str(folder))


def test_text_of_a_file_cannot_act_on_the_terminal_or_fill_it(folder):
    edit(folder / "model_index.json", _class_name="\x1b[31m" + "x" * 100)
    with pytest.raises(ModelFileError) as caught:
        load_base(str(folder))
    assert "\x1b" not in caught.value.message + str(caught.value)
    error = ModelFileError("a\nb\x1b" + "x" * 10_000, "\u202e")
    assert error.message.startswith("a bxxx") and len(error.message) < 3000 and error.hint == ""


def test_missing_tensors_are_named_and_never_made_up(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["mid_block.attentions.0.proj_in.weight"]
    save_file(tensors, weights)
    with pytest.raises(
        ModelFileError, match=r"lacks 1 of \d+ tensors: mid_block.attentions.0.proj_in.weight"
    ):
        load_base(str(folder))


class Bomb:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x.CKPT"])
def test_a_pickle_is_refused_unopened(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ModelFileError, match=r"it was not opened – download the \.safetensors version"):
        load_base(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_under_a_safetensors_name_is_refused_and_not_run(protocol, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=protocol))
    with pytest.raises(ModelFileError):
        load_base(str(path))
    torch.save({"a": Bomb(tmp_path / "ran")}, path)
    with pytest.raises(ModelFileError, match="is a pickle file with the name of a safetensors file"):
        load_base(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_has_pickles_only_is_refused(folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(ModelFileError, match=r"only as a pickle \(.bin\)"):
        load_base(str(folder))
    assert not (tmp_path / "ran").exists()


def header_file(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is empty"),
        (b"abc", "is a text file"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated or not a safetensors file"),
        (struct.pack("<Q", 500) + b"{}", "truncated or not a safetensors file"),
        (struct.pack("<Q", 4) + b"nope", "is not JSON"),
        (struct.pack("<Q", 40_000) + b"[" * 40_000, "is not JSON"),
        (struct.pack("<Q", 2) + b"[]", "is not a table of tensors"),
    ],
)
def test_a_hostile_header_is_one_line(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        load_base(str(path))


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "ends 8 bytes too early"),
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}, "contradicts itself"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}, "contradicts itself"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "contradicts itself"),
        ({"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}, "is malformed"),
        ({"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]}, "is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', "is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}', "is malformed"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "is malformed"),
        ({"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}, "is malformed"),
        ("text", "is malformed"),
        (None, "is malformed"),
    ],
)
def test_a_header_that_lies_about_a_tensor_is_one_line(entry, message, tmp_path):
    with pytest.raises(ModelFileError, match=message):
        header = entry if isinstance(entry, bytes) else {"a": entry}
        read_header(header_file(tmp_path / "x.safetensors", header))


def test_tensors_that_overlap_are_refused(tmp_path):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = header_file(tmp_path / "x.safetensors", {"a": entry, "b": entry}, b"0000")
    read_header(path)
    with pytest.raises(ModelFileError, match="cannot be loaded"):
        load_tensors(path)


def test_a_device_is_not_a_model(tmp_path):
    with pytest.raises(ModelFileError, match="is not a file"):
        load_base("/dev/zero")


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 3 * 2**30))
        file.truncate(4 * 2**30)  # sparse
    start = time.monotonic()
    with pytest.raises(ModelFileError, match="its header does not fit"):
        read_header(path)
    assert time.monotonic() - start < 1


def test_a_download_that_was_cut_off_says_so(folder):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="ends 100 bytes too early: the download or copy is incomplete"):
        load_base(str(folder))


def test_shards_are_read_and_missing_ones_named(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / "unet" / file)
    weights.unlink()
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: file for file, part in halves.items() for name in part}})
    )
    assert_same_networks(load_base(str(folder)), tiny_base("sd15"))
    (folder / "unet" / "b.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"lists files that are missing: b\.safetensors"):
        load_base(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": "../../outside.safetensors"}}))
    with pytest.raises(ModelFileError, match="lists files that are missing"):
        load_base(str(folder))


def test_the_fp16_variant_is_taken_where_there_is_no_other(folder):
    for component in ("unet", "vae", "text_encoder"):
        for file in (folder / component).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert_same_networks(load_base(str(folder)), tiny_base("sd15"))


def test_older_names_in_folders_are_understood(folder):
    """Published SD1.5 folders name the VAE's attention query/key/value/proj_attn and wrap CLIP in text_model."""
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    for new, before in old.items():
        tensors = {name.replace(f".{new}.", f".{before}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, vae)
    text = folder / "text_encoder" / "model.safetensors"
    wrapped = {f"text_model.{name}": tensor for name, tensor in load_file(text).items()}
    wrapped["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(wrapped, text)
    assert_same_networks(load_base(str(folder)), tiny_base("sd15"))


def test_a_tokenizer_without_a_length_gets_the_encoders(folder):
    settings = folder / "tokenizer" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content.pop("model_max_length")
    settings.write_text(json.dumps(content))
    base = load_base(str(folder))
    assert base.tokenizers[0].model_max_length == 77
    assert base.token_ids(["a cat"], 0).shape == (1, 77)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sd-15", "there is no base 'sd-15' – did you mean sd15?"),
        ("mini-sd51", "did you mean mini-sd15?"),
        ("nonsense", "give mini-sd15, mini-sdxl, sd15, sdxl, a hub id"),
        ("a..b/c", "is not a valid hub id"),
        ("./missing", "there is no file or folder ./missing"),
        ("missing.safetensors", "there is no file or folder missing.safetensors"),
    ],
)
def test_a_name_that_is_nothing_gets_a_suggestion(spec, message):
    with pytest.raises(ModelFileError, match=message):
        load_base(spec)


@pytest.mark.parametrize("spec", ["sd15", "sdxl", "someone/model"])
def test_without_network_a_hub_model_fails_at_once_and_says_what_to_do(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ModelFileError, match="set HF_ENDPOINT to a mirror, or use --base mini-sd15"):
        load_base(spec)
    assert time.monotonic() - start < 3


def test_a_hub_that_does_not_answer_is_found_out_before_any_retry(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    start = time.monotonic()
    with pytest.raises(ModelFileError, match=r"http://127.0.0.1:9 does not answer"):
        load_base("sd15")
    assert time.monotonic() - start < 6


def test_a_cached_hub_model_loads_without_network(folders, tmp_path, monkeypatch):
    commit = "a" * 40
    repo = tmp_path / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folders["sd15"], repo / "snapshots" / commit)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_same_networks(load_base("someone/model"), tiny_base("sd15"))
    os.remove(repo / "snapshots" / commit / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelFileError, match="cannot be downloaded: HF_HUB_OFFLINE is set"):
        load_base("someone/model")


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "vae/config.json"])
def test_a_cached_copy_without_a_small_file_is_not_complete(file, folder):
    assert load_module._is_complete(folder)
    (folder / file).unlink()
    assert not load_module._is_complete(folder)


def test_an_index_of_fp16_shards_is_downloaded_with_them():
    names = [
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    plain = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    ]
    assert sorted(weight_files([*names, *plain])) == sorted(names)


def test_only_safetensors_and_configurations_are_downloaded_and_fp16_where_there_is():
    names = [
        "model_index.json",
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "safety_checker/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
    ]
    assert sorted(weight_files(names)) == sorted(
        [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "tokenizer/vocab.json",
            "tokenizer/merges.txt",
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/config.json",
            "text_encoder/model.fp16.safetensors",
        ]
    )
    with pytest.raises(ModelFileError, match=r"unet only as a pickle \(.bin\)"):
        weight_files(["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.bin"])


@pytest.mark.parametrize("factor", ["much", None, 0, True])
def test_a_factor_of_latents_that_is_no_number_is_one_line(factor, folder):
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "scaling_factor": factor}))
    with pytest.raises(ModelFileError, match=r"scaling_factor = .* is not a valid latent scale"):
        load_base(str(folder))


def test_an_error_that_says_nothing_is_named_by_its_kind():
    assert first_line(ValueError()) == "ValueError"
    assert first_line(RuntimeError(" \n second ")) == "second"
