"""Weights that read one input -> a shared basis and a coefficient for each, of every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from sharebasis.errors import CalibrationError
from sharebasis.linalg.moments import Moment, whitening
from sharebasis.linalg.objective import Problem


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Factors of every rank: those of rank k are the first k."""

    basis: Float64[Tensor, "full d_in"]
    coefficient: Float64[Tensor, "d_out full"]
    """Of the weights stacked."""
    energies: Float64[Tensor, " full"]
    """What each direction saves of the loss, the largest first."""

    def truncated(
        self, rank: int
    ) -> tuple[Float64[Tensor, "rank d_in"], Float64[Tensor, "d_out rank"]]:
        """(basis, coefficient) of a rank."""
        return self.basis[:rank], self.coefficient[:, :rank]


def decompose(problems: Sequence[Problem]) -> Spectrum:
    """Fit one basis on the input side to weights that read one input, optimal at every rank.

    Minimises Σ_i tr(G_i (W_i - A_i B) C (W_i - A_i B)ᵀ). The directions are eigenvectors of a
    Gram matrix in float64, with S S = C and L L = G:

    - a single weight with d_out <= d_in: U of L W C Wᵀ L; A = L⁻¹ U, B = Uᵀ L W. Likewise for
      several whose d_out add up to no more than d_in, if G = I. Needs no root and no inverse
      of C, so a singular one is no special case.
    - else: V of S (Σ_i W_iᵀ G_i W_i) S; A_i = W_i S V, B = Vᵀ S⁻¹.

    Each basis row is as long as its coefficient column.

    Args:
        problems: whose `inputs` are one object, the moment of what all weights read (a pool of
            moments for several layers). At full rank the weights are reproduced.

    Raises:
        CalibrationError: a moment has another width, or no positive eigenvalue.

    Source: SVD-LLM, arXiv:2403.07378 (one weight); Basis Sharing, arXiv:2410.03765 (a group);
        K-FAC, Martens and Grosse 2015 (the loss of two sides).
    """
    inputs = problems[0].inputs
    assert all(problem.inputs is inputs for problem in problems)
    stacked = torch.cat([problem.weight for problem in problems])
    d_out, d_in = stacked.shape
    _check(inputs, d_in, "read inputs of")
    for problem in problems:
        _check(problem.gradients, len(problem.weight), "put out outputs of")
    one_sided = all(problem.gradients is None for problem in problems)
    if d_out <= d_in and (one_sided or len(problems) == 1):
        coefficient, basis, energies = _from_outputs(stacked, inputs, problems[0].gradients)
    else:
        gram = stacked.T @ stacked if one_sided else _gram(problems)
        coefficient, basis, energies = _from_inputs(stacked, gram, inputs)
    scale = equalizing_scale(coefficient, basis)
    return Spectrum(
        basis=(basis / scale[:, None]).flip(0),
        coefficient=(coefficient * scale).flip(1),
        energies=energies.clamp_min(0).flip(0),
    )


def equalizing_scale(
    coefficient: Float64[Tensor, "d_out rank"], basis: Float64[Tensor, "rank d_in"]
) -> Float64[Tensor, " rank"]:
    """What makes each coefficient column as long as its basis row, by which that is divided.

    A and B leave a scale of every direction free; equal lengths are the safest for storage in low
    precision. A direction that carries nothing has length zero on one side; any scale serves it.
    """
    scale = (basis.norm(dim=1) / coefficient.norm(dim=0)).sqrt()
    return torch.where(scale.isfinite() & (scale > 0), scale, 1.0)


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


def _gram(problems: Sequence[Problem]) -> Tensor:
    """Σ_i W_iᵀ G_i W_i."""
    grams = []
    for problem in problems:
        weight, gradients = problem.weight, problem.gradients
        weighted = weight.T if gradients is None else weight.T @ gradients.second
        grams.append(weighted @ weight)
    return torch.stack(grams).sum(0)


def _from_outputs(
    weight: Tensor, inputs: Moment | None, gradients: Moment | None
) -> tuple[Tensor, Tensor, Tensor]:
    """By the second moment of the outputs; (coefficient, basis, eigenvalues ascending)."""
    root, inverse = (None, None) if gradients is None else whitening(gradients)
    scaled = weight if root is None else root @ weight
    gram = (scaled if inputs is None else scaled @ inputs.second) @ scaled.T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    coefficient = vectors if inverse is None else inverse @ vectors
    return coefficient, vectors.T @ scaled, eigenvalues


def _from_inputs(
    stacked: Tensor, gram: Tensor, inputs: Moment | None
) -> tuple[Tensor, Tensor, Tensor]:
    """By the whitened weights; (coefficient, basis, eigenvalues ascending)."""
    full_rank = min(stacked.shape)
    if inputs is None:
        eigenvalues, vectors = torch.linalg.eigh(gram)
        top = vectors[:, -full_rank:]
        return stacked @ top, top.T, eigenvalues[-full_rank:]
    root, inverse = whitening(inputs)
    eigenvalues, vectors = torch.linalg.eigh(root @ gram @ root)
    top = vectors[:, -full_rank:]
    return stacked @ (root @ top), top.T @ inverse, eigenvalues[-full_rank:]
