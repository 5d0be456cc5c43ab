"""Fewer neurons in an MLP: which ones stay, and who takes over what the others did.

What an MLP writes, y = W h, is linear in its neurons h = act(gate(x)) ⊙ up(x) (or act(up(x))), and
neurons are correlated. Without some of them, y is predicted best by the regression on the others,

    Ŵ = W C[:, S] C[S, S]⁻¹,    loss = tr(G (W C Wᵀ − Ŵ C[S, S] Ŵᵀ)),

with C = E[h hᵀ], G = E[g gᵀ] of the gradients of y, and S the neurons that stay. A neuron that goes
takes a row of gate, a row of up and a column of down with it; nothing about the others changes but
their columns of down.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sharebasis.linalg.gram import cholesky, spectrum
from sharebasis.linalg.moments import RIDGE, whitening
from sharebasis.linalg.objective import Problem

N_BLOCKS = 48
"""Neurons go in about so many blocks, as products of blocks are what makes this fast."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What some of the neurons can do."""

    kept: Int64[Tensor, " kept"]
    """The neurons that stay, ascending."""
    energies: Float64[Tensor, " full"]
    """What each direction of Ŵ saves of the loss, the largest first."""
    loss: float
    """tr(G E[(y − Ŵ h_S)(y − Ŵ h_S)ᵀ]), with or without G."""


def prune(problem: Problem, widths: Collection[int]) -> Iterator[Pruned]:
    """Let neurons go, those first that are missed least, and yield what is left at some widths.

    Backward elimination in blocks. With P = C[S, S]⁻¹ and Ŵ = W C[:, S] P, letting the neurons J
    of S go costs tr(G Ŵ_J P[J, J]⁻¹ Ŵ_Jᵀ), exactly; a block is those that would cost the least one
    by one. What stays at one width is part of what stays at a larger one. `refit` makes Ŵ.

    Args:
        problem: of down, whose inputs are the neurons.
        widths: neurons to stay, each in [1, d_mlp]; yielded from the largest down.

    Raises:
        CalibrationError: a moment has no positive eigenvalue.

    Source: the regression is that of interpolative decompositions of activations (Chee et al.,
        arXiv:2108.00065) and of MoDeGPT's Nyström step (arXiv:2408.09632); elimination by the
        inverse is Optimal Brain Surgeon's (Hassibi and Stork 1993).
    """
    weight, gradients = problem.weight, problem.gradients
    second = problem.input_moment.damped(RIDGE).second
    scaled = weight if gradients is None else whitening(gradients)[0] @ weight
    target = scaled @ second
    energy = (target * scaled).sum().item()
    kept = torch.arange(len(second), device=weight.device)
    block = max(1, len(kept) // N_BLOCKS)
    factor = cholesky(second)
    for width in sorted(widths, reverse=True):
        kept = _eliminate(scaled, factor, kept, width, block)
        # Anew for every width: in a nearly singular C, what updates leave of the inverse is noise.
        factor = cholesky(second[kept][:, kept])
        scaled = torch.cholesky_solve(target[:, kept].T, factor).T
        saved = scaled @ target[:, kept].T
        loss = max(0.0, energy - saved.trace().item())
        yield Pruned(kept, spectrum(saved, width), loss)


def refit(problem: Problem, kept: Int64[Tensor, " kept"]) -> Float64[Tensor, "d_model kept"]:
    """The weight of down that does best with some of the neurons: W C[:, S] C[S, S]⁻¹."""
    second = problem.input_moment.damped(RIDGE).second
    products = second[kept] @ problem.weight.T
    return torch.cholesky_solve(products, cholesky(second[kept][:, kept])).T


def _eliminate(scaled: Tensor, factor: Tensor, kept: Tensor, width: int, block: int) -> Tensor:
    """`width` of the neurons `kept`, at most so many at once gone.

    Args:
        scaled: the root of G times Ŵ, for `kept`.
        factor: lower triangular, of C[S, S].
    """
    precision = torch.cholesky_inverse(factor)
    while len(kept) > width:
        n = min(block, len(kept) - width)
        gone = ((scaled**2).sum(0) / precision.diagonal()).argsort()[:n]
        stays = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        stays[gone] = False
        columns = precision[:, gone]
        transfer = torch.linalg.solve(columns[gone], columns.T)[:, stays]
        scaled = scaled[:, stays] - scaled[:, gone] @ transfer
        precision = precision[stays][:, stays] - columns[stays] @ transfer
        kept = kept[stays]
    return kept
