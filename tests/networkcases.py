"""Networks in sd-scripts' own words, and the small problem that both sides run: what tests/bench/record_networks.py
records and tests/parity/trainer/kohya/test_recorded_networks.py compares.

The problem: every trained module gets an input and a gradient of its output of its own, the same in every step. So
what a module learns depends on its start, its scale, its rate and the optimizer, and on no other module.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 4
FAMILIES = ("sd15", "sdxl")
OPTIMIZERS = ("AdamW", "SGDNesterov")
MOMENTUM = 0.9
RATES = "learning_rate = 1e-2\nunet_lr = 1e-2\ntext_encoder_lr = 4e-3\n"
# Which ranks DyLoRA trains in each step, as the number of their block; the last block uses all ranks.
BLOCKS = (0, 1, 1, 0)
LYCORIS = "lycoris.kohya"


def network(module: str, *arguments: str, dim: int = 4, alpha: float = 2.0, more: str = RATES) -> str:
    given = f"network_args = {json.dumps(list(arguments))}\n" if arguments else ""
    return f'network_module = "{module}"\nnetwork_dim = {dim}\nnetwork_alpha = {alpha}\n{given}{more}'


def lycoris(algo: str, *arguments: str, **more: Any) -> str:
    return network(LYCORIS, f"algo={algo}", *arguments, **more)


CONV = ("conv_dim=3", "conv_alpha=1")
WITHOUT_DECAY = RATES + 'optimizer_args = ["weight_decay=0"]\n'
CASES: dict[str, str] = {
    "lora": network("networks.lora"),
    "lora alpha 0": network("networks.lora", alpha=0),
    "lora conv": network("networks.lora", *CONV),
    "lora conv alpha": network("networks.lora", "conv_dim=4"),
    "lora plus": network("networks.lora", *CONV, "loraplus_lr_ratio=16", "loraplus_text_encoder_lr_ratio=4"),
    "lora fa": network("networks.lora_fa"),
    "lora fa conv": network("networks.lora_fa", *CONV),
    "lora fa plus": network("networks.lora_fa", "loraplus_lr_ratio=16"),
    "dylora": network("networks.dylora", "unit=2"),
    "dylora conv": network("networks.dylora", "unit=2", "conv_dim=4", "conv_alpha=1"),
    "dylora plus": network("networks.dylora", "unit=2", "loraplus_lr_ratio=16"),
    "oft": network("networks.oft", alpha=0.01),
    "oft linear": network("networks.oft", "enable_all_linear=True", alpha=0.5),
    "oft conv": network("networks.oft", "enable_all_linear=True", "enable_conv=True", alpha=0.5),
    "loha": network("networks.loha"),
    "loha conv": network("networks.loha", *CONV),
    "loha tucker": network("networks.loha", *CONV, "use_tucker=True"),
    "lokr": network("networks.lokr", dim=2),
    "lokr factor": network("networks.lokr", *CONV, "factor=2", dim=2),
    "lokr tucker": network("networks.lokr", "conv_dim=1", "use_tucker=True", "factor=2", dim=2),
    "ly locon": lycoris("locon"),
    "ly locon attn-mlp": lycoris("locon", "preset=attn-mlp", *CONV),
    "ly locon conv": lycoris("lora", *CONV),
    "ly locon conv 0": lycoris("locon", "conv_dim=0", "conv_alpha=0"),
    "ly locon alpha 0": lycoris("locon", "conv_dim=3", "conv_alpha=0", alpha=0),
    "ly locon tucker": lycoris("locon", *CONV, "use_tucker=True"),
    "ly locon scalar": lycoris("locon", "use_scalar=True"),
    "ly locon rs": lycoris("locon", *CONV, "rs_lora=True"),
    "ly locon norms": lycoris("locon", "train_norm=True"),
    "ly locon plus": lycoris("locon", "loraplus_unet_lr_ratio=16"),
    "ly loha": lycoris("loha", *CONV),
    "ly loha tucker": lycoris("loha", *CONV, "use_cp=True"),
    "ly loha scalar": lycoris("loha", "use_scalar=True"),
    "ly lokr": lycoris("lokr", dim=2),
    "ly lokr factor": lycoris("lokr", *CONV, "factor=2", dim=2),
    "ly lokr full": lycoris("lokr", "full_matrix=True"),
    "ly lokr 10000": lycoris("lokr", "factor=4", dim=10000, alpha=1),
    "ly lokr both": lycoris("lokr", "decompose_both=True", dim=1),
    "ly lokr unbalanced": lycoris("lokr", "unbalanced_factorization=True", dim=1),
    "ly lokr tucker": lycoris("lokr", "use_tucker=True", "factor=2", dim=1),
    "ly lokr rs": lycoris("lokr", "rs_lora=True", "factor=2", dim=2),
    "ly full": lycoris("full", more=WITHOUT_DECAY),
    "ly ia3": lycoris("ia3", "preset=attn-mlp"),
    "ly diag-oft": lycoris("diag-oft"),
    "ly diag-oft rescaled": lycoris("diag-oft", "constraint=0.01", "rescaled=True"),
    "ly boft": lycoris("boft", dim=16),
    "ly glora": lycoris("glora", *CONV),
    "ly dylora": lycoris("dylora", "block_size=2"),
    "ly dylora plus": lycoris("dylora", "block_size=2", "loraplus_lr_ratio=16"),
    "ly dora": lycoris("locon", "dora_wd=True", "wd_on_output=False"),
    "ly unet-only": lycoris("loha", "preset=unet-only"),
    "ly attn-only": lycoris("lokr", "preset=attn-only", "factor=2"),
}
# name → why its figures after n steps are not equal on purpose (each has a test of its own)
DIFFERS = {
    "loha tucker": "gradients of w1_a and w2_a come from the other half there",
    "ly loha tucker": "gradients of w1_a and w2_a come from the other half there",
    "ly dora": "the norm is a constant of the gradient here",
    "ly dylora": "scaled by alpha / blocks there",
    "ly dylora plus": "scaled by alpha / blocks there",
}
# SGD shows every scale; AdamW, which hides it, shows weight decay, and is run for one case of each form.
WITH_ADAMW = (
    "lora", "lora plus", "lora fa", "dylora", "oft", "lokr", "ly locon scalar", "ly locon norms", "ly loha",
    "ly lokr 10000", "ly full", "ly ia3", "ly diag-oft rescaled", "ly boft", "ly glora", "ly dylora", "ly dylora plus",
)  # fmt: skip
LEARNED = [(name, how) for name in CASES for how in OPTIMIZERS if how != "AdamW" or name in WITH_ADAMW]
# rates per block, and those of text encoders: module sets and groups only, on the published sizes
RATE_CASES: dict[str, str] = {
    "blocks sd15": network(
        "networks.lora", "down_lr_weight=sine", "mid_lr_weight=0.5", "up_lr_weight=cosine+.25", *CONV
    ),
    "blocks sdxl": network(
        "networks.lora", "down_lr_weight=sine", "mid_lr_weight=0.5,0.1,2", "up_lr_weight=cosine+.25", *CONV
    ),
    "blocks threshold": network(
        "networks.lora", "down_lr_weight=linear", "up_lr_weight=reverse_linear", "block_lr_zero_threshold=0.3"
    ),
    "blocks plus sd15": network("networks.lora", "mid_lr_weight=0.25", "loraplus_unet_lr_ratio=8"),
    "blocks plus sdxl": network("networks.lora", "mid_lr_weight=0.25,0.5,1", "loraplus_unet_lr_ratio=8"),
    "dylora unet sdxl": network(
        "networks.dylora",
        "unit=2",
        "conv_dim=4",
        more="learning_rate = 1e-3\nnetwork_train_unet_only = true\n",
    ),
    "text encoder 0": network("networks.lora", more="learning_rate = 1e-3\ntext_encoder_lr = 0.0\n"),
    "unet 0": network("networks.lora", more="learning_rate = 1e-3\nunet_lr = 0.0\n"),
    "one rate": network("networks.lora", more="learning_rate = 1e-3\n"),
    "unet only": network("networks.lora", more="learning_rate = 1e-3\nnetwork_train_unet_only = true\n"),
    "text encoder only": network(
        "networks.lora", more="learning_rate = 1e-3\nnetwork_train_text_encoder_only = true\n"
    ),
    "lora fa one rate": network("networks.lora_fa", more="learning_rate = 1e-3\n"),
    "ly one rate": lycoris("locon", more="learning_rate = 1e-3\nunet_lr = 2e-3\n"),
}
EVERY_CASE = {**CASES, **RATE_CASES}


def noise(name: str, shape: Iterable[int]) -> Tensor:
    """Numbers from -1 to 1 that depend on a name, and need no generator."""
    shape = tuple(shape)
    phase = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(index * 12.9898 + 100 * phase) * 43758.5453).frac().float().reshape(shape)


def start(key: str, ending: str, value: Tensor) -> Tensor:
    """The first value of a tensor: what is zero or one stays so, the rest is of the size that it usually has."""
    if not value.any() or (ending in ("rescale", "dora_scale")):
        return value.clone()
    size = 0.3 if value.dim() else 1.0
    return noise(f"{key}.{ending}", value.shape) * size


def input_of(layer: nn.Module, name: str) -> Tensor:
    """An input of a layer."""
    match layer:
        case nn.Conv2d():
            return noise(name, (2, layer.in_channels, 5, 5))
        case nn.GroupNorm():
            return noise(name, (2, layer.num_channels, 4, 4))
        case nn.LayerNorm():
            return noise(name, (2, 3, *layer.normalized_shape))
        case nn.Linear():
            return noise(name, (2, 3, layer.in_features))
    raise AssertionError(type(layer))


def loss(key: str, output: Tensor) -> Tensor:
    """A loss whose gradient for the output is the same whatever the output is."""
    return (output * noise(f"{key} gradient", output.shape)).sum()


def figures(key: str, change: Tensor) -> list[float]:
    """A module's change of its output in two numbers: its norm, and its share in one direction."""
    change = change.detach().double()
    along = (change * noise(f"{key} direction", change.shape)).sum()
    return [float(f"{float(value):.6g}") for value in (change.norm(), along)]


def lines_of(modules: dict[str, tuple[float | None, dict[str, tuple[int, ...]]]]) -> list[str]:
    """One line for each module: name, alpha (None: the file has none), its trained tensors and their shapes."""
    return sorted(
        f"{key} {'none' if alpha is None else f'{alpha:.6g}'} {sorted((e, tuple(s)) for e, s in shapes.items())}"
        for key, (alpha, shapes) in modules.items()
    )


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# One layer: what a whole network does not show, as dropout with known draws, and gradients.
# name → (who, the layer's shape, its arguments)
SINGLE: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "dora": ("LoConModule", (20, 12), {"weight_decompose": True, "wd_on_out": False}),
    "dora conv": ("LoConModule", (8, 6, 3, 3), {"weight_decompose": True, "wd_on_out": False}),
    "dora rows": (
        "LoConModule",
        (20, 12),
        {"weight_decompose": True, "wd_on_out": False, "rank_dropout": 0.5},
    ),
    "dropout": ("LoConModule", (20, 12), {"dropout": 0.5}),
    "rows": ("LoConModule", (20, 12), {"rank_dropout": 0.5}),
    "rows conv": ("LoConModule", (8, 6, 3, 3), {"rank_dropout": 0.25}),
    "rows loha": ("LohaModule", (20, 12), {"rank_dropout": 0.5}),
    "rows lokr": ("LokrModule", (8, 6, 3, 3), {"rank_dropout": 0.5}),
    "rank": ("networks.lora", (20, 12), {"rank_dropout": 0.25}),
    "rank conv": ("networks.lora", (8, 6, 3, 3), {"rank_dropout": 0.25}),
    "native rows loha": ("networks.loha", (20, 12), {"rank_dropout": 0.25}),
    "native rows lokr": ("networks.lokr", (8, 6, 3, 3), {"rank_dropout": 0.25}),
    "lora fa": ("networks.lora_fa", (8, 6, 3, 3), {}),
    **{f"dylora {n}": ("networks.dylora", (20, 12), {"unit": 2, "block": n}) for n in (0, 1)},
    **{f"dylora conv {n}": ("networks.dylora", (8, 6, 3, 3), {"unit": 2, "block": n}) for n in (0, 1)},
    **{f"ly dylora {n}": ("DyLoraModule", (20, 12), {"block_size": 2, "block": n}) for n in (0, 1)},
}
RANK, ALPHA = 4, 2.0


def single_layer(shape: tuple[int, ...]) -> nn.Module:
    """A layer whose weight has this shape."""
    if len(shape) == 4:
        layer: nn.Module = nn.Conv2d(shape[1], shape[0], shape[2], stride=2, padding=1)
    else:
        layer = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(noise(name, parameter.shape))
    return layer


def filled(ending: str, value: Tensor) -> Tensor:
    """A tensor of a trained module; magnitudes are near their start."""
    drawn = noise(ending, value.shape)
    return value * (1 + 0.2 * drawn) if ending == "dora_scale" else drawn * 0.5


def drawn(*shape: int) -> Tensor:
    """What torch.rand gives while a module with dropout is recorded."""
    return noise("draws", shape).abs()
