"""The bytes that an optimizer keeps for one trained tensor. The optimizer uses fp32 weights, also with full_bf16.

The figures were read off the state of each optimizer after a step, as the test of this module does again.
"""

from __future__ import annotations

import math

from trainer.optimizers import effective

BLOCK_ELEMENTS = 256  # block size of bitsandbytes' blockwise state: one fp32 maximum per block
FP32 = 4

# fp32 values per weight: moments, sums, and copies of the starting point
_PER_WEIGHT = {
    "Lion": 1,
    "SGDNesterov": 1,
    "SGDScheduleFree": 1,
    "DAdaptLion": 2,
    "DAdaptation": 3,
    "DAdaptAdaGrad": 3,
    "DAdaptAdam": 3,
    "DAdaptSGD": 3,
    "DAdaptAdan": 5,
    "DAdaptAdanIP": 5,
}
# 8-bit values per weight
_EIGHT_BIT = {
    "AdamW8bit": 2,
    "PagedAdamW8bit": 2,
    "Lion8bit": 1,
    "PagedLion8bit": 1,
    "SGDNesterov8bit": 1,
    "AdEMAMix8bit": 3,
    "PagedAdEMAMix8bit": 3,
}


def optimizer_bytes(optimizer_type: str, shape: tuple[int, ...], optimizer_args: str = "") -> int:
    """Bytes of the optimizer state for one trained tensor."""

    def argument(name: str) -> object:
        return effective(optimizer_type, optimizer_args, name)

    count = math.prod(shape)
    if optimizer_type in _EIGHT_BIT:
        smallest = argument("min_8bit_size")
        assert isinstance(smallest, int)
        blocks = -(-count // BLOCK_ELEMENTS)
        per_moment = FP32 * count if count < smallest else count + FP32 * blocks
        return _EIGHT_BIT[optimizer_type] * per_moment
    match optimizer_type:
        case "Adafactor":
            return _factored(shape) + (FP32 * count if argument("beta1") is not None else 0)
        case "CAME":  # a moment, and squares of gradients and of residuals
            return FP32 * count + (2 if len(shape) > 1 else 1) * _factored(shape)
        case "Prodigy":  # two moments; s and the starting point of every slice_p-th weight
            every = argument("slice_p")
            assert isinstance(every, int)
            return 2 * FP32 * count + 2 * FP32 * -(-count // every)
        case "SGD":
            return FP32 * count if argument("momentum") else 0
        case "AdamW" | "Adam" if argument("amsgrad"):
            return 3 * FP32 * count
    return FP32 * _PER_WEIGHT.get(optimizer_type, 2) * count


def _factored(shape: tuple[int, ...]) -> int:
    """Squares as one value per row and one per column; of a vector, all of them."""
    if len(shape) < 2:
        return FP32 * math.prod(shape)
    return FP32 * (math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1])))
