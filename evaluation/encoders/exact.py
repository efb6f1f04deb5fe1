"""In full fp32: encoders compute cosines that are compared over months and machines.

PyTorch runs fp32 convolutions of a GPU in TF32 unless told otherwise, with ten bits of mantissa. A trial's images take
an encoder milliseconds in fp32, so nothing is gained by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """fp32 without TF32 on a GPU, whatever was set before."""
    if device.type != "cuda":
        yield
        return
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    places = (cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
