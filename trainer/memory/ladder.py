"""The out-of-memory ladder of ``hpo train``: what to give up next, cheapest first.

Pure: a configuration and the names of the rungs taken so far → the next one.  Catching the error, saving the state
and starting again are ``hpo.train.ladder``'s; the value-neutral remedies of a search are ``hpo.search.trial``'s.

No rung changes the effective batch: the batch stays what it is and is computed in smaller parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trainer.config import TrainConfig

SMALLER_PX = 768  # decisions: the ladder's order
SOME_BLOCKS = 3  # of SDXL's 7 or SD1.5's 9: the outermost hold most (trainer.compute.recompute)


@dataclass(frozen=True)
class Rung:
    """One step down: the settings to go on with, and what that means in words."""

    name: str
    config: TrainConfig
    says: str


# A candidate: (name, values, what it says), or None where there is nothing left to give up.
Candidate = tuple[str, dict[str, Any], str]


def _batch(config: TrainConfig) -> Iterator[Candidate]:
    now = config.images_at_once
    while now > 1:
        now //= 2
        yield (
            f"batch {now}",
            {"micro_batch_size": now},
            f"{now} of the {config.train_batch_size} images of a batch at once, the rest accumulated: "
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
            "every block of the U-Net recomputes its activations: slower, the result is the same",
        )


def _fp8(config: TrainConfig) -> Iterator[Candidate]:
    if not config.fp8_base:
        yield (
            "fp8 base",
            {"fp8_base": True},
            "the frozen base's weights are kept in 8 bits: its output changes slightly (docs/train.md)",
        )


def _resolution(config: TrainConfig) -> Iterator[Candidate]:
    if config.resolution > SMALLER_PX:
        yield (
            "resolution 768",
            {"resolution": SMALLER_PX, "min_bucket_reso": min(config.min_bucket_reso, SMALLER_PX)},
            f"resolution {config.resolution} → {SMALLER_PX} px: images are encoded anew, details are lost",
        )


def _text_encoders(config: TrainConfig) -> Iterator[Candidate]:
    if config.updates_text_encoder and config.trains_unet:
        yield (
            "frozen text encoders",
            {"text_encoder_frozen": True},
            "the text encoders are not trained any further; what their LoRA has learned is kept",
        )


def _offload(config: TrainConfig) -> Iterator[Candidate]:
    if not config.cpu_offload or not config.cpu_offload_checkpointing:
        yield (
            "offload",
            {"cpu_offload": True, "cpu_offload_checkpointing": True},
            "what recomputing keeps and the optimizer's state wait in the computer's memory, text encoders that "
            "are not trained compute there: slower, the result is the same",
        )


RUNGS: tuple[Callable[[TrainConfig], Iterator[Candidate]], ...] = (
    _batch,
    _checkpointing,
    _fp8,
    _resolution,
    _text_encoders,
    _offload,
)


def next_rung(config: TrainConfig, tried: tuple[str, ...]) -> Rung | None:
    """The first rung that changes something and was not tried, or None at the bottom."""
    for candidates in RUNGS:
        for name, values, says in candidates(config):
            if name not in tried:
                return Rung(name, config.with_values(values), says)
    return None


def encoding_rung(config: TrainConfig) -> Rung | None:
    """The same while images are encoded: fewer at once, which changes no latent."""
    if config.vae_batch_size == 1:
        return None
    fewer = config.vae_batch_size // 2
    return Rung(
        f"vae batch {fewer}",
        config.with_values({"vae_batch_size": fewer}),
        f"{fewer} images encoded at once: slower, the result is the same",
    )
