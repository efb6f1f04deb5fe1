"""choose(): settings that make a run fit a GPU, those with the lowest cost in speed first.

Owns the moves and their order.  A pure function on top of ``footprint.predict``: returns a configuration and
the reasons; nothing is loaded or run. Does not own the ladder after a real failure; see ``ladder``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer import optimizers
from trainer.bases.needs import SAFE_SHARE as SAFE_SHARE
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.memory.footprint import BaseFacts, Footprint, predict, text_encoders_stay

SMALLER_PX = 768
EIGHT_BIT = {"AdamW": "AdamW8bit"}


@dataclass(frozen=True)
class StackMove:
    """One setting that was changed to save memory, and why."""

    key: str
    old: Any
    new: Any
    reason: str


@dataclass(frozen=True)
class Attempt:
    """A candidate: the settings that were changed in this attempt (none: as given), its peak, and whether it fits."""

    values: Mapping[str, Any]
    peak_bytes: int
    fits: bool

    @property
    def words(self) -> str:
        return ", ".join(_words(self.values)) or "settings as given"

    @property
    def line(self) -> str:
        return f"{self.words}: {self.peak_bytes / 1e9:.2f} GB, {'fits' if self.fits else 'too much'}"


@dataclass(frozen=True)
class Stack:
    """Settings that fit, the changes, the predicted peak, and everything that was tried, in order. ``wider``: the
    optimizer with unquantised state that would fit as well, in words."""

    config: TrainConfig
    moves: tuple[StackMove, ...]
    footprint: Footprint
    tried: tuple[Attempt, ...] = ()
    wider: str = ""

    @property
    def standing(self) -> tuple[str, ...]:
        """Lines on the memory savings that cost no speed, and whether they apply."""
        stays = text_encoders_stay(self.config)
        return (
            "latents cached: always; the VAE is not on the GPU",
            "text encoder outputs not cached: text encoders are trained, or captions vary"
            if stays
            else "text encoder outputs cached: text encoders are not on the GPU",
            *([self.wider] if self.wider else []),
        )


# A move: alternative values with the reason; each is tried after the previous one did not fit.
Candidates = Iterator[tuple[dict[str, Any], str]]


def _bf16(config: TrainConfig, facts: BaseFacts) -> Candidates:
    if config.mixed_precision == "no":
        yield {"mixed_precision": "bf16"}, "half the memory of fp32 for weights and activations, and faster"


def _eight_bit(config: TrainConfig, facts: BaseFacts) -> Candidates:
    smaller = EIGHT_BIT.get(config.optimizer_type)
    if smaller is not None and optimizers.takes(smaller, config.optimizer_args):
        yield (
            {"optimizer_type": smaller},
            "a quarter of the optimizer state; one kernel for each tensor instead of one for all",
        )


def _checkpointing(config: TrainConfig, facts: BaseFacts) -> Candidates:
    if not config.gradient_checkpointing or config.checkpoint_blocks is not None:
        yield (
            {"gradient_checkpointing": True, "checkpoint_blocks": None},
            "blocks of the U-Net recompute their activations: slower, the result is the same",
        )


def _fp8(config: TrainConfig, facts: BaseFacts) -> Candidates:
    if not config.fp8_base:
        yield {"fp8_base": True}, "the frozen U-Net in scaled fp8: its output changes slightly"


def _accumulation(config: TrainConfig, facts: BaseFacts) -> Candidates:
    """Fewer images at once with the same effective batch size."""
    at_once = config.images_at_once
    while at_once > 1:
        at_once //= 2
        yield (
            {"micro_batch_size": at_once},
            f"{at_once} of {config.train_batch_size} images at once, with accumulation: same batch, slower",
        )


def _smaller(config: TrainConfig, facts: BaseFacts) -> Candidates:
    if config.resolution > SMALLER_PX:
        values = {"resolution": SMALLER_PX, "min_bucket_reso": min(config.min_bucket_reso, SMALLER_PX)}
        yield values, "smaller buckets: details are lost"


def _frozen_text(config: TrainConfig, facts: BaseFacts) -> Candidates:
    if config.trains_text_encoder and config.trains_unet:
        yield {"network_train_unet_only": True}, "text encoders frozen: their outputs are cached"


def _offload(config: TrainConfig, facts: BaseFacts) -> Candidates:
    if not (config.cpu_offload and config.cpu_offload_checkpointing):
        yield (
            {"cpu_offload": True, "cpu_offload_checkpointing": True},
            "optimizer state and checkpointed activations in RAM: slowest",
        )


MOVES: tuple[Callable[[TrainConfig, BaseFacts], Candidates], ...] = (
    _bf16,
    _eight_bit,
    _checkpointing,
    _fp8,
    _accumulation,
    _smaller,
    _frozen_text,
    _offload,
)


def choose(
    config: TrainConfig,
    facts: BaseFacts,
    vram_bytes: int,
    on_try: Callable[[Attempt], None] = lambda attempt: None,
) -> Stack:
    """The first configuration in the order of ``MOVES`` that fits into 15.5/16 of ``vram_bytes``, with as few
    recomputing blocks as possible.

    Latents are always cached, text states whenever possible. ``on_try`` receives each candidate with its peak, as
    soon as it is known. Raises ConfigError if nothing fits.
    """
    trial = _Trial(facts, int(vram_bytes * SAFE_SHARE), on_try)
    start, footprint = config, trial.peak(config, {})
    reasons: dict[str, str] = {}
    checkpointed: TrainConfig | None = None  # the settings before all blocks recompute
    for move in MOVES:
        for values, reason in move(config, facts):
            if footprint.peak_bytes <= trial.limit:
                break
            smaller = trial.peak(config, values)
            if smaller.peak_bytes < footprint.peak_bytes:
                if move is _checkpointing:
                    checkpointed = config
                config, footprint = config.with_values(values), smaller
                reasons |= dict.fromkeys(values, reason)
    if footprint.peak_bytes > trial.limit:
        raise ConfigError(
            f"{facts.name} does not fit into {vram_bytes / 1e9:g} GB at network_dim {config.network_dim}: "
            f"even with all memory savings the peak is {footprint.peak_bytes / 1e9:.2f} GB",
            "lower network_dim, or use a smaller base or a larger GPU",
        )
    if checkpointed is not None:
        config = _fewest_blocks(checkpointed, config, trial)
        footprint = predict(config, facts)
    old, new = start.as_dict(), config.as_dict()
    moves = tuple(StackMove(k, old[k], new[k], reasons[k]) for k in reasons if old[k] != new[k])
    return Stack(config, moves, footprint, tuple(trial.tried), _wider(config, facts, trial.limit))


def _wider(config: TrainConfig, facts: BaseFacts, limit: int) -> str:
    """What to say if 8-bit state is not needed: it saves memory, not time."""
    for wide, small in EIGHT_BIT.items():
        if config.optimizer_type == small and optimizers.takes(wide, config.optimizer_args):
            peak = predict(config.with_values({"optimizer_type": wide}), facts).peak_bytes
            if peak <= limit:
                return (
                    f"optimizer_type = {wide} fits as well ({peak / 1e9:.2f} GB): one kernel updates all weights, "
                    f"{small} starts one for each tensor"
                )
    return ""


class _Trial:
    """Predicts candidates, and keeps and reports them."""

    def __init__(self, facts: BaseFacts, limit: int, on_try: Callable[[Attempt], None]) -> None:
        self.facts, self.limit, self.on_try = facts, limit, on_try
        self.tried: list[Attempt] = []

    def peak(self, config: TrainConfig, values: Mapping[str, Any]) -> Footprint:
        found = predict(config.with_values(values), self.facts)
        attempt = Attempt(values, found.peak_bytes, found.peak_bytes <= self.limit)
        self.tried.append(attempt)
        self.on_try(attempt)
        return found


def _fewest_blocks(before: TrainConfig, config: TrainConfig, trial: _Trial) -> TrainConfig:
    """The smallest number of recomputing blocks that fits, by bisection between the previous number and all
    blocks. With the later moves, the previous number may be enough again."""
    low = (before.checkpoint_blocks or 0) if before.gradient_checkpointing else 0
    high = block_count(trial.facts)
    while low < high:
        middle = (low + high) // 2
        if trial.peak(config, _blocks(middle)).peak_bytes <= trial.limit:
            high, config = middle, config.with_values(_blocks(middle))
        else:
            low = middle + 1
    return config


def _blocks(count: int) -> dict[str, Any]:
    return {"gradient_checkpointing": count > 0, "checkpoint_blocks": count or None}


def _words(values: Mapping[str, Any]) -> list[str]:
    """Settings as written in a TOML file."""
    return [
        f"{name} = {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in values.items()
        if value is not None
    ]


def block_count(facts: BaseFacts) -> int:
    """Number of U-Net blocks that can recompute: down, middle and up (``trainer.compute.recompute``)."""
    unet = facts.config("unet")
    return len(unet["down_block_types"]) + 1 + len(unet["up_block_types"])
