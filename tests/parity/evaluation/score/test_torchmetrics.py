"""Our CLIP-T against torchmetrics' CLIPScore with the same weights: 100 × the mean cosine, and the known differences.

A small random transformers CLIP, and the same weights in open_clip's layout, loaded by our loader.
torchmetrics accepts other models than those in its list through a function.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from evaluation.encoders.embed import CLIP_MEAN, CLIP_STD, OpenClipScorer, load_scorer
from trainer.bases.clipbpe import clip_tokenizer
from trainer.errors import ConfigError

SIDE_PX, WIDTH, LAYERS, HEAD, TEXT_WIDTH, EMBED = 32, 64, 2, 16, 32, 24
TEXTS = ["a photo of a cat", "a red house on a hill, at night", "it's 10% off!", "a girl"]
# transformers' name of a layer's part → open_clip's
PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
SINGLE = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}


class PooledClip(CLIPModel):
    """transformers 5 returns an object where torchmetrics 1.9 expects the vectors themselves."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_text_features(*args, **kwargs).pooler_output


def open_clip_weights(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under open_clip's names: q, k, v in one matrix, projections transposed."""
    ours = {name: theirs[key] for key, name in SINGLE.items()}
    ours["text_projection"] = theirs["text_projection.weight"].T
    ours["visual.proj"] = theirs["visual_projection.weight"].T
    for tower, prefix in (("text_model", "transformer"), ("vision_model", "visual.transformer")):
        for layer in range(LAYERS):
            old, new = f"{tower}.encoder.layers.{layer}", f"{prefix}.resblocks.{layer}"
            for kind in ("weight", "bias"):
                parts = [theirs[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                ours[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
                ours |= {f"{new}.{b}.{kind}": theirs[f"{old}.{a}.{kind}"] for a, b in PARTS.items()}
    return {name: tensor.clone().contiguous() for name, tensor in ours.items()}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[OpenClipScorer, Callable[[], tuple[Any, Any]]]:
    """Our scorer, and the function that torchmetrics takes: (model, processor) of the same weights."""
    tokenizer = clip_tokenizer()
    layers = {"num_hidden_layers": LAYERS, "hidden_act": "quick_gelu"}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "eos_token_id": tokenizer.eos_token_id,
        **layers,
    }
    vision = {
        "image_size": SIDE_PX,
        "patch_size": 8,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": WIDTH // HEAD,
        **layers,
    }
    torch.manual_seed(0)
    model = PooledClip(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # larger than at initialisation, so that texts matter
            weight.add_(torch.randn(weight.shape) * 0.05)
        model.logit_scale.fill_(4.6)
        ids = tokenizer(TEXTS, return_tensors="pt", padding=True)["input_ids"]
        mean = model.text_model(input_ids=ids).pooler_output.mean(0)
        turn = model.text_projection.weight  # without what the texts share, every image is like some
        turn.sub_(torch.outer(turn @ mean, mean) / mean.dot(mean))  # and unlike others
    pictures = CLIPImageProcessor(
        size={"shortest_edge": SIDE_PX},
        crop_size={"height": SIDE_PX, "width": SIDE_PX},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    folder = tmp_path_factory.mktemp("scorer")
    save_file(open_clip_weights(model.state_dict()), folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": {
            "embed_dim": EMBED,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": SIDE_PX, "patch_size": 8, "layers": LAYERS, "width": WIDTH, "head_width": HEAD,
            },
            "text_cfg": {
                "context_length": 77, "vocab_size": len(tokenizer), "width": TEXT_WIDTH, "heads": 2,
                "layers": LAYERS,
            },
        },
        "preprocess_cfg": {"size": SIDE_PX, "mean": list(CLIP_MEAN), "std": list(CLIP_STD)},
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return load_scorer(str(folder)), lambda: (model, CLIPProcessor(pictures, tokenizer))


def pictures(count: int, side_px: int = SIDE_PX) -> list[np.ndarray]:
    """Smooth images: each channel rises from one corner to another."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:side_px, 0:side_px] / (side_px - 1)
    corners = rng.uniform(0, 1, (count, 2, 3))
    made = [(x[..., None] * a + y[..., None] * b) * 127 for a, b in corners]
    return [image.round().astype(np.uint8) for image in made]


def tensors(images: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(image).permute(2, 0, 1) for image in images]


def cosines(scorer: OpenClipScorer, images: list[np.ndarray], texts: list[str]) -> Tensor:
    return scorer.image_features(images) @ scorer.text_features(texts).T


def test_clip_score_is_100_times_our_mean_cosine(both: Any) -> None:
    """C8 · weight 5 · The CLIP score is computed wrongly → It equals that of torchmetrics for the same images
    and texts.
    """
    scorer, model = both
    images = pictures(4)
    own_NP = cosines(scorer, images, TEXTS)
    assert own_NP.max(dim=1).values.min() > 0.01, "texts that make no difference would prove nothing"
    for n in range(4):
        best = int(own_NP[n].argmax())
        theirs = clip_score(tensors(images)[n], TEXTS[best], model)
        assert float(theirs) == pytest.approx(100 * float(own_NP[n, best]), abs=0.005)
    chosen = [TEXTS[int(row.argmax())] for row in own_NP]
    metric = CLIPScore(model_name_or_path=model)
    metric.update(tensors(images[:3]), chosen[:3])
    metric.update(tensors(images[3:]), chosen[3:])
    assert float(metric.compute()) == pytest.approx(100 * float(own_NP.max(dim=1).values.mean()), abs=0.005)


def test_torchmetrics_cuts_at_0_after_the_mean_and_we_never_cut(both: Any) -> None:
    scorer, model = both
    images = pictures(8)
    own_NP = cosines(scorer, images, TEXTS)
    (low_n, low_p), (high_n, high_p) = (
        divmod(int(k), len(TEXTS)) for k in (own_NP.argmin(), own_NP.argmax())
    )
    low, high = float(own_NP[low_n, low_p]), float(own_NP[high_n, high_p])
    assert low < 0 < high
    assert float(clip_score(tensors(images)[low_n], TEXTS[low_p], model)) == 0
    found = clip_score(
        [tensors(images)[n] for n in (low_n, high_n)], [TEXTS[p] for p in (low_p, high_p)], model
    )
    assert float(found) == pytest.approx(max(100 * (low + high) / 2, 0), abs=0.005)


@pytest.mark.filterwarnings("ignore:Encountered caption longer", "ignore:Converting a tensor")
@torch.no_grad()
def test_a_text_that_is_too_long_loses_its_end_token_there_and_is_refused_here(both: Any) -> None:
    scorer, model = both
    cat, dog = "cat " * 80, "a dog " * 80
    picture = tensors(pictures(1))[0]
    vectors = [model()[0].get_text_features(_cut(model, text)) for text in (cat, dog)]
    assert torch.equal(*vectors), "without its end token a text is read at its first token, alike for all"
    assert float(clip_score(picture, cat, model)) == float(clip_score(picture, dog, model))
    with pytest.raises(ConfigError, match="would truncate the text"):
        scorer.text_features([cat])


def _cut(model: Any, text: str) -> Tensor:
    return model()[1](text=text, return_tensors="pt")["input_ids"][:, :77]


def test_smooth_pictures_of_another_size_agree_too(both: Any) -> None:
    """torchmetrics resizes with torchvision's bicubic, we with Pillow's."""
    scorer, model = both
    images = pictures(4, side_px=80)
    own_NP = cosines(scorer, images, TEXTS)
    n, p = divmod(int(own_NP.argmax()), len(TEXTS))
    theirs = float(clip_score(tensors(images)[n], TEXTS[p], model))
    print(f"resized: torchmetrics {theirs:.4f}, ours {100 * float(own_NP[n, p]):.4f}")
    assert theirs == pytest.approx(100 * float(own_NP[n, p]), abs=0.01)
