"""The out-of-memory ladder of ``hpo train``: which setting to change next, cheapest first.

A pure function: a configuration and the names of the rungs already tried → the next rung. Does not own
catching the error, saving the state and restarting (``hpo.train.ladder``), or which of the rungs that keep the
result a trial of a search takes (``hpo.search.remedies``).

No rung changes the effective batch size: the same batch is computed in smaller parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig

SMALLER_PX = 768  # assumed
SOME_BLOCKS = (
    3  # of SDXL's 7 or SD1.5's 9: the outermost blocks need the most memory (trainer.compute.recompute)
)


@dataclass(frozen=True)
class Rung:
    """One rung of the ladder: the new settings, and their effect in words."""

    name: str
    config: TrainConfig
    says: str


# A candidate: (name, values, message).
Candidate = tuple[str, dict[str, Any], str]


def _batch(config: TrainConfig) -> Iterator[Candidate]:
    now = config.images_at_once
    while now > 1:
        now //= 2
        yield (
            f"batch {now}",
            {"micro_batch_size": now},
            f"{now} of the {config.train_batch_size} images of a batch are computed at once, with accumulation: "
            f"the effective batch stays {config.effective_batch_size}, the result is the same",
        )


def _checkpointing(config: TrainConfig) -> Iterator[Candidate]:
    if not config.gradient_checkpointing:
        yield (
            f"checkpointing {SOME_BLOCKS}",
            {"gradient_checkpointing": True, "checkpoint_blocks": SOME_BLOCKS},
            f"{SOME_BLOCKS} blocks of the U-Net recompute their activations: slower, the result is the same",
        )
    if not config.gradient_checkpointing or config.checkpoint_blocks is not None:
        yield (
            "checkpointing",
            {"gradient_checkpointing": True, "checkpoint_blocks": None},
            "all blocks of the U-Net recompute their activations: slower, the result is the same",
        )


def _fp8(config: TrainConfig) -> Iterator[Candidate]:
    if not config.fp8_base:
        yield (
            "fp8 base",
            {"fp8_base": True},
            "the weights of the frozen base are stored in fp8: its output changes slightly (docs/train.md)",
        )


def _resolution(config: TrainConfig) -> Iterator[Candidate]:
    if config.resolution > SMALLER_PX:
        yield (
            "resolution 768",
            {"resolution": SMALLER_PX, "min_bucket_reso": min(config.min_bucket_reso, SMALLER_PX)},
            f"resolution {config.resolution} → {SMALLER_PX} px: images are encoded again, details are lost",
        )


def _text_encoders(config: TrainConfig) -> Iterator[Candidate]:
    if config.updates_text_encoder and config.trains_unet:
        yield (
            "frozen text encoders",
            {"text_encoder_frozen": True},
            "training of the text encoders stops; what their LoRA has learned so far is kept",
        )


def _offload(config: TrainConfig) -> Iterator[Candidate]:
    if not config.cpu_offload or not config.cpu_offload_checkpointing:
        yield (
            "offload",
            {"cpu_offload": True, "cpu_offload_checkpointing": True},
            "checkpointed activations and the optimizer state are moved to RAM, and text encoders that are not "
            "trained run on the CPU: slower, the result is the same",
        )


RUNGS: tuple[Callable[[TrainConfig], Iterator[Candidate]], ...] = (
    _batch,
    _checkpointing,
    _fp8,
    _resolution,
    _text_encoders,
    _offload,
)


KEEPING_THE_RESULT = RUNGS[:2]  # a search takes no others: its trials must stay comparable


def next_rung(config: TrainConfig, tried: tuple[str, ...], *, keeps_result: bool = False) -> Rung | None:
    """The first rung that changes something and was not tried yet; None if there is none.  ``keeps_result``: only
    rungs that do not change what is learned."""
    for name, values, says in _candidates(config, keeps_result):
        if name not in tried:
            return Rung(name, config.with_values(values), says)
    return None


def rung_named(config: TrainConfig, name: str) -> Rung | None:
    """The rung of this name that keeps the result; None if it would change nothing, or there is none."""
    found = (one for one in _candidates(config, True) if one[0] == name)
    return next((Rung(name, config.with_values(values), says) for name, values, says in found), None)


def _candidates(config: TrainConfig, keeps_result: bool) -> Iterator[Candidate]:
    for candidates in KEEPING_THE_RESULT if keeps_result else RUNGS:
        yield from candidates(config)


def encoding_rung(config: TrainConfig) -> Rung | None:
    """The same for encoding images: fewer images at once, which does not change the latents."""
    if config.vae_batch_size == 1:
        return None
    fewer = config.vae_batch_size // 2
    return Rung(
        f"vae batch {fewer}",
        config.with_values({"vae_batch_size": fewer}),
        f"{fewer} image{'s' if fewer > 1 else ''} encoded at once: slower, the result is the same",
    )
