"""Which function a norm computes, found by probing it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharebasis.errors import StreamError
from sharebasis.residual.norm import Norm

TOLERANCE = 64.0
"""In units of rounding: how far from its components a stream may be."""


def probe_norm(module: nn.Module, like: Tensor, place: str) -> Norm:
    """Ask a norm what it does, whatever it is called and however it keeps its weight.

    Args:
        module: maps (*batch, d_model) to the same shape.
        like: a tensor of the width, dtype and device that it takes.
        place: of the norm, for messages.

    Raises:
        StreamError: it is neither LayerNorm nor RMSNorm.
    """
    d_model, large = like.shape[-1], 2.0**10  # epsilon is nothing beside its square

    def ask(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module.forward(x.view(1, 1, -1)).view(-1)

    zero = torch.zeros(d_model, dtype=like.dtype, device=like.device)
    bias = ask(zero)
    signs = torch.ones_like(zero)
    signs[1::2] = -1
    if d_model % 2:
        signs[-1] = 0
    size = signs.square().mean().sqrt()
    weight = (ask(signs * large) - bias) * signs * size
    if d_model % 2:
        weight[-1] = (ask(signs.roll(1) * large) - bias)[-1] * size * signs.roll(1)[-1]
    flat = ask(torch.full_like(zero, large)) - bias
    norm = Norm(weight, bias, bool(flat.abs().max() < weight.abs().max() / 2))
    x = torch.linspace(-1, 2, d_model, dtype=like.dtype, device=like.device) * large
    y = ask(x)
    error = (norm.linear(x, norm.scale(x, y)) + bias - y).abs().max()
    if not error <= 8 * torch.finfo(like.dtype).eps * y.abs().max():
        raise StreamError(
            f"{place} ({type(module).__name__}) is neither a LayerNorm nor an RMSNorm, so that "
            "what a component contributes behind it is not defined."
        )
    return norm


def norm_factor(written: Tensor, added: Tensor, place: str) -> Tensor:
    """What a sublayer's output was multiplied by, for each token and coordinate.

    A multiplier, an RMSNorm with its scale and weight, or both: one number for a token times
    one for a coordinate.
    """
    factor = torch.where(written == 0, 0, added / written)
    float_ = factor.double().flatten(0, -2)
    token = float_.abs().amax(-1).argmax()
    of_coordinate = float_[token]
    of_token = float_ @ of_coordinate / of_coordinate.square().sum()
    error = (of_token[:, None] * of_coordinate - float_) * written.flatten(0, -2)
    scale = added.abs().max()
    if not error.abs().max() <= 256 * torch.finfo(added.dtype).eps * scale:
        raise StreamError(
            f"{place}: between the sublayer and the stream lies more than a multiplier or an "
            "RMSNorm, so that its heads or neurons have no shares of what is added; ask for "
            "attn_out and mlp_out, which are right."
        )
    return factor
