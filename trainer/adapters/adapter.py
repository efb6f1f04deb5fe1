"""Adapter: LoRA, LoCon, DoRA, LoHa or LoKr injected into a base, its weights, and its complete removal.

Owns dropout, norms, rounding and removal; which modules get one is ``targets``'s.  ``lowrank`` computes LoRA, PEFT
LoHa and LoKr, ``changed`` the rest; ``kinds`` says what differs between kinds.  Weights are fp32 whatever the base's
type, or bf16 with full_bf16.  Does not own files (``lorafile``) or the optimizer (``optim``).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import recurse_remove_peft_layers
from peft import inject_adapter_in_model
from torch import Tensor, nn

from trainer.adapters.changed import ChangedLayer
from trainer.adapters.choice import KINDS, kind_for
from trainer.adapters.kinds import NAME, SCALAR, Kind, LoRA
from trainer.adapters.lowrank import LowRankLayer, computing
from trainer.adapters.morekinds import DyLoRA
from trainer.adapters.targets import Target, targets_of
from trainer.bases import Base
from trainer.compute import weight_of
from trainer.config import TrainConfig
from trainer.errors import ConfigError, Diverged

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAGNITUDE = "dora_scale"


@dataclass(frozen=True)
class Dropout:
    """Dropout while training: shares of channels after lora_down, of ranks, of modules.  ``rows``: ``rank`` is LyCORIS'
    rank_dropout, which drops rows of ΔW (one draw for a micro-batch) and does not scale the rest."""

    network: float = 0.0
    rank: float = 0.0
    module: float = 0.0
    rows: bool = False

    def __bool__(self) -> bool:
        return max(self.network, self.rank, self.module) > 0


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
    targets = targets_of(base, config)
    if not targets:
        raise ConfigError("nothing is trained: every rate is 0", "set unet_lr or text_encoder_lr above 0")
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
        dropout: Dropout = Dropout(),
        kept_in: torch.dtype = torch.float32,
    ) -> None:
        self.base = base
        self.layers: list[Layer] = []
        self._dropout = dropout
        self._dropout_key: tuple[int, ...] | None = None
        self._rows = (0, 0, 0)
        self._generators: dict[torch.device, torch.Generator] = {}
        by_component: dict[str, list[Target]] = {}
        for target in targets:
            by_component.setdefault(target.component, []).append(target)
        try:
            for component, chosen in by_component.items():
                self.layers += _inject_component(base.components()[component], chosen, weights, kept_in)
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
        self._dropout_key = key or None
        self._rows = rows
        if self._dropout.module > 0:
            for number, layer in enumerate(self.layers):
                layer.wrapped._disable_adapters = (
                    bool(key) and _draw(*key, number, "module") < self._dropout.module
                )

    def remove(self) -> None:
        """Take the adapter out of the base: the same layer objects return."""
        for model in self.base.components().values():
            _unwrap(model)
            if getattr(model, "peft_config", None):
                recurse_remove_peft_layers(model)
            if hasattr(model, "peft_config"):
                del model.peft_config
        self.layers = []

    def _prepare(self, number: int, layer: Layer) -> None:
        """Hooks for DoRA's magnitude, and what dropout draws; they go with the layer."""
        if isinstance(layer.wrapped, ChangedLayer):
            layer.wrapped.chance = _Chance(self, number, layer)
            return
        if MAGNITUDE in layer.weights:
            _attach_magnitude(layer, lambda: self._kept_rows(number, layer))
        if isinstance(layer.wrapped, LowRankLayer):
            layer.wrapped.comes_and_goes = self._dropout.module > 0
            if self._dropout.network > 0 or self._dropout.rank > 0:
                layer.wrapped.drop = _Drop(self, number, layer)
        elif self._dropout.rank > 0:
            layer.wrapped.get_delta_weight = self._row_dropout(number, layer)

    def _kept(self, shape: Sequence[int], keep: float, like: Tensor, *purpose: int | str) -> Tensor:
        """A mask of 0 and 1 in the type of ``like``, drawn for a purpose of this micro-batch.  For some rows of it:
        drawn for all of it, then those rows. An image has several rows where a long caption is read in windows."""
        start, count, total = self._rows
        each = shape[0] // count if 0 < count < total else 0
        drawn = [total * each, *shape[1:]] if each else shape
        generator = self._generator(like.device, *purpose)
        mask = torch.empty(drawn, device=like.device, dtype=like.dtype).bernoulli_(keep, generator=generator)
        return mask[start * each : (start + count) * each] if each else mask

    def _generator(self, device: torch.device, *purpose: int | str) -> torch.Generator:
        """A generator for one purpose of this micro-batch: the device's own, seeded anew, since making one takes
        longer than what it draws here."""
        assert self._dropout_key is not None
        key = (*self._dropout_key, *purpose)
        if device in self._generators:
            return self._generators[device].manual_seed(seed_of(*key))
        made = keyed_generator(*key, device=device)
        if made is not None:  # None while memory is traced
            self._generators[device] = made
        return made

    def _kept_rows(self, number: int, layer: Layer) -> Tensor | None:
        """1 or 0 for each row of ΔW (out), fp32; None where no rows are dropped."""
        if self._dropout_key is None or self._dropout.rank == 0 or not layer.drops_rows(self._dropout):
            return None
        device = next(iter(layer.weights.values())).device
        generator = self._generator(device, number, "rank")
        outputs = layer.wrapped.base_layer.weight.shape[0]
        return torch.empty(outputs, device=device).bernoulli_(1.0 - self._dropout.rank, generator=generator)

    def _row_dropout(self, number: int, layer: Layer) -> Any:
        """rank_dropout of LoHa and LoKr: whole rows of ΔW, the rest scaled up (LyCORIS' rank_dropout_scale) unless
        ``Dropout.rows``."""
        get_delta_weight = layer.wrapped.get_delta_weight

        def dropped(*args: Any, **options: Any) -> Tensor:
            delta: Tensor = get_delta_weight(*args, **options)
            rows = self._kept_rows(number, layer)
            if rows is None:
                return delta
            rows = rows.to(delta.dtype).reshape(-1, *[1] * (delta.dim() - 1))
            return delta * (rows if self._dropout.rows else rows / (1.0 - self._dropout.rank))

        return dropped


def seed_of(*key: int | str) -> int:
    """The seed of a key: 63 bits of its sha256."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def keyed_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream depends only on the key, whatever the machine and the order of use."""
    return torch.Generator(device).manual_seed(seed_of(*key))


# DoRA's magnitude.  W' = (W + ΔW) · m / ‖W + ΔW‖, one m per input (arXiv 2402.09353 eq. 5: the norm of each
# column) as LyCORIS does with wd_on_output = False.  That is the form which ComfyUI and A1111 both read
# (docs/adapters.md).  Files with one m per output (LyCORIS' default, PEFT) are read too.


def column_norm(weight: Tensor) -> Tensor:
    """‖W‖ of each input, (1, in) or (1, in, 1, 1), fp32."""
    ones = [1] * (weight.dim() - 2)
    return weight.float().transpose(0, 1).flatten(1).norm(dim=1).reshape(1, weight.shape[1], *ones)


def row_norm(weight: Tensor) -> Tensor:
    """‖W‖ of each output, (out, 1) or (out, 1, 1, 1), fp32."""
    return weight.float().flatten(1).norm(dim=1).reshape(weight.shape[0], *[1] * (weight.dim() - 1))


def _attach_magnitude(layer: Layer, kept_rows: Callable[[], Tensor | None]) -> None:
    """Scale what goes into the layer (one m per input) or what comes out of it without bias (one m per
    output).  As in PEFT and section 4.3 of the paper the norm is taken as a constant of the gradient.  The norm is
    that of what is computed: without the rows that dropout leaves out."""
    magnitude = layer.weights[MAGNITUDE]
    per_input = magnitude.shape[0] == 1
    base_layer = layer.wrapped.base_layer

    def scale() -> Tensor:
        with torch.no_grad(), torch.autocast(magnitude.device.type, enabled=False):
            weight = weight_of(base_layer).float()
            delta = layer.delta()
            if (rows := kept_rows()) is not None:
                delta = delta * rows[:, None]
            merged = weight + delta.reshape(weight.shape)
            norm = column_norm(merged) if per_input else row_norm(merged)
        return magnitude / norm.clamp(min=torch.finfo(torch.float32).eps)

    def scale_input(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if layer.wrapped.disable_adapters:
            return inputs
        return ((inputs[0] * scale()).to(inputs[0].dtype), *inputs[1:])

    def scale_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if layer.wrapped.disable_adapters:
            return output
        shape = (1, -1, 1, 1) if magnitude.dim() == 4 else (-1,)
        factor = scale().reshape(shape)
        if base_layer.bias is None:
            return (output * factor).to(output.dtype)
        bias = base_layer.bias.reshape(shape)
        return ((output - bias) * factor + bias).to(output.dtype)

    if per_input:
        layer.wrapped.register_forward_pre_hook(scale_input)
    else:
        layer.wrapped.register_forward_hook(scale_output)


def _with_unit_scale(layer: Layer) -> Layer:
    """The same layer with alpha = rank, its scale moved into lora_up."""
    layer.weights["lora_up.weight"].mul_(layer.wrapped.scaling[NAME])
    layer.wrapped.scaling[NAME] = 1.0
    return replace(layer, target=replace(layer.target, alpha=float(layer.target.rank)))


# Injection


def _inject_component(
    model: nn.Module, targets: list[Target], weights: Mapping[str, Tensor], kept_in: torch.dtype
) -> list[Layer]:
    """Layers around the targets of one network, holding ``weights`` on the network's device; DoRA's magnitudes always
    in fp32.  ``LowRankLayer`` for LoRA, PEFT's for LoHa and LoKr, else ``ChangedLayer``."""
    assert not hasattr(model, "peft_config"), "an adapter is in the base already: remove it first"
    tensors = {target.key: _tensors_of(target, weights) for target in targets}
    plain = [target for target in targets if not KINDS[target.kind].is_changed(tensors[target.key])]
    low_rank = {target.path for target in plain if isinstance(KINDS[target.kind], LoRA)}
    of_peft = [target for target in plain if target.path not in low_rank]
    first = type(KINDS[of_peft[0].kind]).settings if of_peft else None
    of_peft = [target for target in of_peft if type(KINDS[target.kind]).settings is first]
    if of_peft:
        settings = KINDS[of_peft[0].kind].settings(of_peft)
        inject_adapter_in_model(settings, model, adapter_name=NAME, low_cpu_mem_usage=True)
    else:
        model.requires_grad_(False)
        model.peft_config = {}  # type: ignore[assignment]
    how = dict.fromkeys((target.path for target in of_peft), _fill) | dict.fromkeys(low_rank, _put_low_rank)
    return [how.get(target.path, _wrap)(model, target, tensors[target.key], kept_in) for target in targets]


def _tensors_of(target: Target, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ending → tensor of a target."""
    kind = KINDS[target.kind]
    if isinstance(kind, DyLoRA):
        start = f"{target.key}.lora_"
        return {
            key.removeprefix(f"{target.key}."): value
            for key, value in weights.items()
            if key.startswith(start)
        }
    endings = (*kind.endings, *kind.extras, SCALAR, MAGNITUDE)
    return {ending: weights[key] for ending in endings if (key := f"{target.key}.{ending}") in weights}


def _parameter(
    kind: Kind, ending: str, value: Tensor, device: torch.device, kept_in: torch.dtype
) -> nn.Parameter:
    number = torch.float32 if ending == MAGNITUDE else kept_in
    return nn.Parameter(value.to(device, number, copy=True), requires_grad=ending not in kind.frozen)


def _fill(model: nn.Module, target: Target, tensors: Mapping[str, Tensor], kept_in: torch.dtype) -> Layer:
    """PEFT's layer of a target with these tensors."""
    kind = KINDS[target.kind]
    wrapped: Any = model.get_submodule(target.path)
    placed: dict[str, nn.Parameter] = {}
    for ending, value in tensors.items():
        placed[ending] = _parameter(kind, ending, value, wrapped.base_layer.weight.device, kept_in)
        shape = kind.shape(wrapped, ending)
        assert shape is None or shape == value.shape, f"{target.key}: {value.shape} for {shape}"
        kind.place(wrapped, ending, placed[ending])
    wrapped.scaling[NAME] = target.alpha / target.rank
    return Layer(target, wrapped, placed)


def _put_low_rank(
    model: nn.Module, target: Target, tensors: Mapping[str, Tensor], kept_in: torch.dtype
) -> Layer:
    """A LowRankLayer in the place of a target."""
    layer: Any = model.get_submodule(target.path)
    placed = {
        ending: _parameter(KINDS[target.kind], ending, value, layer.weight.device, kept_in)
        for ending, value in tensors.items()
    }
    down, up = (placed[ending] for ending in LoRA.endings)
    wrapped = LowRankLayer(layer, down, up, NAME, target.alpha / target.rank)
    if MAGNITUDE in placed:
        wrapped.register_parameter(MAGNITUDE, placed[MAGNITUDE])
    wrapped.train(layer.training)
    _put(model, target.path, wrapped)
    return Layer(target, wrapped, placed)


def _wrap(model: nn.Module, target: Target, tensors: Mapping[str, Tensor], kept_in: torch.dtype) -> Layer:
    """A ChangedLayer in the place of a target."""
    kind = KINDS[target.kind]
    layer: Any = model.get_submodule(target.path)
    placed = {
        ending: _parameter(kind, ending, value, layer.weight.device, kept_in)
        for ending, value in tensors.items()
    }
    wrapped = ChangedLayer(layer, kind, placed, NAME, kind.scale(target.rank, target.alpha))
    wrapped.train(layer.training)
    _put(model, target.path, wrapped)
    return Layer(target, wrapped, placed)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _unwrap(model: nn.Module) -> None:
    """Put the layers of a base back where one of ours is."""
    for path, module in [*model.named_modules()]:
        if isinstance(module, ChangedLayer | LowRankLayer):
            _put(model, path, module.base_layer)


def _fold_scalar(layer: Layer) -> None:
    """Move a trained scalar into the factors that carry it in a file."""
    scalar = layer.weights.get(SCALAR)
    if scalar is not None:
        for ending in layer.kind.carriers:
            if ending in layer.weights:
                layer.weights[ending].mul_(scalar)
        scalar.fill_(1.0)


class _Drop:
    """What one LowRankLayer drops: kohya's network_dropout and rank_dropout on what leaves ``lora_down``, single
    values and whole ranks of a sample, or LyCORIS' rank_dropout, rows of ΔW.  It depends only on the adapter's key and
    the layer's number, so gradient checkpointing recomputes the same."""

    def __init__(self, adapter: Adapter, number: int, layer: Layer) -> None:
        self._adapter, self._number, self._layer = adapter, number, layer

    def ranks(self, shape: Sequence[int], like: Tensor) -> tuple[Tensor | None, float]:
        adapter, dropout = self._adapter, self._adapter._dropout
        if adapter._dropout_key is None:
            return None, 1.0
        mask, kept = None, 1.0
        if dropout.network > 0:
            kept = 1.0 - dropout.network
            mask = adapter._kept(shape, kept, like, self._number)
        if dropout.rank > 0 and not dropout.rows:
            axis = -1 if len(shape) < 4 else 1
            whole = [1] * len(shape)
            whole[0], whole[axis] = shape[0], shape[axis]
            ranks = adapter._kept(whole, 1.0 - dropout.rank, like, self._number, "rank").expand(*shape)
            mask = ranks if mask is None else mask * ranks
            kept *= 1.0 - dropout.rank
        return mask, kept

    def rows(self) -> Tensor | None:
        return self._adapter._kept_rows(self._number, self._layer)

    @property
    def changes_rows(self) -> bool:
        dropout = self._adapter._dropout
        return dropout.rank > 0 and self._layer.drops_rows(dropout)


class _Chance:
    """What one ChangedLayer draws; its values depend only on the adapter's key and the layer's number."""

    def __init__(self, adapter: Adapter, number: int, layer: Layer) -> None:
        self._adapter, self._number, self._layer = adapter, number, layer

    def rows(self, count: int, like: Tensor) -> Tensor | None:
        if not self._layer.kind.drops_rows:
            return None
        rows = self._adapter._kept_rows(self._number, self._layer)
        if rows is None or self._adapter._dropout.rows:
            return rows
        return rows / (1.0 - self._adapter._dropout.rank)

    def entries(self, like: Tensor) -> Tensor | None:
        key, rate = self._adapter._dropout_key, self._adapter._dropout.rank
        if key is None or rate == 0:
            return None
        generator = self._adapter._generator(like.device, self._number, "rank")
        return torch.empty_like(like).bernoulli_(1.0 - rate, generator=generator) / (1.0 - rate)

    def block(self, count: int) -> int | None:
        key = self._adapter._dropout_key
        return None if key is None else int(_draw(*key, self._number, "block") * count)


def _draw(*key: int | str) -> float:
    """A number from 0 to 1 that depends on the key only."""
    return float(torch.rand((), generator=keyed_generator(*key)))
