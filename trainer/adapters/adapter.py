"""Adapter: LoRA, LoCon, DoRA, LoHa or LoKr injected into a base, its weights, and its complete removal.

Owns state, norms, rounding and removal; which modules get one is ``targets``'s, which layer ``injecting``'s.
``lowrank`` computes LoRA, PEFT LoHa and LoKr, ``changed`` the rest; ``kinds`` says what differs between kinds.  Weights
are fp32 whatever the base's type, or bf16 with full_bf16.  Does not own files (``lorafile``), dropout's random numbers
(``dropout``) or the optimizer (``optim``).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import recurse_remove_peft_layers
from torch import Tensor, nn

from trainer.adapters.changed import ChangedLayer
from trainer.adapters.choice import KINDS, kind_for
from trainer.adapters.dropout import Chance, Draws, Drop, Dropout, drawn, keyed_generator
from trainer.adapters.injecting import inject_component, unwrap
from trainer.adapters.kinds import NAME, SCALAR, Kind
from trainer.adapters.lowrank import LowRankLayer, computing
from trainer.adapters.magnitude import MAGNITUDE, attach_magnitude, column_norm
from trainer.adapters.targets import Target, trained_targets
from trainer.bases import Base
from trainer.compute import weight_of
from trainer.config import TrainConfig
from trainer.errors import ConfigError, Diverged

NO_DROPOUT = Dropout()
SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Layer:
    """One injected module: the layer around the base's, and its trainable tensors by ending."""

    target: Target
    wrapped: Any
    weights: dict[str, nn.Parameter]

    @property
    def kind(self) -> Kind:
        return KINDS[self.target.kind]

    @property
    def factors(self) -> list[nn.Parameter]:
        """What ΔW is a product of."""
        return [weight for ending, weight in self.weights.items() if ending != MAGNITUDE]

    def drops_rows(self, dropout: Dropout) -> bool:
        """Whether rank_dropout drops rows of ΔW here."""
        return dropout.rows or self.target.kind in ("LoHa", "LoKr") or isinstance(self.wrapped, ChangedLayer)

    def delta(self) -> Tensor:
        """ΔW (out, in·kh·kw) times alpha / rank."""
        if isinstance(self.wrapped, ChangedLayer):
            difference = self.wrapped.get_delta_weight(NAME)
            return difference.flatten(1) if difference.dim() > 1 else difference
        return self.kind.delta(self.weights) * self.wrapped.scaling[NAME]

    def saved(self) -> dict[str, Tensor]:
        """ending → tensor as a file holds them, with the constant beside them; fp32 copies on CPU."""
        kind = self.kind
        tensors = {
            ending: weight.detach().to("cpu", torch.float32, copy=True)
            for ending, weight in self.weights.items()
        }
        found = kind.folded(tensors)
        return found | ({kind.constant: torch.tensor(float(self.target.alpha))} if kind.constant else {})


def inject(base: Base, config: TrainConfig) -> Adapter:
    """A fresh adapter with ΔW = 0, so the base's output is unchanged at first.

    Every module has its own generator, keyed by (seed, key), so the order of initialisation does not matter.
    """
    targets = trained_targets(base, config)
    weights: dict[str, Tensor] = {}
    for target in targets:
        layer = base.components()[target.component].get_submodule(target.path)
        generator = keyed_generator(config.seed, target.key)
        for ending, value in kind_for(config, target).start(layer, target.rank, generator).items():
            weights[f"{target.key}.{ending}"] = value
        if target.kind == "DoRA":
            weights[f"{target.key}.{MAGNITUDE}"] = column_norm(weight_of(layer))
    dropout = Dropout(
        config.network_dropout, config.rank_dropout, config.module_dropout, config.rank_dropout_rows
    )
    kept_in = torch.bfloat16 if config.full_bf16 else torch.float32
    return Adapter(base, targets, weights, dropout=dropout, kept_in=kept_in)


class Adapter:
    """An adapter in a base. ``remove`` takes it out and leaves the base bitwise as it was."""

    def __init__(
        self,
        base: Base,
        targets: Iterable[Target],
        weights: Mapping[str, Tensor],
        *,
        dropout: Dropout = NO_DROPOUT,
        kept_in: torch.dtype = torch.float32,
    ) -> None:
        self.base = base
        self.layers: list[Layer] = []
        self.draws = Draws(dropout)
        by_component: dict[str, list[Target]] = {}
        for target in targets:
            by_component.setdefault(target.component, []).append(target)
        try:
            for component, chosen in by_component.items():
                placed = inject_component(base.components()[component], chosen, weights, kept_in)
                self.layers += [Layer(*one) for one in placed]
        except BaseException:
            self.remove()
            raise
        for number, layer in enumerate(self.layers):
            self._prepare(number, layer)

    @contextlib.contextmanager
    def computing(self, kind: torch.dtype) -> Iterator[None]:
        """Inside, the weights are cast to ``kind`` once for a forward and backward pass (``lowrank.computing``)."""
        wrapped = [layer.wrapped for layer in self.layers]
        with computing([layer for layer in wrapped if isinstance(layer, LowRankLayer)], kind):
            yield

    @property
    def needs_autocast(self) -> bool:
        """Whether any of its layers leaves the choice of types to autocast: PEFT's, and changes of a weight."""
        return not all(isinstance(layer.wrapped, LowRankLayer) for layer in self.layers)

    def trainable(self) -> list[nn.Parameter]:
        """All trainable weights, in module order."""
        return [
            weight
            for layer in self.layers
            for ending, weight in layer.weights.items()
            if ending not in layer.kind.frozen
        ]

    def freeze_text_encoders(self) -> None:
        """Freeze the text encoders' part."""
        for layer in self.layers:
            if layer.target.component != "unet":
                for weight in layer.weights.values():
                    weight.requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """kohya key → tensor, fp32 copies on CPU: ``….lora_down.weight``, …, ``….alpha``."""
        state: dict[str, Tensor] = {}
        for layer in self.layers:
            for ending, weight in layer.weights.items():
                state[f"{layer.target.key}.{ending}"] = weight.detach().to("cpu", torch.float32, copy=True)
            if layer.kind.constant:
                state[f"{layer.target.key}.{layer.kind.constant}"] = torch.tensor(float(layer.target.alpha))
        return state

    def saved(self) -> dict[str, Tensor]:
        """The same as a file has it: a trained scalar is part of a factor, and parts are joined."""
        return {
            f"{layer.target.key}.{ending}": tensor
            for layer in self.layers
            for ending, tensor in layer.saved().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what ``state`` returned. Raises ConfigError if modules or ranks differ."""
        own = {f"{layer.target.key}.{end}": w for layer in self.layers for end, w in layer.weights.items()}
        alphas = {f"{layer.target.key}.{layer.kind.constant}" for layer in self.layers if layer.kind.constant}
        others = sorted(state.keys() ^ (own.keys() | alphas))
        others += [
            name for name, weight in own.items() if name in state and state[name].shape != weight.shape
        ]
        if others:
            raise ConfigError(
                f"the saved weights are not of this adapter: {len(others)} tensors differ, as {others[0]}",
                "go on with the settings that they were trained with",
            )
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(state[name])

    def fingerprint(self) -> str:
        """sha256 over keys, shapes and values of ``state``."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.state().items()):
            digest.update(f"{key}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def round_to(self, save_precision: str) -> None:
        """Round every weight to the number type of the saved file, in place, so that the scored weights
        are the saved ones.

        DoRA's file holds alpha = rank, so its scale moves into lora_up first, and
        magnitudes stay fp32 (``lorafile``).
        """
        self.layers = [
            _with_unit_scale(layer) if MAGNITUDE in layer.weights else layer for layer in self.layers
        ]
        for layer in self.layers:
            _fold_scalar(layer)
            for weight in layer.factors:
                weight.copy_(weight.to(SAVE_DTYPES[save_precision]).float())
            if not all(bool(weight.isfinite().all()) for weight in layer.weights.values()):
                raise Diverged(
                    f"the weights of {layer.target.key} are not finite as {save_precision}",
                    "lower learning_rate, or save as float",
                )

    @torch.no_grad()
    def weight_change(self) -> float:
        """‖ΔW‖ / ‖W‖ over all target modules (Frobenius norms): how far the adapter moves the base's weights.

        0 is an untrained adapter, 0.01 a change of one percent.  DoRA's magnitudes do not count.
        """
        own = sum(float(layer.delta().float().norm()) ** 2 for layer in self.layers)
        base = sum(float(weight_of(layer.wrapped.base_layer).float().norm()) ** 2 for layer in self.layers)
        return math.sqrt(own / base) if base else 0.0

    @torch.no_grad()
    def limit_norms(self, max_norm: float) -> None:
        """kohya's scale_weight_norms: where ‖ΔW · alpha / rank‖ is above, its n factors shrink by
        the n-th root each."""
        for layer in self.layers:
            match layer.kind.limit:
                case "product":
                    share = (max_norm / layer.delta().norm()).clamp(max=1.0)
                    for weight in layer.factors:
                        weight.mul_(share ** (1 / len(layer.factors)))
                case "blocks":
                    blocks = layer.weights["oft_blocks"]
                    blocks.mul_((max_norm / blocks.norm()).clamp(max=1.0))

    def apply_dropout(self, *key: int, rows: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Enable dropout as ``Dropout`` says, drawn from this key (seed, step, micro-batch). Without a key
        there is none.  ``rows`` (first, count, of how many): the rows of the micro-batch that are computed,
        if it is split. They get the same dropout as without the split."""
        self.draws.key = key or None
        self.draws.part = rows
        if self.draws.dropout.module > 0:
            for number, layer in enumerate(self.layers):
                layer.wrapped._disable_adapters = (
                    bool(key) and drawn(*key, number, "module") < self.draws.dropout.module
                )

    def remove(self) -> None:
        """Take the adapter out of the base: the same layer objects return."""
        for model in self.base.components().values():
            unwrap(model)
            if getattr(model, "peft_config", None):
                recurse_remove_peft_layers(model)
            if hasattr(model, "peft_config"):
                del model.peft_config
        self.layers = []

    def _prepare(self, number: int, layer: Layer) -> None:
        """Hooks for DoRA's magnitude, and what dropout draws; they go with the layer."""
        if isinstance(layer.wrapped, ChangedLayer):
            layer.wrapped.chance = Chance(self.draws, number, layer)
            return
        if MAGNITUDE in layer.weights:
            attach_magnitude(layer, lambda: self.draws.kept_rows(number, layer))
        if isinstance(layer.wrapped, LowRankLayer):
            layer.wrapped.comes_and_goes = self.draws.dropout.module > 0
            if self.draws.dropout.network > 0 or self.draws.dropout.rank > 0:
                layer.wrapped.drop = Drop(self.draws, number, layer)
        elif self.draws.dropout.rank > 0:
            layer.wrapped.get_delta_weight = self.draws.of_weight(number, layer)


def _with_unit_scale(layer: Layer) -> Layer:
    """The same layer with alpha = rank, its scale moved into lora_up."""
    layer.weights["lora_up.weight"].mul_(layer.wrapped.scaling[NAME])
    layer.wrapped.scaling[NAME] = 1.0
    return replace(layer, target=replace(layer.target, alpha=float(layer.target.rank)))


def _fold_scalar(layer: Layer) -> None:
    """Move a trained scalar into the factors that carry it in a file."""
    scalar = layer.weights.get(SCALAR)
    if scalar is not None:
        for ending in layer.kind.carriers:
            if ending in layer.weights:
                layer.weights[ending].mul_(scalar)
        scalar.fill_(1.0)
