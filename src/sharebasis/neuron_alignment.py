"""Which gauge element brings the neurons of one MLP nearest to those of another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sharebasis.gauge import Mlp, NeuronOrder, NeuronRotation
from sharebasis.kernels import linear
from sharebasis.procrustes import best_matching, best_rotation


def align_neurons(a: Mlp, b: Mlp, signs: bool, emphasis: Mapping[str, float]) -> NeuronOrder:
    """The order that brings `a` nearest to `b`: least Σ_f w_f ‖g a_f − b_f‖² of gate, up, down.

    Args:
        a: of the same shapes as `b`.
        b: stays as it is.
        signs: whether up and down of a neuron may change their sign together; only beside a gate.
        emphasis: family -> w_f.
    """
    signed = _products(a, b, "up", emphasis).add_(_products(a, b, "down", emphasis))
    signs = signs and a.gate is not None
    scores = signed.abs() if signs else signed
    if a.gate is not None:
        scores = scores + _products(a, b, "gate", emphasis)
    order = best_matching(scores)
    places = torch.arange(len(order), device=order.device)
    flips = signs & (signed[order, places] < 0)
    return NeuronOrder(order, torch.where(flips, -1, 1).to(signed))


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
