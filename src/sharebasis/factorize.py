"""Weights and a moment -> a shared basis and a coefficient for each weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sharebasis.errors import CalibrationError, RankError
from sharebasis.moments import Moment, whitening


@dataclass(frozen=True, slots=True)
class ReadFactors:
    """Ŵ_i = coefficient_i @ basis."""

    basis: Float64[Tensor, "rank d_in"]
    coefficients: tuple[Float64[Tensor, "_ rank"], ...]
    loss: float
    """Σ_i ‖(W_i - Ŵ_i) S‖²_F, the expected squared error of the outputs a token."""
    energy: float
    """Σ_i ‖W_i S‖²_F, what the loss would be at rank 0."""


def fit_read_basis(
    weights: Sequence[Float[Tensor, "_ d_in"]], moment: Moment | None, rank: int
) -> ReadFactors:
    """Fit one basis on the input side to `weights`, optimal for inputs with this moment.

    Minimises Σ_i ‖(W_i - A_i B) S‖²_F with S S = E[x xᵀ] by truncating the SVD of the
    stacked W S; Eckart-Young makes that optimal among rank-`rank` fits. The singular
    vectors come from the Gram matrix of the smaller side, in float64:

    - Σ d_out <= d_in: U of W E[x xᵀ] Wᵀ; A = U, B = Uᵀ W. Needs no root and no inverse of
      the moment (Ŵ S = U Uᵀ W S is the truncated SVD), so a singular one is no special case.
    - else: V of S WᵀW S; A = W S V, B = Vᵀ S⁻¹.

    The scale that A and B leave free is set so that each basis row is as long as its
    coefficient column, which is the safest for storage in low precision.

    Args:
        weights: (d_out_i, d_in) each; at full rank they are reproduced.
        moment: of the one input that every weight reads (a pool of them for several
            layers); None stands for the identity, plain SVD.
        rank: rows of the basis, in [1, min(Σ d_out_i, d_in)].

    Raises:
        RankError: `rank` is out of range.
        CalibrationError: the moment has another width, or no positive eigenvalue.

    Source: SVD-LLM, arXiv:2403.07378 (one weight); Basis Sharing, arXiv:2410.03765 (a group).
    """
    stacked = torch.cat([weight.to(torch.float64) for weight in weights])
    d_out, d_in = stacked.shape
    if not 1 <= rank <= min(d_out, d_in):
        raise RankError(
            f"rank {rank} is outside [1, {min(d_out, d_in)}]: "
            f"{len(weights)} weights stacked to ({d_out}, {d_in})."
        )
    if moment is not None and moment.sum.shape[0] != d_in:
        raise CalibrationError(
            f"The moment of {moment.site} is {moment.sum.shape[0]} wide, but the weights read "
            f"inputs of width {d_in}."
        )
    if moment is not None and not moment.total.trace() > 0:
        raise CalibrationError(f"The moment of {moment.site} has no positive eigenvalue.")
    fit = _from_outputs if d_out <= d_in else _from_inputs
    coefficient, basis, eigenvalues = fit(stacked, moment, rank)
    scale = (basis.norm(dim=1) / coefficient.norm(dim=0)).sqrt()
    # A direction that carries nothing has length zero on one side; any scale serves it.
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    parts = torch.split(coefficient * scale, [weight.shape[0] for weight in weights])
    return ReadFactors(
        basis=basis / scale[:, None],
        coefficients=tuple(parts),
        loss=eigenvalues[:-rank].clamp_min(0).sum().item(),
        energy=eigenvalues.clamp_min(0).sum().item(),
    )


def _from_outputs(
    stacked: Tensor, moment: Moment | None, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """By the second moment of the outputs; (coefficient, basis, all eigenvalues ascending)."""
    metric = stacked if moment is None else stacked @ moment.second
    eigenvalues, vectors = torch.linalg.eigh(metric @ stacked.T)
    coefficient = vectors[:, -rank:]
    return coefficient, coefficient.T @ stacked, eigenvalues


def _from_inputs(
    stacked: Tensor, moment: Moment | None, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """By the whitened weights; (coefficient, basis, all eigenvalues ascending)."""
    gram = stacked.T @ stacked
    if moment is None:
        eigenvalues, vectors = torch.linalg.eigh(gram)
        basis = vectors[:, -rank:].T
        return stacked @ basis.T, basis, eigenvalues
    root, inverse = whitening(moment)
    eigenvalues, vectors = torch.linalg.eigh(root @ gram @ root)
    top = vectors[:, -rank:]
    return stacked @ (root @ top), top.T @ inverse, eigenvalues
