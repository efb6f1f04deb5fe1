"""What each phase needs: the formulas against traces, and SDXL on cards of 16, 12 and 8 GB."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.bases import Sizes, empty_network, needs
from trainer.config import TrainConfig
from trainer.memory import base_facts, choose, largest, networks, phases, step_work, tracing
from trainer.memory.allocator import CachingAllocator
from trainer.memory.footprint import CUBLAS_BYTES, predict
from trainer.memory.kernels import Kernels, _Norm
from trainer.memory.recorder import Recorder
from trainer.memory.stacks import SAFE_SHARE
from trainer.oom import CUDA_CONTEXT_BYTES

GB = 10**9


def traced(held: list[torch.nn.Module], autocast: torch.dtype | None, work: Callable[[], object]) -> int:
    """Peak bytes that some work allocates without gradients, as on a GPU (``trainer.memory.kernels``)."""
    recorder = Recorder()
    for network in held:
        for tensor in (*network.parameters(), *network.buffers()):
            recorder.see(tensor, is_new=False)
    kernels = Kernels(recorder, autocast, frozenset())
    if autocast is None:  # norms keep the type of their input
        kernels._norm = lambda x, rows, weight: _Norm.apply(x, rows, weight)  # type: ignore[method-assign]
    with contextlib.ExitStack() as stack:
        for name, function in kernels.patches():
            stack.enter_context(tracing._replaced(F, name, function))
        stack.enter_context(recorder)
        stack.enter_context(torch.no_grad())
        work()
    allocator, handles = CachingAllocator(), {}
    for event in recorder.events:
        if event >= 0:
            handles[event] = allocator.allocate(recorder.sizes[event][0])
        else:
            allocator.free(handles.pop(~event))
    return allocator.peak_allocated


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("side", [512, 1024])
def test_the_vaes_formulas_are_its_traced_peaks(side: int, dtype: torch.dtype) -> None:
    config = base_facts("sdxl").config("vae")
    vae = empty_network("vae", config).to(dtype)
    latents, pixels = empty(1, 4, side // 8, side // 8, dtype=dtype), empty(1, 3, side, side, dtype=dtype)
    decoded = traced([vae], None, lambda: vae.decode(latents, return_dict=False)[0].float())
    encoded = traced([vae], None, lambda: vae.encode(pixels).latent_dist)
    # a convolution's copies are counted in half precision, so the traces of fp32 lie lower
    for peak, formula in ((decoded, needs.decode_bytes), (encoded, needs.encode_bytes)):
        assert peak <= formula(config, side, side, dtype.itemsize) <= 1.3 * peak


@pytest.mark.parametrize("spec", ["sd15", "sdxl"])
def test_the_unets_formula_is_above_its_traced_peak_and_not_far(spec: str) -> None:
    facts = base_facts(spec)
    base = networks.meta_base(facts)
    base.unet.to(torch.bfloat16)
    base.compute_dtype = torch.bfloat16
    side = facts.native_resolution_px
    for rows, autocast in ((2, None), (8, torch.bfloat16)):
        states = tracing.text_states(base, TrainConfig(network_train_unet_only=True), rows)
        noisy = torch.empty(rows, 4, side // 8, side // 8, device="meta")
        times, sizes = (
            torch.zeros(rows, device="meta").long(),
            [Sizes((side, side), (0, 0), (side, side))] * rows,
        )
        peak = traced([base.unet], autocast, lambda: base.predict(noisy, times, states, sizes))  # noqa: B023
        formula = needs.denoise_bytes(base.unet.config, (side // 8) ** 2, rows, 2)
        assert peak <= formula <= 1.8 * peak


@pytest.mark.parametrize("gigabytes", [16, 12, 8])
def test_every_phase_of_sdxl_fits_into_the_card(gigabytes: int) -> None:
    card = gigabytes * GB
    facts = base_facts("sdxl")
    start = TrainConfig(pretrained_model_name_or_path="sdxl", resolution=1024)
    config = choose(start, facts, card).config
    found = phases(config, facts, card)
    assert [phase.name for phase in found] == [
        "encode images", "encode text", "train", "denoise", "decode", "score"
    ]  # fmt: skip
    for phase in found:
        assert 0 < phase.peak_bytes <= card * SAFE_SHARE, phase
    training = found[2]
    assert training.peak_bytes == predict(config, facts).peak_bytes == largest(found).peak_bytes
    together = sum(sum(phase.networks.values()) for phase in found if phase.name not in ("train",))
    assert together + max(phase.work_bytes for phase in found) > (8 * GB), "they would not fit at once"
    in_fp16 = phases(config.with_values({"mixed_precision": "fp16"}), facts, card)
    decoding = replace(in_fp16[4])
    assert decoding.networks["vae"] == 2 * found[4].networks["vae"], "SDXL's VAE overflows in fp16"
    assert decoding.peak_bytes <= card * SAFE_SHARE


def test_what_cannot_fit_whole_is_planned_in_tiles() -> None:
    facts = base_facts("sdxl")
    config = TrainConfig(pretrained_model_name_or_path="sdxl", resolution=1024, network_train_unet_only=True)
    by_size = {gb: {p.name: p for p in phases(config, facts, gb * GB)} for gb in (4, 8, 16)}
    assert by_size[4]["decode"].how.startswith("in tiles of 512")
    assert "tiles" not in by_size[8]["decode"].how
    assert by_size[16]["encode images"].how == "4 of 1024×1024 px at once"
    assert by_size[8]["encode images"].how == "3 of 1024×1024 px at once"
    drawn = {gb: by_size[gb]["denoise"].how for gb in by_size}
    assert drawn[16] == "4 images of 1024² at once" and drawn[8] == "1 image of 1024² at once"


def test_the_work_of_a_step_is_its_peak_without_the_networks() -> None:
    config = TrainConfig(pretrained_model_name_or_path="mini-sd15", resolution=64)
    step = predict(config, base_facts("mini-sd15"))
    frozen = sum(size for name, size in step.parts.items() if name.startswith("base: "))
    assert step_work(config, "mini-sd15") == step.peak_bytes - frozen - CUDA_CONTEXT_BYTES > CUBLAS_BYTES
    assert step_work(config, "/nowhere/at-all") is None


@pytest.mark.parametrize(
    ("cells", "unet_gb", "expected"),
    [(64 * 64, 1.72, (16, 16, 24, 32)), (128 * 128, 5.14, (1, 4, 6, 20)), (512 * 512, 5.14, (1, 1, 1, 1))],
)
def test_a_larger_card_draws_more_at_once_and_never_none(
    cells: int, unet_gb: float, expected: tuple[int, ...]
) -> None:
    unet = base_facts("sdxl").config("unet")
    found = [needs.drawn_at_once(unet, cells, int(unet_gb * GB), 2, gb * GB) for gb in (8, 16, 24, 80)]
    assert tuple(found) == expected


def test_tiles_are_used_only_where_a_whole_image_does_not_fit() -> None:
    whole = 8 * GB
    assert needs.tile_px(whole, 2048, 1024, whole) is None
    assert needs.tile_px(whole, 2048, 1024, whole - 1) == 1024
    assert needs.tile_px(whole, 2048, 1024, whole // 9) == 256
    assert needs.tile_px(whole, 1000, 1000, whole // 3) == 448, "a multiple of 64"
    assert needs.tile_px(whole, 2048, 1024, 0) == 256 and needs.tile_px(whole, 256, 192, 0) is None
    assert needs.tile_bytes(whole, 2048, 1024, 512) == whole // 8
    assert [needs.decoded_at_once(8, side, side) for side in (1024, 512, 256, 64)] == [1, 1, 4, 8]
