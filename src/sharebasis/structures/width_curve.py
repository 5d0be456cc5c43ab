"""What an MLP loses at every number of neurons, and what its sublayers are then."""

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
    """What the neurons that went take along, by width."""
    energies: tuple[tuple[NDArray[np.float64], ...], ...]
    """By width and part: what each direction saves, the largest first."""

    def weighed(self, weights: Sequence[float]) -> WidthCurve:
        """With losses of every part times a weight; what went with the neurons is down's."""
        losses = tuple(weights[-1] * loss for loss in self.losses)
        energies = (
            tuple(weight * own for weight, own in zip(weights, of_parts, strict=True))
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
    every = torch.arange(mlp.d_mlp, device=down.weight.device)
    order.append(_without(every, pruned[0].kept))
    of_parts = [
        _read_energies(part, read, [one.kept for one in pruned])
        for part, read in zip(mlp.reads, reads, strict=True)
    ]
    of_parts.append([one.energies for one in pruned])
    energies = tuple(
        tuple(own.cpu().numpy() for own in of_width) for of_width in zip(*of_parts, strict=True)
    )
    return WidthCurve(torch.cat(order), tuple(one.loss for one in pruned), energies)


def _read_energies(part: Part, read: Problem, every: Sequence[Tensor]) -> list[Tensor]:
    """What the directions of a read save with its rows for some neurons, for each choice of them.

    With S S = C they are the eigenvalues of S W_Sᵀ G[S, S] W_S S, which is as wide as the input.
    """
    whitened = read.weight if read.inputs is None else read.weight @ whitening(read.inputs)[0]
    second, found = None if read.gradients is None else read.gradients.second, []
    for kept in every:
        rows = _rows_of(part, kept)
        own = whitened[rows]
        weighed = own if second is None else second[rows][:, rows] @ own
        found.append(spectrum(own.T @ weighed, min(own.shape)))
    return found


def pruned_problems(
    mlp: Mlp, problems: Sequence[Problem], kept: Int64[Tensor, " kept"]
) -> Sequence[Problem]:
    """The parts of an MLP with some of its neurons; down makes up for the others."""
    *reads, down = problems
    weight = refit(down, kept)
    pruned = (_rows(part, own, kept) for part, own in zip(mlp.reads, reads, strict=True))
    return [*pruned, _columns(down, kept, weight)]


def _without(some: Tensor, others: Tensor) -> Tensor:
    return some[~torch.isin(some, others)]


def _rows_of(part: Part, kept: Tensor) -> Tensor:
    """Those of a read that some neurons have."""
    return rows_at(kept, part.gate_up) if part.gate_up else kept


def _rows(part: Part, read: Problem, kept: Tensor) -> Problem:
    rows = _rows_of(part, kept)
    gradients = None if read.gradients is None else read.gradients.at(rows)
    return Problem(read.weight[rows], read.inputs, gradients)


def _columns(down: Problem, kept: Tensor, weight: Tensor) -> Problem:
    return Problem(weight, down.input_moment.at(kept), down.gradients)
