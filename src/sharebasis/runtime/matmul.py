"""The fastest product that torch has for where a tensor lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def linear(
    x: Float[Tensor, "*batch d_in"], weight: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "*batch d_out"]:
    """x Wᵀ, by oneDNN where that can be had: float32 on a CPU, without gradients.

    The library that `functional.linear` calls there chooses its kernels by vendor; oneDNN
    asks what the processor can do, and is twice as fast on some (benchmarks/arithmetic.py).
    Equal to `functional.linear` up to float32 rounding; `use_onednn` does without.
    """
    gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradients or torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, weight)
    return _product(x, weight)


class FastestLinear(TorchFunctionMode):
    """A context in which every `functional.linear`, those of modules included, is `linear`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not functional.linear:
            return func(*args, **(kwargs or {}))
        return _biased(*args, **(kwargs or {}))


def _biased(
    input: Tensor,  # noqa: A002 - as `functional.linear` calls it
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    y = linear(input, weight)
    return y if bias is None else y + bias


def observed_linear(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    observe: Callable[[Tensor], None],
) -> Float[Tensor, "*batch d_out"]:
    """x Wᵀ, whose gradient is shown to `observe` when it comes, in the shape of the output.

    A hook on the output would not do: a model that goes on to change the output in place
    leaves the hook behind. The weight gets no gradient.
    """
    shape = x.shape[:-1]
    # As rows, so that the output is no view, which a model may not change in place.
    y: Tensor = _ObservedLinear.apply(
        x.flatten(0, -2), weight, lambda gradient: observe(gradient.unflatten(0, shape))
    )
    return y.unflatten(0, shape)


class _ObservedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, observe: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.observe = observe
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        ctx.observe(gradient)
        return _product(gradient, weight.T), None, None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    on_cpu = x.device.type == weight.device.type == "cpu"
    if _ONEDNN is None or not (on_cpu and x.dtype == weight.dtype == torch.float32):
        return functional.linear(x, weight)
    return _ONEDNN(x, weight, None, "none", [], "")


def _find_onednn() -> torch._ops.OpOverloadPacket | None:
    """The operator that torch's own compiler calls; no public one takes tensors as they are."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_ONEDNN = _find_onednn()


def use_onednn(wanted: bool) -> None:
    """Let products of this process go to oneDNN, or to what torch calls by itself."""
    global _ONEDNN  # as a setting of torch is: modules that multiply are told of none
    _ONEDNN = _find_onednn() if wanted else None
