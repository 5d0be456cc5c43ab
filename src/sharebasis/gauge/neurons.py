"""Which gauge element brings the neurons of one MLP nearest to those of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sharebasis.gauge.procrustes import best_matching, best_rotation
from sharebasis.gauge.units import Mlp, NeuronOrder, NeuronRotation
from sharebasis.runtime.matmul import linear

Scales = Literal["any", "signs", "none"]


def align_neurons(a: Mlp, b: Mlp, scales: Scales, emphasis: Mapping[str, float]) -> NeuronOrder:
    """The order that brings `a` nearest to `b`: least Σ_f w_f ‖g a_f − b_f‖² of gate, up, down.

    Args:
        a: of the same shapes as `b`.
        b: stays as it is.
        scales: what up of a neuron may be multiplied by, and down divided. any: by what gives
            them the ratio of norms that those of the neuron in `b` have, or its negative;
            signs: by -1; none: by nothing.
        emphasis: family -> w_f.
    """
    up, down = _products(a, b, "up", emphasis), _products(a, b, "down", emphasis)
    if scales == "any":
        rows, columns = _ratio(a).rsqrt(), _ratio(b).sqrt()
        norms = _norm(a.up) * _norm(a.down)  # of up and of down, if they had the same
        length = _root_ratio(norms.sum(), a.up.norm() * a.down.norm())
        up.mul_(rows[:, None] / length).mul_(columns)
        down.div_(rows[:, None] * length).div_(columns)
    signed = up.add_(down)
    scores = signed.abs() if scales != "none" else signed.clone()
    if scales == "any":  # then matchings differ in the norms of what is scaled, too
        norms = norms / length**2
        scores.addr_(norms, emphasis["up"] * columns**2, alpha=-0.5)
        scores.addr_(norms, emphasis["down"] / columns**2, alpha=-0.5)
    if a.gate is not None:
        scores.add_(_products(a, b, "gate", emphasis))
    order = best_matching(scores)
    factors = torch.ones_like(signed[0])
    if scales != "none":
        factors[signed[order, torch.arange(len(order), device=order.device)] < 0] = -1
    if scales == "any":
        factors *= rows[order] * columns
    return NeuronOrder(order, factors)


def _ratio(unit: Mlp) -> Float[Tensor, " d_mlp"]:
    """The norm of up over that of down, for each neuron; 1 where one of them is nothing."""
    up, down = _norm(unit.up), _norm(unit.down)
    return torch.where((up > 0) & (down > 0), up / down, 1)


def _root_ratio(x: Tensor, y: Tensor) -> float:
    """√(x / y); 1 where one of them is nothing."""
    return float((x / y).sqrt()) if x > 0 and y > 0 else 1.0


def _norm(weight: Float[Tensor, "d_mlp d_model"]) -> Float[Tensor, " d_mlp"]:
    return weight.norm(dim=1)


def align_neurons_tied(a: Mlp, b: Mlp, emphasis: Mapping[str, float]) -> NeuronRotation:
    """One dense rotation of all neurons; no symmetry of any model with a non-linearity.

    Args: as of `align_neurons`.
    """
    products = sum(_products(a, b, name, emphasis) for name in a.families)
    assert isinstance(products, Tensor)
    return NeuronRotation(best_rotation(products))


def _products(
    a: Mlp, b: Mlp, name: str, emphasis: Mapping[str, float]
) -> Float[Tensor, "d_mlp d_mlp"]:
    return linear(a.families[name], b.families[name]).mul_(emphasis[name])
