"""CUDA's autocast for the pretend card: the same operators as in PyTorch's own lists, cast in front of autograd.

PyTorch's kernels for AutocastCUDA ask C++ whether a tensor is on CUDA, and the card's are not.  So the kernels are
replaced while the card is active.  ``POLICY`` names every operator that has one (ATen/autocast_mode.h);
``unknown_operators`` tells what another PyTorch has beside them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.pretendcard.tensors import CardTensor

LOWER = [
    "_convolution",
    "_convolution.deprecated",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_tbc",
    "conv_transpose1d",
    "conv_transpose2d.input",
    "conv_transpose3d.input",
    "convolution",
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "prelu",
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linalg_vecdot",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "linalg_multi_dot",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "_scaled_dot_product_flash_attention",
    "scaled_dot_product_attention",
]
FP32 = [
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "pow.Scalar",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "group_norm",
    "frobenius_norm.dim",
    "nuclear_norm",
    "nuclear_norm.dim",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
    "upsample_nearest1d",
    "_upsample_nearest_exact1d",
    "upsample_nearest2d",
    "_upsample_nearest_exact2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "_upsample_bilinear2d_aa",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bicubic2d_aa",
    "rms_norm",
    "linalg_matrix_sqrth",
]
# fp32 unless a dtype is given
FP32_DTYPE = [
    "prod",
    "prod.dim_int",
    "softmax.int",
    "log_softmax.int",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "linalg_matrix_norm",
    "linalg_matrix_norm.str_ord",
    "sum",
    "sum.dim_IntList",
    "norm.Scalar",
    "norm.ScalarOpt_dim",
]
WIDEST = [
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "grid_sampler",
    "index_put",
    "tensordot",
    "scatter_add",
]
REFUSED = ["binary_cross_entropy", "_cudnn_rnn"]  # not used here: an error if something does
POLICY = {
    **dict.fromkeys(LOWER, "lower"),
    **dict.fromkeys(FP32, "fp32"),
    **dict.fromkeys(FP32_DTYPE, "fp32 dtype"),
    **dict.fromkeys(WIDEST, "widest"),
    **dict.fromkeys(REFUSED, "refused"),
}


def unknown_operators() -> set[str]:
    """Operators that PyTorch casts for CUDA and ``POLICY`` does not name."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = torch._C._dispatch_get_all_op_names()
    return {
        each[6:] for each in names if each.startswith("aten::") and has(each, "AutocastCUDA")
    } - POLICY.keys()


class Casts:
    """Kernels for AutocastCUDA while it lives, with the cache of cast weights that autocast keeps."""

    def __init__(self) -> None:
        self._cache: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._library = torch.library.Library("aten", "IMPL")
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each one replaces a kernel
            for name, policy in POLICY.items():
                if has(f"aten::{name}", "AutocastCUDA"):
                    self._library.impl(name, self._kernel(name, policy), "AutocastCUDA", allow_override=True)

    def close(self) -> None:
        self._library._destroy()
        self.clear()

    def clear(self) -> None:
        """At the end of the outermost autocast."""
        self._cache.clear()

    def _kernel(self, name: str, policy: str) -> Callable[..., Any]:
        base, _, overload = name.partition(".")
        function = getattr(getattr(torch.ops.aten, base), overload or "default")
        below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(below):
                if policy == "refused":
                    raise RuntimeError(f"{name} under autocast is not modelled on the pretend card")
                kind = _kind(policy, args, kwargs)
                if kind is not None:
                    args = tuple(self._cast(each, kind) for each in args)
                    kwargs = {key: self._cast(each, kind) for key, each in kwargs.items()}
                return function(*args, **kwargs)

        return run

    def _cast(self, value: Any, kind: torch.dtype) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._cast(each, kind) for each in value)
        if not _is_cast(value) or value.dtype == kind:
            return value
        lower = kind == torch.get_autocast_dtype("cuda") and value.dtype == torch.float32
        if lower and value.requires_grad and value.is_leaf and torch.is_autocast_cache_enabled():
            key = (id(value), kind)
            if key not in self._cache:
                self._cache[key] = (value, torch.Tensor.to(value, kind))
            return self._cache[key][1]
        return torch.Tensor.to(value, kind)


def _is_cast(value: Any) -> bool:
    """is_eligible: floating-point tensors of the card but for fp64."""
    return isinstance(value, CardTensor) and value.is_floating_point() and value.dtype != torch.float64


def _kind(policy: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    if policy == "lower":
        return torch.get_autocast_dtype("cuda")
    if policy == "fp32 dtype" and (
        kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args)
    ):
        return None
    if policy in ("fp32", "fp32 dtype"):
        return torch.float32
    return (
        torch.float32 if any(_has(each, torch.float32) for each in args) else torch.get_autocast_dtype("cuda")
    )


def _has(value: Any, kind: torch.dtype) -> bool:
    if isinstance(value, list | tuple):
        return any(_has(each, kind) for each in value)
    return isinstance(value, CardTensor) and value.dtype == kind
