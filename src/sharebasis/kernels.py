"""The fastest product that torch has for where a tensor lies."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def linear(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "*batch d_out"]:
    """x Wᵀ, by oneDNN where that can be had: float32 on a CPU, without gradients.

    The library that `functional.linear` calls there chooses its kernels by vendor; oneDNN
    asks what the processor can do, and is twice as fast on some (benchmarks/costs.py).
    Equal to `functional.linear` up to float32 rounding.
    """
    if _ONEDNN is None or not _plain_float32(x, weight):
        return functional.linear(x, weight)
    return _ONEDNN(x, weight, None, "none", [], "")


def _plain_float32(x: Tensor, weight: Tensor) -> bool:
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    on_cpu = x.device.type == weight.device.type == "cpu"
    return on_cpu and x.dtype == weight.dtype == torch.float32 and not gradients


def _find_onednn() -> torch._ops.OpOverloadPacket | None:
    """The operator that torch's own compiler calls; no public one takes tensors as they are."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN = _find_onednn()
