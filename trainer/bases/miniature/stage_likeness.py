"""Stage likeness: mini-likeness, a tiny Dinov2Model whose CLS embedding tells individuals apart.

Supervised contrastive learning (arXiv 2004.11362) on random creatures in random colours and shapes that no
caption can name: pictures of the same creature at other places and sizes and on other grounds belong together.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from trainer.bases.miniature import wild
from trainer.bases.miniature.fitting import Plan, fit, load_weights
from trainer.bases.miniature.stage_vae import to_tensor

PLAN = Plan("likeness", steps=1200, lr=1e-3, warmup_steps=100, weight_decay=0.02, ema=0.995, muon_lr=0.01)
IMAGE_PX = 64
WIDTH = 96
CREATURES = 32  # a step
VIEWS = 3
TEMPERATURE = 0.1
TWINS = 0.5  # share of creatures that come with a near twin: one part in another colour


def new_likeness() -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(
            image_size=IMAGE_PX,
            patch_size=8,
            hidden_size=WIDTH,
            num_hidden_layers=5,
            num_attention_heads=4,
            mlp_ratio=4,
            layerscale_value=1.0,
        )
    )


class Likeness(nn.Module):
    """The encoder and the projection that the contrastive loss works on (thrown away afterwards)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = new_likeness()
        self.heads = nn.Linear(WIDTH, 64)

    def forward(self, x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        cls = self.encoder(x_B3HW).last_hidden_state[:, 0]
        return F.normalize(cls, dim=-1), F.normalize(self.heads(cls), dim=-1)


def creatures(rng: np.random.Generator, count: int) -> list[wild.Creature]:
    found: list[wild.Creature] = []
    while len(found) < count:
        found.append(wild.sample_creature(rng))
        if rng.random() < TWINS:
            found.append(wild.twin(found[-1], rng))
    return found[:count]


def views(rng: np.random.Generator, count: int, each: int) -> np.ndarray:
    """(count × each, H, W, 3): the pictures of one creature follow one another."""
    return np.stack(
        [wild.render_creature(c, rng, IMAGE_PX)[0] for c in creatures(rng, count) for _ in range(each)]
    )


def contrastive_loss(unit_ND: Tensor, who_N: Tensor) -> Tensor:
    logits = unit_ND @ unit_ND.T / TEMPERATURE
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(itself, -1e9)
    same = (who_N[:, None] == who_N) & ~itself
    log_p = logits - logits.logsumexp(1, keepdim=True)
    return -(log_p * same).sum(1).div(same.sum(1)).mean()


def build_likeness(work: Path, weights: Path, device: str) -> None:
    torch.manual_seed(71)
    model = Likeness().to(device)
    who = torch.arange(CREATURES * VIEWS, device=device) // VIEWS

    def loss_of_step(step: int) -> Tensor:
        rng = np.random.default_rng((step, 71))
        x = to_tensor(views(rng, CREATURES, VIEWS)).to(device)
        blur = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, blur, torch.rand(len(x), 1, 1, 1, device=device)) + 0.04 * torch.randn_like(x)
        cls, projected = model(x)
        return contrastive_loss(projected, who) + 0.5 * contrastive_loss(cls, who)

    fit(PLAN, model, loss_of_step, work)
    model = Likeness()
    load_weights(PLAN.name, model, work, averaged=True)
    folder = weights / "mini-likeness"
    model.encoder.half().save_pretrained(folder, safe_serialization=True)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_PX},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_PX, "width": IMAGE_PX},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
