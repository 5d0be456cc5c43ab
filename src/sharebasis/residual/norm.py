"""The residual stream as a sum: norms made linear, and components seen along directions.

A pre-norm transformer's stream is the sum of what was added to it. Its last norm is linear once
its scale is held fixed,

    norm(x) = w ⊙ C x / σ(x) + b,    C x = x - mean(x) (LayerNorm) or x (RMSNorm),

and so are the logits: what a component y adds to the logit of token v is
⟨W_U[:, v], w ⊙ C y / σ⟩ = ⟨C (w ⊙ W_U[:, v]), y⟩ / σ. The right-hand side needs one product for a
direction instead of one for a component.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """A LayerNorm or RMSNorm, by what it does."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    """Whether the mean is taken off: LayerNorm."""

    def scale(
        self, x: Float[Tensor, "*batch d_model"], y: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch 1"]:
        """σ(x), from what goes into the norm and what comes out.

        It is the least-squares fit of w ⊙ C x to y - b, so that no epsilon has to be known;
        in float32 where the tensors are narrower.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        numerator = self.weight.to(wide) * self.centre(x.to(wide))
        along = (numerator * (y.to(wide) - self.bias.to(wide))).sum(-1, keepdim=True)
        return numerator.square().sum(-1, keepdim=True) / along

    def linear(
        self, x: Float[Tensor, "*stack d_model"], scale: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*stack d_model"]:
        """What components contribute to the norm's output, its bias left out: w ⊙ C x / σ."""
        return self.weight * self.centre(x) / scale

    def pull_back(
        self, directions: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Directions after the norm -> directions before it, σ left out: C (w ⊙ u)."""
        return self.centre(self.weight * directions)

    def to(self, device: torch.device | str) -> Norm:
        return Norm(self.weight.to(device), self.bias.to(device), self.centred)

    def centre(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """C x."""
        return x - x.mean(-1, keepdim=True) if self.centred else x


def head_results(
    z: Float[Tensor, "*batch n_heads d_head"],
    w_o: Float[Tensor, "n_heads d_head d_model"],
    factor: Float[Tensor, "*batch d_model"] | None = None,
) -> Float[Tensor, "n_heads *batch d_model"]:
    """What every head adds to the stream.

    Args:
        z: the mixed values.
        w_o: output weights.
        factor: by which the layer's output is multiplied on its way to the stream; None: 1.
    """
    results = torch.einsum("...hd,hdm->h...m", z, w_o)
    return results if factor is None else results * factor


def neuron_results(
    post: Float[Tensor, "*batch d_mlp"],
    w_out: Float[Tensor, "d_mlp d_model"],
    factor: Float[Tensor, "*batch d_model"] | None = None,
    onto: Float[Tensor, "d_model n"] | None = None,
) -> Float[Tensor, "d_mlp *batch _"]:
    """What every neuron adds to the stream, or what of it lies along some directions.

    Args:
        post: activations.
        w_out: output weights.
        factor: see `head_results`.
        onto: directions; with them no tensor of d_mlp times d_model numbers a token is made.

    Returns:
        Last dimension d_model, or n.
    """
    post = post.movedim(-1, 0).unsqueeze(-1)
    if onto is None:
        results = post * _beside(w_out, post.ndim)
        return results if factor is None else results * factor
    if factor is None:
        return post * _beside(w_out @ onto, post.ndim)
    return post * torch.tensordot(w_out, factor.unsqueeze(-1) * onto, ([1], [-2]))


def _beside(w: Float[Tensor, "d_mlp n"], ndim: int) -> Tensor:
    """One row for each neuron, whatever the token."""
    return w.view(len(w), *([1] * (ndim - 2)), w.shape[1])


def along_heads(
    z: Float[Tensor, "*batch n_heads d_head"],
    w_o: Float[Tensor, "n_heads d_head d_model"],
    directions: Float[Tensor, "n *batch d_model"],
    factor: Float[Tensor, "*batch d_model"] | None = None,
) -> Float[Tensor, "n *batch n_heads"]:
    """⟨u, what the head adds⟩ for every head, token and direction u of that token.

    Equal to `head_results` projected, but without a tensor of n_heads times d_model numbers a
    token: the directions go through W_O, not the activations.
    """
    if factor is not None:
        directions = directions * factor
    through_w_o = directions @ w_o.flatten(0, 1).T
    return (through_w_o.unflatten(-1, z.shape[-2:]) * z).sum(-1)


def along(
    component: Float[Tensor, "*batch d_model"], directions: Float[Tensor, "n *batch d_model"]
) -> Float[Tensor, "n ..."]:
    """⟨u, component⟩ for every token and direction u of that token."""
    return torch.linalg.vecdot(directions, component)
