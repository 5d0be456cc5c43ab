"""What an MLP loses at every width, and what its sublayers are when pruned to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from sharebasis.architecture.parts import Part
from sharebasis.linalg.gram import spectrum
from sharebasis.linalg.moments import whitening
from sharebasis.linalg.neuron_pruning import prune, refit
from sharebasis.linalg.objective import Problem
from sharebasis.linalg.rows import rows_at
from sharebasis.structures.mlps import Mlp


@dataclass(frozen=True, slots=True)
class WidthCurve:
    """What an MLP loses at each of its widths."""

    neurons: Int64[Tensor, " d_mlp"]
    """At every width, the first so many of these stay."""
    losses: tuple[float, ...]
    """What pruning loses, by width."""
    energies: tuple[tuple[NDArray[np.float64], ...], ...]
    """By width and part: what each direction saves, the largest first."""

    def weighed(self, weights: Sequence[float]) -> WidthCurve:
        """With losses of every part times a weight; what pruning loses is down's."""
        losses = tuple(weights[-1] * loss for loss in self.losses)
        energies = (
            tuple(weight * of_part for weight, of_part in zip(weights, of_parts, strict=True))
            for of_parts in self.energies
        )
        return WidthCurve(self.neurons, losses, tuple(energies))


def measure(mlp: Mlp, problems: Sequence[Problem]) -> WidthCurve:
    """Work out what is lost at every width and rank.

    Args:
        mlp: whose neurons may go.
        problems: its parts' weights, and moments of what they read and put out.
    """
    *reads, down = problems
    pruned = list(prune(down, mlp.widths))
    order = [pruned[-1].kept]
    for larger, smaller in zip(pruned[-2::-1], pruned[:0:-1], strict=True):
        order.append(_without(larger.kept, smaller.kept))
    neurons = torch.arange(mlp.d_mlp, device=down.weight.device)
    order.append(_without(neurons, pruned[0].kept))
    of_parts = [
        _read_energies(part, read, [at_width.kept for at_width in pruned])
        for part, read in zip(mlp.reads, reads, strict=True)
    ]
    of_parts.append([at_width.energies for at_width in pruned])
    energies = tuple(
        tuple(of_part.cpu().numpy() for of_part in of_width)
        for of_width in zip(*of_parts, strict=True)
    )
    return WidthCurve(torch.cat(order), tuple(at_width.loss for at_width in pruned), energies)


def _read_energies(part: Part, read: Problem, kept_at: Sequence[Tensor]) -> list[Tensor]:
    """What the directions of a read save with its rows for some neurons, for each choice of them.

    With S S = C they are the eigenvalues of S W_Sᵀ G[S, S] W_S S, which is as wide as the input.
    """
    whitened = read.weight if read.inputs is None else read.weight @ whitening(read.inputs)[0]
    second = None if read.gradients is None else read.gradients.second
    energies = []
    for kept in kept_at:
        rows = _rows_of(part, kept)
        of_kept = whitened[rows]
        weighed = of_kept if second is None else second[rows][:, rows] @ of_kept
        energies.append(spectrum(of_kept.T @ weighed, min(of_kept.shape)))
    return energies


def pruned_problems(
    mlp: Mlp, problems: Sequence[Problem], kept: Int64[Tensor, " kept"]
) -> Sequence[Problem]:
    """The parts of an MLP with some of its neurons; down makes up for the others."""
    *reads, down = problems
    weight = refit(down, kept)
    pruned = (_rows(part, read, kept) for part, read in zip(mlp.reads, reads, strict=True))
    return [*pruned, _columns(down, kept, weight)]


def _without(neurons: Tensor, others: Tensor) -> Tensor:
    return neurons[~torch.isin(neurons, others)]


def _rows_of(part: Part, kept: Tensor) -> Tensor:
    """Those of a read that some neurons have."""
    return rows_at(kept, part.gate_up) if part.gate_up else kept


def _rows(part: Part, read: Problem, kept: Tensor) -> Problem:
    rows = _rows_of(part, kept)
    gradients = None if read.gradients is None else read.gradients.at(rows)
    return Problem(read.weight[rows], read.inputs, gradients)


def _columns(down: Problem, kept: Tensor, weight: Tensor) -> Problem:
    return Problem(weight, down.input_moment.at(kept), down.gradients)
