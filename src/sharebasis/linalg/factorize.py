"""Weights and moments -> a shared basis and a coefficient for each weight, of every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sharebasis.errors import CalibrationError, RankError
from sharebasis.linalg.moments import Moment, whitening


@dataclass(frozen=True, slots=True)
class ReadFactors:
    """Ŵ_i = coefficient_i @ basis."""

    basis: Float64[Tensor, "rank d_in"]
    coefficients: tuple[Float64[Tensor, "_ rank"], ...]
    loss: float
    """Σ_i tr(G_i (W_i - Ŵ_i) C (W_i - Ŵ_i)ᵀ)."""
    energy: float
    """Σ_i tr(G_i W_i C W_iᵀ), what the loss would be at rank 0."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """Factors of every rank: those of rank k are the first k."""

    basis: Float64[Tensor, "full d_in"]
    coefficient: Float64[Tensor, "d_out full"]
    """Of the weights stacked."""
    energies: Float64[Tensor, " full"]
    """What each direction saves of the loss, the largest first."""

    @property
    def full_rank(self) -> int:
        return len(self.energies)


def fit_read_basis(
    weights: Sequence[Float[Tensor, "_ d_in"]],
    moment: Moment | None,
    rank: int,
    gradients: Sequence[Moment] | None = None,
) -> ReadFactors:
    """Fit one basis of a rank on the input side; `decompose_reads`, truncated.

    Raises:
        RankError: `rank` is not in [1, min(Σ d_out_i, d_in)].
        CalibrationError: a moment has another width, or no positive eigenvalue.
    """
    d_out, d_in = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    if not 1 <= rank <= min(d_out, d_in):
        raise RankError(
            f"rank {rank} is outside [1, {min(d_out, d_in)}]: "
            f"{len(weights)} weights stacked to ({d_out}, {d_in})."
        )
    every = decompose_reads(weights, moment, gradients)
    parts = torch.split(every.coefficient[:, :rank], [weight.shape[0] for weight in weights])
    return ReadFactors(
        basis=every.basis[:rank],
        coefficients=tuple(parts),
        loss=every.energies[rank:].sum().item(),
        energy=every.energies.sum().item(),
    )


def decompose_reads(
    weights: Sequence[Float[Tensor, "_ d_in"]],
    moment: Moment | None,
    gradients: Sequence[Moment] | None = None,
) -> Decomposition:
    """Fit one basis on the input side to `weights`, optimal at every rank.

    Minimises Σ_i tr(G_i (W_i - A_i B) C (W_i - A_i B)ᵀ) with C = E[x xᵀ] and G_i = E[g gᵀ] of
    the gradients of what weight i puts out (the second-order loss of K-FAC), or G_i = I. The
    directions are eigenvectors of a Gram matrix in float64, with S S = C and L L = G:

    - a single weight with d_out <= d_in: U of L W C Wᵀ L; A = L⁻¹ U, B = Uᵀ L W. Likewise for
      several whose d_out add up to no more than d_in, if G = I. Needs no root and no inverse
      of C, so a singular one is no special case.
    - else: V of S (Σ_i W_iᵀ G_i W_i) S; A_i = W_i S V, B = Vᵀ S⁻¹.

    The scale that A and B leave free is set so that each basis row is as long as its
    coefficient column, which is the safest for storage in low precision.

    Args:
        weights: (d_out_i, d_in) each; at full rank they are reproduced.
        moment: of the one input that every weight reads (a pool of them for several
            layers); None stands for the identity, plain SVD.
        gradients: of the outputs of each weight; None stands for the identity.

    Raises:
        CalibrationError: a moment has another width, or no positive eigenvalue.

    Source: SVD-LLM, arXiv:2403.07378 (one weight); Basis Sharing, arXiv:2410.03765 (a group);
        K-FAC, Martens and Grosse 2015 (the loss of two sides).
    """
    originals = [weight.to(torch.float64) for weight in weights]
    stacked = torch.cat(originals)
    d_out, d_in = stacked.shape
    _check(moment, d_in, "read inputs of")
    for weight, gradient in zip(originals, gradients or (), strict=False):
        _check(gradient, weight.shape[0], "put out outputs of")
    from_outputs = d_out <= d_in and (gradients is None or len(weights) == 1)
    if from_outputs:
        every = _from_outputs(stacked, moment, gradients[0] if gradients else None)
    else:
        every = _from_inputs(stacked, _gram(originals, gradients), moment)
    coefficient, basis, energies = every
    scale = (basis.norm(dim=1) / coefficient.norm(dim=0)).sqrt()
    # A direction that carries nothing has length zero on one side; any scale serves it.
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    return Decomposition(
        basis=(basis / scale[:, None]).flip(0),
        coefficient=(coefficient * scale).flip(1),
        energies=energies.clamp_min(0).flip(0),
    )


def balance(
    coefficient: Float64[Tensor, "d_out rank"], basis: Float64[Tensor, "rank d_in"]
) -> tuple[Float64[Tensor, "d_out rank"], Float64[Tensor, "rank d_in"]]:
    """Other factors of the same product: U √Σ and √Σ Vᵀ of its SVD.

    No choice of factors has a smaller ‖A‖² + ‖B‖², and a step of gradient descent moves both
    by as much.
    """
    left, right = torch.linalg.qr(coefficient), torch.linalg.qr(basis.T)
    u, values, vt = torch.linalg.svd(left.R @ right.R.T)
    root = values.sqrt()
    return left.Q @ (u * root), (root[:, None] * vt) @ right.Q.T


def _check(moment: Moment | None, width: int, do: str) -> None:
    if moment is None:
        return
    if moment.sum.shape[0] != width:
        raise CalibrationError(
            f"The moment of {moment.site} is {moment.sum.shape[0]} wide, but the weights {do} "
            f"width {width}."
        )
    if not moment.total.trace() > 0:
        raise CalibrationError(f"The moment of {moment.site} has no positive eigenvalue.")


def _gram(weights: Sequence[Tensor], gradients: Sequence[Moment] | None) -> Tensor:
    """Σ_i W_iᵀ G_i W_i."""
    if gradients is None:
        stacked = torch.cat(list(weights))
        return stacked.T @ stacked
    pairs = zip(weights, gradients, strict=True)
    return torch.stack([weight.T @ gradient.second @ weight for weight, gradient in pairs]).sum(0)


def _from_outputs(
    weight: Tensor, moment: Moment | None, gradient: Moment | None
) -> tuple[Tensor, Tensor, Tensor]:
    """By the second moment of the outputs; (coefficient, basis, eigenvalues ascending)."""
    root, inverse = (None, None) if gradient is None else whitening(gradient)
    scaled = weight if root is None else root @ weight
    metric = (scaled if moment is None else scaled @ moment.second) @ scaled.T
    eigenvalues, vectors = torch.linalg.eigh(metric)
    coefficient = vectors if inverse is None else inverse @ vectors
    return coefficient, vectors.T @ scaled, eigenvalues


def _from_inputs(
    stacked: Tensor, gram: Tensor, moment: Moment | None
) -> tuple[Tensor, Tensor, Tensor]:
    """By the whitened weights; (coefficient, basis, eigenvalues ascending)."""
    full = min(stacked.shape)
    if moment is None:
        eigenvalues, vectors = torch.linalg.eigh(gram)
        top = vectors[:, -full:]
        return stacked @ top, top.T, eigenvalues[-full:]
    root, inverse = whitening(moment)
    eigenvalues, vectors = torch.linalg.eigh(root @ gram @ root)
    top = vectors[:, -full:]
    return stacked @ (root @ top), top.T @ inverse, eigenvalues[-full:]
