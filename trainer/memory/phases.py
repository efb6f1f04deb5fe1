"""phases(): the memory that each phase of the work needs on a card, networks that may leave it gone.

Owns which networks a phase needs and what it computes beside them: text and images encoded before training, the
training step (``footprint``), images drawn, decoded and scored. The card acts on the same figures when it decides who
leaves (``trainer.card``). All sizes are in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from trainer.bases import FAMILIES, needs
from trainer.config import TrainConfig
from trainer.errors import ToolError
from trainer.memory import vae
from trainer.memory.footprint import (
    CUBLAS_BYTES,
    BaseFacts,
    base_facts,
    compute_type,
    network_bytes,
    predict,
)
from trainer.oom import CUDA_CONTEXT_BYTES

# Assumed: the scorer of real bases, ViT-B-32 with 151 million values in fp32, and 32 pictures at once in it.
SCORER_BYTES, SCORER_WORK_BYTES = 605_000_000, 14 * 32 * 50 * 768 * 4


@dataclass(frozen=True)
class PhasePlan:
    """A phase: its networks, what stays on the card (adapter, optimizer), and what it computes. ``how``: in words."""

    name: str
    networks: Mapping[str, int]
    held_bytes: int
    work_bytes: int
    how: str = ""

    @property
    def peak_bytes(self) -> int:
        own = CUDA_CONTEXT_BYTES + CUBLAS_BYTES
        return own + sum(self.networks.values()) + self.held_bytes + self.work_bytes


def phases(config: TrainConfig, facts: BaseFacts, card_bytes: int) -> tuple[PhasePlan, ...]:
    """Every phase of a run of these settings, in the order in which they come first."""
    step = predict(config, facts)
    adapter, state = step.parts["adapter"], step.parts["optimizer state"]
    base_parts = {k.removeprefix("base: "): size for k, size in step.parts.items() if k.startswith("base: ")}
    own = sum(base_parts.values()) + adapter + state
    training = PhasePlan(
        "train",
        base_parts,
        adapter + state,
        step.peak_bytes - own - CUDA_CONTEXT_BYTES - CUBLAS_BYTES,
        f"{step.images_at_once} at once",
    )
    drawing = _drawing(config, facts, card_bytes, adapter + state, base_parts["unet"])
    return (
        _encoding(config, facts, card_bytes, adapter),
        _reading(config, facts, adapter),
        training,
        *drawing,
    )


def largest(found: tuple[PhasePlan, ...]) -> PhasePlan:
    """The phase with the highest peak."""
    return max(found, key=lambda phase: phase.peak_bytes)


def step_work(config: TrainConfig, spec: str) -> int | None:
    """What a training step needs beside the networks of the base, adapter and optimizer included; None if there is no
    prediction."""
    try:
        facts = base_facts(spec)
        step = predict(config, facts)
    except ToolError:
        return None
    frozen = sum(size for name, size in step.parts.items() if name.startswith("base: "))
    return step.peak_bytes - frozen - CUDA_CONTEXT_BYTES


def _element(config: TrainConfig) -> int:
    return 4 if compute_type(config) == "float32" else 2


def _vae_element(config: TrainConfig, facts: BaseFacts) -> int:
    in_half = FAMILIES[facts.family].half_vae or compute_type(config) != "float16"
    return 2 if _element(config) == 2 and in_half and not config.no_half_vae else 4


def _vae(config: TrainConfig, facts: BaseFacts) -> dict[str, int]:
    return {"vae": _vae_element(config, facts) * vae.parameters(facts.config("vae"))}


def _encoding(config: TrainConfig, facts: BaseFacts, card_bytes: int, adapter: int) -> PhasePlan:
    size, networks = config.size_px, _vae(config, facts)
    each = needs.encode_bytes(facts.config("vae"), *size, _vae_element(config, facts))
    space = needs.work_space(card_bytes, networks["vae"] + adapter)
    at_once = max(1, min(config.vae_batch_size, space // each))
    work, how = _whole_or_tiles(each, size, space, at_once)
    return PhasePlan("encode images", networks, adapter, work, how)


def _reading(config: TrainConfig, facts: BaseFacts, adapter: int) -> PhasePlan:
    names = FAMILIES[facts.family].text_encoders
    element = _element(config)
    networks = {name: network_bytes(facts, name, element) for name in names}
    windows = max(1, (config.max_token_length or 75) // 75)
    work = sum(needs.text_bytes(facts.config(name), windows, element) for name in names)
    return PhasePlan("encode text", networks, adapter, work)


def _drawing(
    config: TrainConfig, facts: BaseFacts, card_bytes: int, held: int, unet_bytes: int
) -> tuple[PhasePlan, ...]:
    """Images at the base's own size, as a search and an evaluation draw them, with the optimizer's state on the card
    (samples while training)."""
    side, element = facts.native_resolution_px, _element(config)
    cells = (side // facts.latent_factor_px) ** 2
    unet = facts.config("unet")
    count = needs.drawn_at_once(unet, cells, network_bytes(facts, "unet", element), element, card_bytes)
    decoder = _vae(config, facts)
    each = needs.decode_bytes(facts.config("vae"), side, side, _vae_element(config, facts))
    space = needs.work_space(card_bytes, decoder["vae"] + held)
    work, how = _whole_or_tiles(each, (side, side), space, needs.decoded_at_once(count, side, side))
    make = partial(PhasePlan, held_bytes=held)
    return (
        make(
            "denoise",
            {"unet": unet_bytes},
            work_bytes=needs.denoise_bytes(unet, cells, 2 * count, element),
            how=f"{count} image{'s' if count > 1 else ''} of {side}² at once",
        ),
        make("decode", decoder, work_bytes=work, how=how),
        make("score", {"scorer": SCORER_BYTES}, work_bytes=SCORER_WORK_BYTES, how="ViT-B-32"),
    )


def _whole_or_tiles(each: int, size: tuple[int, int], space: int, at_once: int) -> tuple[int, str]:
    """The work of the VAE, and how it is done."""
    side = needs.tile_px(each, *size, space)
    if side is not None:
        return needs.tile_bytes(each, *size, side), f"in tiles of {side} px"
    return at_once * each, f"{at_once} of {size[0]}×{size[1]} px at once"
