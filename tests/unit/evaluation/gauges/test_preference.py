"""Tests of evaluation.gauges.preference: the real file layouts with tiny random weights."""

import copy
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from evaluation.encoders.vectors import Vectors
from evaluation.gauges.preference import load_preference
from evaluation.images.images import SampledImage
from evaluation.prompts.prompts import Prompt, PromptSet
from trainer.errors import MachineError, ModelFileError

PROMPTS = PromptSet((Prompt("zkw cat", "a cat", "altered"), Prompt("zkw dog", "a dog", "altered")), (0,))
RNG = np.random.default_rng(0)
IMAGES = [SampledImage(p.id, s, RNG.integers(0, 256, (40, 32, 3), dtype=np.uint8)) for p, s in PROMPTS.jobs]
VECTORS = Vectors([image.pixels_HW3 for image in IMAGES])
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


def test_hpsv21_is_the_cosine_of_its_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-H-14", TINY)
    torch.manual_seed(0)
    model = open_clip.CLIP(**copy.deepcopy(TINY)).eval()
    model.logit_scale.data.fill_(4.6)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": model.state_dict()}, file)
    gauge = load_preference(f"hpsv2.1:{file}")
    assert (gauge.measure, gauge.model) == ("hpsv2.1", file.name)
    transform = open_clip.image_transform(32, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in VECTORS.pixels])
    with torch.no_grad():
        left = model.encode_image(pixels, normalize=True)
        right = model.encode_text(open_clip.tokenize(["a cat", "a dog"]), normalize=True)
    np.testing.assert_allclose(gauge.values(VECTORS, IMAGES, PROMPTS), (left * right).sum(1), atol=1e-5)


def test_pickscore_is_the_cosine_of_a_transformers_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / "pick")
    gauge = load_preference(f"pickscore:{tmp_path / 'pick'}")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixels = torch.cat(
        [processor(Image.fromarray(image), return_tensors="pt").pixel_values for image in VECTORS.pixels]
    )
    with torch.no_grad():
        out = model(input_ids=open_clip.tokenize(["a cat", "a dog"]), pixel_values=pixels)
    theirs = (out.image_embeds * out.text_embeds).sum(1)
    np.testing.assert_allclose(gauge.values(VECTORS, IMAGES, PROMPTS), theirs, atol=2e-3)


def test_what_is_asked_for_and_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="package is not installed"):
        load_preference("imagereward")
    with pytest.raises(ModelFileError, match="does not exist"):
        load_preference(f"hpsv2.1:{tmp_path / 'absent.pt'}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelFileError, match=r"hpsv2\.1 is requested, but .* is not on this machine"):
        load_preference("hpsv2.1")
    with pytest.raises(ModelFileError, match="PickScore_v1 is not on this machine"):
        load_preference("pickscore")
