"""Optimizers and schedules in sd-scripts' own words, and the small problem that both sides run: what
tests/bench/record_optimizers.py records and tests/parity/trainer/kohya/test_rates.py compares."""

from __future__ import annotations

from typing import Any

import torch

STEPS = 24
RECORDED_STEPS = (1, 2, 12, 24)
GROUPS = ("text_encoder", "unet")  # in sd-scripts' order
RATES = "learning_rate = 1e-3\nunet_lr = 1e-3\ntext_encoder_lr = 5e-4\n"
ONE = "learning_rate = 1.0\nunet_lr = 1.0\ntext_encoder_lr = 1.0\n"
TWO = "learning_rate = 1.0\nunet_lr = 1.0\ntext_encoder_lr = 0.5\n"
WARM = 'lr_scheduler = "cosine"\nlr_warmup_steps = 4\n'


def optimizer(name: str, arguments: str = "", rates: str = RATES, more: str = "") -> str:
    return f'optimizer_type = "{name}"\noptimizer_args = [{arguments}]\n{rates}{more}'


def schedule(name: str, more: str = "", kind: str = "lr_scheduler") -> str:
    return f'optimizer_type = "AdamW"\n{RATES}{kind} = "{name}"\n{more}'


OPTIMIZER_CASES: dict[str, str] = {
    "AdamW": optimizer("AdamW"),
    "AdamW betas": optimizer("AdamW", '"betas=0.9,0.99", "eps=1e-6", "weight_decay=0.1"'),
    "AdamW amsgrad": optimizer("torch.optim.AdamW", '"amsgrad=True"'),
    "AdamW8bit": optimizer("AdamW8bit", '"betas=(0.8, 0.95)"'),
    "PagedAdamW": optimizer("PagedAdamW", '"betas=(0.9, 0.99)"'),
    "PagedAdamW8bit": optimizer("PagedAdamW8bit"),
    "PagedAdamW32bit": optimizer("PagedAdamW32bit", '"weight_decay=0.05"'),
    "Lion": optimizer("Lion", '"weight_decay=0.1"'),
    "Lion betas": optimizer("lion_pytorch.Lion", '"betas=(0.95, 0.98)"'),
    "Lion decoupled": optimizer("Lion", '"weight_decay=0.1", "decoupled_weight_decay=True"'),
    "Lion8bit": optimizer("Lion8bit", '"betas=[0.95, 0.98]"'),
    "PagedLion8bit": optimizer("PagedLion8bit"),
    "AdEMAMix8bit": optimizer("bitsandbytes.optim.AdEMAMix8bit", '"alpha=4.0"'),
    "SGDNesterov": optimizer("SGDNesterov", '"weight_decay=0.01"'),
    "SGDNesterov8bit": optimizer("SGDNesterov8bit", '"momentum=0.8"'),
    "Adam": optimizer("Adam", '"weight_decay=0.01"'),
    "NAdam": optimizer("torch.optim.NAdam"),
    "Prodigy": optimizer("Prodigy", rates=ONE),
    "Prodigy arguments": optimizer(
        "Prodigy",
        '"d_coef=2.0", "d0=1e-5", "beta3=0.98", "use_bias_correction=True", "safeguard_warmup=True", '
        '"betas=(0.9, 0.99)", "weight_decay=0.01", "growth_rate=1.02", "slice_p=3"',
        ONE,
    ),
    "Prodigy coupled": optimizer("Prodigy", '"decouple=False", "weight_decay=0.01"', ONE),
    "Prodigy warm-up": optimizer("Prodigy", "", ONE, WARM),
    "DAdaptation": optimizer("DAdaptation", '"decouple=True", "weight_decay=0.01", "growth_rate=1.2"', ONE),
    "DAdaptAdam": optimizer("DAdaptAdam", '"decouple=True", "weight_decay=0.01"', ONE),
    "DAdaptAdam arguments": optimizer(
        "DAdaptAdam", '"betas=(0.9, 0.99)", "use_bias_correction=True", "d0=1e-5"', ONE
    ),
    "DAdaptAdaGrad": optimizer("DAdaptAdaGrad", rates=ONE),
    "DAdaptAdan": optimizer("DAdaptAdan", rates=ONE),
    "DAdaptAdan two rates": optimizer(
        "DAdaptAdan", rates=ONE.replace("text_encoder_lr = 1.0", "text_encoder_lr = 0.5")
    ),
    "DAdaptAdanIP": optimizer("DAdaptAdanIP", rates=ONE),
    "DAdaptLion": optimizer("DAdaptLion", rates=ONE),
    "DAdaptSGD": optimizer("DAdaptSGD", rates=ONE),
    "CAME": optimizer("came_pytorch.CAME", '"weight_decay=0.01"'),
    "RAdamScheduleFree": optimizer("RAdamScheduleFree"),
    "AdamWScheduleFree": optimizer("AdamWScheduleFree", '"weight_decay=0.01", "warmup_steps=5"'),
    "AdamWScheduleFree schedule": optimizer(
        "schedulefree.AdamWScheduleFree",
        '"betas=(0.95, 0.99)"',
        RATES,
        'lr_scheduler = "cosine"\nlr_warmup_steps = 4\n',
    ),
    "SGDScheduleFree": optimizer("SGDScheduleFree", '"momentum=0.8"'),
    "Adafactor": optimizer("Adafactor"),
    "Adafactor warm-up": optimizer("Adafactor", '"warmup_init=True", "scale_parameter=True"'),
    "Adafactor plain": optimizer("Adafactor", '"relative_step=False"', RATES, 'lr_scheduler = "cosine"\n'),
    "Adafactor recommended": optimizer(
        "adafactor",
        '"scale_parameter=False", "relative_step=False", "warmup_init=False"',
        RATES,
        'lr_scheduler = "constant_with_warmup"\nlr_warmup_steps = 5\n',
    ),
    "Adafactor moment": optimizer(
        "transformers.Adafactor", '"relative_step=False", "beta1=0.9", "weight_decay=0.01"'
    ),
}
SCHEDULE_CASES: dict[str, str] = {
    "constant_with_warmup": schedule("constant_with_warmup", "lr_warmup_steps = 0.25\n"),
    "linear": schedule("linear", "lr_warmup_steps = 3\n"),
    "cosine": schedule("cosine", "lr_warmup_steps = 3\n"),
    "cosine waves": schedule("cosine", 'lr_scheduler_args = ["num_cycles=1.5"]\n'),
    "cosine_with_restarts": schedule(
        "cosine_with_restarts", "lr_scheduler_num_cycles = 3\nlr_warmup_steps = 2\n"
    ),
    "polynomial": schedule("polynomial", "lr_scheduler_power = 2.0\nlr_warmup_steps = 2\n"),
    "polynomial two rates": schedule("polynomial").replace("learning_rate = 1e-3", "learning_rate = 2e-6"),
    "polynomial end": schedule("polynomial", 'lr_scheduler_args = ["lr_end=1e-4"]\n'),
    "cosine_with_min_lr": schedule(
        "cosine_with_min_lr", "lr_scheduler_min_lr_ratio = 0.1\nlr_warmup_steps = 3\n"
    ),
    "cosine_with_min_lr rate": schedule(
        "cosine_with_min_lr", 'lr_scheduler_args = ["min_lr=1e-5"]\nlr_scheduler_num_cycles = 3\n'
    ),
    "warmup_stable_decay": schedule("warmup_stable_decay", "lr_warmup_steps = 4\nlr_decay_steps = 8\n"),
    "warmup_stable_decay ratio": schedule(
        "warmup_stable_decay",
        "lr_warmup_steps = 0.2\nlr_decay_steps = 0.4\nlr_scheduler_min_lr_ratio = 0.1\n"
        "lr_scheduler_args = [\"decay_type='linear'\", \"warmup_type='cosine'\"]\n",
    ),
    "warmup_stable_decay 1-sqrt": schedule(
        "warmup_stable_decay",
        "lr_warmup_steps = 6\nlr_decay_steps = 20\n"
        "lr_scheduler_args = [\"decay_type='1-sqrt'\", \"warmup_type='1-sqrt'\"]\n",
    ),
    "warmup_stable_decay cycles": schedule(
        "warmup_stable_decay", "lr_decay_steps = 12\nlr_scheduler_num_cycles = 3\n"
    ),
    "inverse_sqrt": schedule("inverse_sqrt", "lr_warmup_steps = 3\n"),
    "inverse_sqrt timescale": schedule("inverse_sqrt", "lr_warmup_steps = 3\nlr_scheduler_timescale = 8\n"),
    "inverse_sqrt plain": schedule("inverse_sqrt"),
    "piecewise_constant": schedule(
        "piecewise_constant", "lr_scheduler_args = [\"step_rules='1:5,0.1:15,0.01'\"]\n"
    ),
    "CosineAnnealingLR": schedule(
        "CosineAnnealingLR", 'lr_scheduler_args = ["T_max=9", "eta_min=1e-5"]\n', "lr_scheduler_type"
    ),
    "CosineAnnealingWarmRestarts": schedule(
        "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts",
        'lr_scheduler_args = ["T_0=5", "T_mult=2", "eta_min=1e-5"]\n',
        "lr_scheduler_type",
    ),
    "StepLR": schedule("StepLR", 'lr_scheduler_args = ["step_size=7", "gamma=0.5"]\n', "lr_scheduler_type"),
    "MultiStepLR": schedule(
        "MultiStepLR", 'lr_scheduler_args = ["milestones=[4, 9, 9]"]\n', "lr_scheduler_type"
    ),
    "ExponentialLR": schedule("ExponentialLR", 'lr_scheduler_args = ["gamma=0.9"]\n', "lr_scheduler_type"),
    "LinearLR": schedule("LinearLR", 'lr_scheduler_args = ["total_iters=10"]\n', "lr_scheduler_type"),
    "ConstantLR": schedule("ConstantLR", 'lr_scheduler_args = ["factor=0.2"]\n', "lr_scheduler_type"),
    "PolynomialLR": schedule(
        "PolynomialLR", 'lr_scheduler_args = ["total_iters=20", "power=2.0"]\n', "lr_scheduler_type"
    ),
    "Rex": schedule(
        "LoraEasyCustomOptimizer.RexAnnealingWarmRestarts.RexAnnealingWarmRestarts",
        'lr_scheduler_args = ["min_lr=1e-06", "gamma=0.9", "d=0.9", "warmup_steps=2", "first_cycle_max_steps=7", '
        '"cycle_multiplier=1.5"]\n',
        "lr_scheduler_type",
    ),
    "Rex low": schedule(
        "LoraEasyCustomOptimizer.RexAnnealingWarmRestarts.RexAnnealingWarmRestarts",
        'lr_scheduler_args = ["min_lr=8e-4", "gamma=0.9", "first_cycle_max_steps=6"]\n',
        "lr_scheduler_type",
    ),
    "LoraEasy cosine": schedule(
        "LoraEasyCustomOptimizer.CosineAnnealingWarmRestarts.CosineAnnealingWarmRestarts",
        'lr_scheduler_args = ["min_lr=1e-06", "gamma=0.8", "warmup_steps=2", "first_cycle_max_steps=9"]\n',
        "lr_scheduler_type",
    ),
}
CASES = {**OPTIMIZER_CASES, **SCHEDULE_CASES}
# name → (loraplus_lr_ratio, its U-Net's, its text encoders'), (text_encoder_lr, unet_lr, learning_rate)
LORAPLUS_CASES: dict[str, tuple[tuple[Any, Any, Any], tuple[Any, Any, Any]]] = {
    "none": ((None, None, None), (5e-5, 1e-4, 1e-4)),
    "both": ((16.0, None, None), (5e-5, 1e-4, 1e-4)),
    "unet": ((None, 8.0, None), (5e-5, 1e-4, 1e-4)),
    "text encoder": ((None, None, 4.0), (5e-5, 1e-4, 1e-4)),
    "three": ((16.0, 8.0, 4.0), (None, None, 2e-4)),
    "zero": ((0.0, 8.0, 0.0), (5e-5, 1e-4, 1e-4)),
    "no text encoder": ((16.0, None, None), (0.0, 1e-4, 1e-4)),
}


def weights() -> dict[str, list[torch.nn.Parameter]]:
    """The trained weights of each group: one that 8-bit optimizers quantize, one that they do not, one at zero."""
    found = {}
    for number, name in enumerate(GROUPS):
        count = torch.arange(80 * 64, dtype=torch.float64) + 1000 * number
        large = torch.sin(count).reshape(80, 64).float()
        small = torch.cos(count[:48]).reshape(6, 8).float()
        found[name] = [torch.nn.Parameter(w) for w in (large, small, torch.zeros(8, 4))]
    return found


def gradient(index: int, weight: torch.nn.Parameter) -> torch.Tensor:
    """The same gradient in every step: of many sizes, positive and negative."""
    count = torch.arange(weight.numel(), dtype=torch.float64) + 77 * index
    return (torch.sin(1.7 * count) * torch.exp(2 * torch.cos(0.3 * count)) / 10).float().reshape(weight.shape)


def figures(weight: torch.Tensor) -> list[float]:
    """A weight in few numbers: its norm, its sum, and four of its values."""
    flat = weight.flatten().double()
    picked = [float(flat[place]) for place in (0, 1, flat.numel() // 2, flat.numel() - 1)]
    return [float(flat.norm()), float(flat.sum()), *picked]


def layers(prefix: str, count: int) -> list[Any]:
    """Modules as sd-scripts' LoRA modules are, as far as parameter groups are concerned."""
    found = []
    for number in range(count):
        layer = torch.nn.Module()
        layer.lora_down = torch.nn.Linear(4, 2, bias=False)
        layer.lora_up = torch.nn.Linear(2, 4, bias=False)
        layer.lora_name = f"{prefix}_{number}"  # type: ignore[assignment]
        found.append(layer)
    return found
