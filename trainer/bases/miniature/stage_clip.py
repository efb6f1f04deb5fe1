"""Stages text and clip: the text encoders of both bases, and mini-clip (an open_clip model).

Stage text trains one image tower (ModifiedResNet) and two text towers together; the text towers become the bases'
text encoders. Stage clip goes on from there with the image tower and the first text tower alone: that is mini-clip.

Contrastive training on groups of four: a scene and three neighbours that differ from it in one attribute
each. Small linear heads that name the attributes help the image tower to start; they are thrown away.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn

from trainer.bases.miniature import captions, stage_text, world
from trainer.bases.miniature.fitting import Plan, fit, load_weights, save_atomic
from trainer.bases.miniature.stage_vae import to_tensor

TEXT_PLAN = Plan("text", steps=1000, lr=1.5e-3, warmup_steps=100, weight_decay=0.05, beta2=0.98, ema=0.995)
CLIP_PLAN = Plan(
    "clip", steps=2600, lr=1e-3, warmup_steps=50, weight_decay=0.05, beta2=0.98, ema=0.998, muon_lr=0.006
)
GROUPS = 8000
GROUP = 4
BATCH_GROUPS = 32
IMAGE_PX = 64
VISION = {"image_size": IMAGE_PX, "layers": [1, 2, 2, 1], "width": 16, "patch_size": None}
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
LABELS: tuple[tuple[str, int], ...] = (
    ("kind", 3),
    ("background", 5),
    ("place", 5),
    ("size", 2),
    ("shape", 6),
    ("colour", 8),
    ("pattern", 3),
    ("relation", 4),
    ("shape_2", 6),
    ("colour_2", 8),
    ("body", 3),
    ("body_colour", 8),
    ("head", 2),
    ("head_colour", 8),
    ("hat", 3),
    ("hat_colour", 8),
)


def labels(scene: world.Scene) -> list[int]:
    """The scene's attributes as class numbers; -100 where one does not apply."""
    colours = list(world.COLOURS)
    out = dict.fromkeys((name for name, _ in LABELS), -100)
    out["kind"] = ("single", "pair", "figure").index(scene.kind)
    out["background"] = list(world.BACKGROUNDS).index(scene.background)
    if scene.kind != "pair":
        out["place"] = list(world.PLACES).index(scene.place)
        out["size"] = list(world.SIZES).index(scene.size)
    if scene.things:
        first = scene.things[0]
        out["shape"], out["colour"] = world.SHAPES.index(first.shape), colours.index(first.colour)
    if scene.kind == "single":
        out["pattern"] = world.PATTERNS.index(scene.things[0].pattern)
    if scene.kind == "pair":
        second = scene.things[1]
        out["relation"] = world.RELATIONS.index(scene.relation)
        out["shape_2"], out["colour_2"] = world.SHAPES.index(second.shape), colours.index(second.colour)
    if scene.figure is not None:
        f = scene.figure
        out["body"], out["body_colour"] = world.BODIES.index(f.body), colours.index(f.body_colour)
        out["head"], out["head_colour"] = world.HEADS.index(f.head), colours.index(f.head_colour)
        out["hat"] = world.HATS.index(f.hat)
        if f.hat != "none":
            out["hat_colour"] = colours.index(f.hat_colour)
    return [out[name] for name, _ in LABELS]


def text_cfg(vocab_size: int) -> dict[str, object]:
    return {
        "context_length": stage_text.CONTEXT,
        "vocab_size": vocab_size,
        "width": stage_text.WIDTH_1,
        "heads": stage_text.HEADS_1,
        "layers": stage_text.LAYERS_1,
    }


class Towers(nn.Module):
    """The image tower, both text towers and the attribute heads, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = stage_text.new_tokenizer()
        self.clip = CLIP(stage_text.EMBED, dict(VISION), text_cfg(len(self.tokenizer)))
        self.text_2 = stage_text.new_text_encoder_2(self.tokenizer)
        self.heads = nn.Linear(stage_text.EMBED, sum(n for _, n in LABELS))

    def encode_text_1(self, ids_BL: Tensor) -> Tensor:
        """open_clip's own text path for ids shorter than the context (causal, so padding changes nothing)."""
        clip, length = self.clip, ids_BL.shape[1]
        x_BLD = clip.token_embedding(ids_BL) + clip.positional_embedding[:length]
        x_BLD = clip.ln_final(clip.transformer(x_BLD, attn_mask=clip.attn_mask[:length, :length]))
        return stage_text.pooled(x_BLD, ids_BL) @ clip.text_projection

    def loss(self, x_B3HW: Tensor, ids_BL: Tensor, labels_BN: Tensor, *, second: bool) -> Tensor:
        image = self.clip.visual(x_B3HW)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        unit = F.normalize(image, dim=-1)
        target = torch.arange(len(image), device=image.device)
        total = image.new_zeros(())
        texts = [(self.encode_text_1(ids_BL), 1.0)]
        if second:
            texts.append((self.text_2(ids_BL).text_embeds, 0.5))
        for text, weight in texts:
            logits = scale * unit @ F.normalize(text, dim=-1).T
            total = total + weight * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        scores = self.heads(image).split([n for _, n in LABELS], dim=-1)
        named = [
            F.cross_entropy(s, labels_BN[:, i], ignore_index=-100, reduction="sum")
            for i, s in enumerate(scores)
        ]
        return total + torch.stack(named).sum() / (labels_BN >= 0).sum()


def pool() -> tuple[list[world.Scene], np.ndarray]:
    scenes: list[world.Scene] = []
    for group in range(GROUPS):
        rng = np.random.default_rng((group, 31))
        scene = world.sample_scene(40_000_000 + group, ("single", "figure", "pair", "figure")[group % 4])
        scenes += [scene, *(world.neighbours(scene, rng) for _ in range(GROUP - 1))]
        if scene.figure is not None:  # the smallest difference of this world: always in the group
            head = next(h for h in world.HEADS if h != scene.figure.head)
            scenes[-1] = replace(scene, figure=replace(scene.figure, head=head))
    return scenes, np.stack([world.render(s, IMAGE_PX) for s in scenes])


def train_towers(plan: Plan, towers: Towers, work: Path, device: str, *, second: bool) -> None:
    towers.to(device)
    towers.text_2.requires_grad_(second)
    towers.clip.visual.to(memory_format=torch.channels_last)
    scenes, images = pool()
    named = torch.tensor([labels(s) for s in scenes])

    def loss_of_step(step: int) -> Tensor:
        rng = np.random.default_rng((step, 31 if second else 32))
        groups = rng.choice(GROUPS, BATCH_GROUPS, replace=False)
        index = (groups[:, None] * GROUP + np.arange(GROUP)).reshape(-1)
        if step % 4 == 3:  # unrelated scenes: partial captions then seldom fit two pictures
            index = rng.choice(len(scenes), BATCH_GROUPS * GROUP, replace=False)
        said = [
            captions.caption(scenes[i], int(rng.integers(1 << 30)), complete=step % 4 != 3) for i in index
        ]
        ids_BL = stage_text.token_ids(towers.tokenizer, said, shortest=True).to(device)
        x = to_tensor(images[index]).to(device, memory_format=torch.channels_last)
        blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, blur, torch.rand(len(x), 1, 1, 1, device=device)) + 0.04 * torch.randn_like(x)
        return towers.loss(x, ids_BL, named[index].to(device), second=second)

    fit(plan, towers, loss_of_step, work)


def build_text(work: Path, device: str) -> None:
    torch.manual_seed(31)
    train_towers(TEXT_PLAN, Towers(), work, device, second=True)


def build_clip(work: Path, weights: Path, device: str) -> None:
    towers = load_towers(TEXT_PLAN, work)
    train_towers(CLIP_PLAN, towers, work, device, second=False)
    export_clip(towers.eval(), weights / "mini-clip")


def load_towers(plan: Plan, work: Path) -> Towers:
    towers = Towers()
    load_weights(plan.name, towers, work, averaged=True)
    return towers.eval()


def export_clip(towers: Towers, folder: Path) -> None:
    """open_clip's local-dir layout; some `hf_tokenizer_name` is needed for our tokenizer.json to be read."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": {
            "embed_dim": stage_text.EMBED,
            "vision_cfg": VISION,
            "text_cfg": {**text_cfg(len(towers.tokenizer)), "hf_tokenizer_name": "mini-clip"},
        },
        "preprocess_cfg": {
            "size": IMAGE_PX,
            "mode": "RGB",
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {k: v.half() if v.is_floating_point() else v for k, v in towers.clip.state_dict().items()}
    save_atomic(state, folder / "open_clip_model.safetensors", {"format": "pt"})
    towers.tokenizer.save_pretrained(folder)
