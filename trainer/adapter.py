"""Adapter: a LoRA injected into a base, its weights, and its removal without a trace.

Owns which modules get which rank, the initial values, dropout, rounding and removal; PEFT does the maths of
the forward pass.  Weights are fp32 whatever the base's type.  Does not own files (``lorafile``) or rates
(``optim``).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from trainer.bases.base import Base
from trainer.config import TrainConfig
from trainer.errors import ConfigError, Diverged

NAME = "lora"  # PEFT's name of the adapter inside each layer
SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """One module that gets a LoRA.  ``key`` is its name in kohya's files."""

    component: str
    path: str
    key: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class Layer:
    """One injected LoRA: ΔW = up · down · alpha / rank."""

    target: Target
    down: nn.Module
    up: nn.Module


def targets_of(base: Base, config: TrainConfig) -> list[Target]:
    """The modules that sd-scripts' ``networks.lora`` would train with these settings, in module order."""
    wanted = {component for component in base.components() if _is_trained(component, config)}
    targets = [
        Target(component, path, key, config.network_dim, config.network_alpha)
        for component, names in base.lora_names().items()
        if component in wanted
        for path, key in names.items()
    ]
    if config.conv_dim is None or "unet" not in wanted:
        return targets
    conv_alpha = config.network_alpha if config.conv_alpha is None else config.conv_alpha
    for path, key in base.conv_names()["unet"].items():
        wide = _kernel(base.unet.get_submodule(path)) > 1
        rank, alpha = (config.conv_dim, conv_alpha) if wide else (config.network_dim, config.network_alpha)
        targets.append(Target("unet", path, key, rank, alpha))
    return targets


def inject(base: Base, config: TrainConfig) -> Adapter:
    """A fresh LoRA: down kaiming-uniform (a = √5), up zero, so the base's output is unchanged at first.

    Every module draws from its own generator, keyed by (seed, key): nothing else that was drawn before
    matters.
    """
    targets = targets_of(base, config)
    if not targets:
        raise ConfigError("nothing is trained: every rate is 0", "set unet_lr or text_encoder_lr above 0")
    weights: dict[str, Tensor] = {}
    for target in targets:
        layer = base.components()[target.component].get_submodule(target.path)
        down_shape, up_shape = _shapes(layer, target.rank)
        down = torch.empty(down_shape)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=keyed_generator(config.seed, target.key))
        weights[f"{target.key}.lora_down.weight"] = down
        weights[f"{target.key}.lora_up.weight"] = torch.zeros(up_shape)
    return Adapter(base, targets, weights, dropout=config.network_dropout)


class Adapter:
    """The LoRA that is in a base now.  ``remove`` takes it out; the base is then bitwise what it was."""

    def __init__(
        self, base: Base, targets: Iterable[Target], weights: Mapping[str, Tensor], *, dropout: float = 0.0
    ) -> None:
        self.base = base
        self.layers: list[Layer] = []
        self._dropout = dropout
        self._dropout_key: tuple[int, ...] | None = None
        by_component: dict[str, list[Target]] = {}
        for target in targets:
            by_component.setdefault(target.component, []).append(target)
        try:
            for component, chosen in by_component.items():
                self.layers += _inject_component(base.components()[component], chosen, weights)
        except BaseException:
            self.remove()
            raise
        if dropout > 0:
            for number, layer in enumerate(self.layers):
                layer.down.register_forward_hook(self._dropout_hook(number))

    def parameters_by_component(self) -> dict[str, list[nn.Parameter]]:
        """component → its trainable weights, down and up in turn."""
        parameters: dict[str, list[nn.Parameter]] = {}
        for layer in self.layers:
            weights = parameters.setdefault(layer.target.component, [])
            weights += [_weight(layer.down), _weight(layer.up)]
        return parameters

    def trainable(self) -> list[nn.Parameter]:
        """All trainable weights, in module order."""
        return [parameter for group in self.parameters_by_component().values() for parameter in group]

    def state(self) -> dict[str, Tensor]:
        """kohya key → tensor, fp32 copies on CPU: ``….lora_down.weight``, ``….lora_up.weight``,
        ``….alpha``."""
        state: dict[str, Tensor] = {}
        for layer in self.layers:
            key = layer.target.key
            state[f"{key}.lora_down.weight"] = (
                _weight(layer.down).detach().to("cpu", torch.float32, copy=True)
            )
            state[f"{key}.lora_up.weight"] = _weight(layer.up).detach().to("cpu", torch.float32, copy=True)
            state[f"{key}.alpha"] = torch.tensor(float(layer.target.alpha))
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave.  The keys must be the same."""
        assert state.keys() == {k for layer in self.layers for k in _keys(layer.target)}
        with torch.no_grad():
            for layer in self.layers:
                _weight(layer.down).copy_(state[f"{layer.target.key}.lora_down.weight"])
                _weight(layer.up).copy_(state[f"{layer.target.key}.lora_up.weight"])

    def fingerprint(self) -> str:
        """sha256 over keys, shapes and values of ``state``."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.state().items()):
            digest.update(f"{key}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def round_to(self, save_precision: str) -> None:
        """Round every weight to the number type of the saved file, in place: what is scored is what ships."""
        for layer in self.layers:
            for weight in (_weight(layer.down), _weight(layer.up)):
                weight.copy_(weight.to(SAVE_DTYPES[save_precision]).float())
                if not bool(weight.isfinite().all()):
                    raise Diverged(
                        f"the weights of {layer.target.key} are not finite as {save_precision}",
                        "lower learning_rate, or save as float",
                    )

    def apply_dropout(self, *key: int) -> None:
        """From now on drop rank channels, drawn from this key (seed, step, micro-batch).  No key: no
        dropout."""
        self._dropout_key = key or None

    def remove(self) -> None:
        """Take the LoRA out of the base: the same layer objects return, nothing of PEFT stays behind."""
        for model in self.base.components().values():
            recurse_remove_peft_layers(model)
            if hasattr(model, "peft_config"):
                del model.peft_config
        self.layers = []

    def _dropout_hook(self, number: int) -> Any:
        """kohya's network_dropout: on what leaves ``lora_down``.  The mask depends only on the key and the
        layer, so gradient checkpointing recomputes the same one."""
        keep = 1.0 - self._dropout

        def drop(_module: nn.Module, _inputs: Any, output_BR: Tensor) -> Tensor:
            if self._dropout_key is None:
                return output_BR
            generator = keyed_generator(*self._dropout_key, number, device=output_BR.device)
            mask = torch.empty_like(output_BR, requires_grad=False).bernoulli_(keep, generator=generator)
            return output_BR * mask.div_(keep)

        return drop


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends on the key only: the same everywhere and in any order of use."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _is_trained(component: str, config: TrainConfig) -> bool:
    return config.trains_unet if component == "unet" else config.trains_text_encoder


def _inject_component(model: nn.Module, targets: list[Target], weights: Mapping[str, Tensor]) -> list[Layer]:
    """PEFT layers around the targets of one network, holding ``weights`` in fp32 on the network's device."""
    assert not hasattr(model, "peft_config"), "an adapter is in the base already: remove it first"
    rank = Counter(target.rank for target in targets).most_common(1)[0][0]
    alpha = Counter(target.alpha for target in targets).most_common(1)[0][0]
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[target.path for target in targets],
        rank_pattern={target.path: target.rank for target in targets if target.rank != rank},
        alpha_pattern={target.path: target.alpha for target in targets if target.alpha != alpha},
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    inject_adapter_in_model(settings, model, adapter_name=NAME, low_cpu_mem_usage=True)
    layers = []
    for target in targets:
        wrapped: Any = model.get_submodule(target.path)
        device = wrapped.base_layer.weight.device
        down, up = wrapped.lora_A[NAME], wrapped.lora_B[NAME]
        for module, half in ((down, "lora_down"), (up, "lora_up")):
            value = weights[f"{target.key}.{half}.weight"]
            assert value.shape == module.weight.shape, (
                f"{target.key}: {value.shape} for {module.weight.shape}"
            )
            module.weight = nn.Parameter(value.to(device, torch.float32, copy=True))
        assert math.isclose(wrapped.scaling[NAME], target.alpha / target.rank), target.key
        layers.append(Layer(target, down, up))
    return layers


def _shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the down and up weights for a linear layer or a convolution."""
    if isinstance(layer, nn.Conv2d):
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    assert isinstance(layer, nn.Linear)
    return (rank, layer.in_features), (layer.out_features, rank)


def _kernel(layer: nn.Module) -> int:
    return int(layer.kernel_size[0]) if isinstance(layer, nn.Conv2d) else 1


def _keys(target: Target) -> list[str]:
    return [f"{target.key}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")]


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight
