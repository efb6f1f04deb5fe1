"""How many kernels an operator launches on CUDA: a plain model, one number per operator.

An elementwise operator, a reduction, a matrix product is one launch; a view or an allocation none.  Operators below
launch several.  The numbers are read from ATen's CUDA sources or assumed where a library (cuDNN) decides; a real
profile has split-k reductions and layout changes on top.  Good for ratios between two ways to compute the same step.

Lists of tensors (foreach, fused optimizers) are multi-tensor kernels: one launch takes up to LIST_TENSORS tensors
(by how many lists it walks) and LIST_CHUNKS chunks of 65,536 elements (ATen/native/cuda/MultiTensorApply.cuh for
CUDA 13).
"""

from __future__ import annotations

import math
from typing import Any

import torch

LIST_TENSORS = (770, 448, 336, 252, 210)
LIST_CHUNKS = 2240
CHUNK = 65_536

# Kernels of one call, where it is not one.
SEVERAL = {
    "native_group_norm": 3,  # moments, fused scale and shift, apply
    "native_group_norm_backward": 3,
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,  # flash: row sums, backward, convert dQ
    "_scaled_dot_product_efficient_attention_backward": 2,
    "embedding_dense_backward": 2,
    "nonzero": 3,
    "sort": 2,
    "topk": 2,
    "_unique2": 4,
    "cumsum": 2,
    "cumprod": 2,
    "multinomial": 3,
    "index_put_": 2,
    "_index_put_impl_": 2,
}
NONE = frozenset(
    [
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "empty_permuted",
        "detach",
        "detach_",
        "alias",
        "lift_fresh",
        "lift",
        "_unsafe_view",
        "_reshape_alias",
        "set_",
        "resize_",
        "_fused_sdp_choice",
        "is_pinned",
        "_pin_memory",
        "_local_scalar_dense",
        "is_same_size",
        "_has_same_storage_numel",
        "requires_grad_",
        "_version",
        "sym_size",
        "sym_stride",
        "sym_numel",
        "sym_storage_offset",
        "record_stream",
        "_nested_tensor_size",
        "t_",
        "transpose_",
        "unsqueeze_",
        "squeeze_",
        "as_strided_",
    ]
)
MATMUL = frozenset({"mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "_scaled_mm", "addbmm"})
CONV = frozenset({"convolution", "convolution_backward", "_convolution"})


def launches(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Kernels that this call launches."""
    if name in NONE or func.is_view:
        return 0
    if name == "convolution":
        return 1 + (args[2] is not None)  # the bias is added by its own kernel
    if name == "convolution_backward":
        return sum(bool(each) for each in args[-1])
    if name.startswith(("_foreach_", "_fused_ada", "_fused_sgd", "_amp_foreach")):
        return _of_lists(args)
    if name == "addmm" and args[0].dim() > 1:
        return 1
    return SEVERAL.get(name, 1)


def _of_lists(args: tuple[Any, ...]) -> int:
    lists = [
        each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], torch.Tensor)
    ]
    if not lists:
        return 1
    depth = min(len(lists), 5)
    chunks = sum(max(1, math.ceil(tensor.numel() / CHUNK)) for tensor in lists[0])
    return max(math.ceil(len(lists[0]) / LIST_TENSORS[depth - 1]), math.ceil(chunks / LIST_CHUNKS))
