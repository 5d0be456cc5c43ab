"""Muon for some hundreds of matrices, on as many cores as there are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sharebasis.runtime.threads import in_parallel

# Allocated ranks make nearly every matrix one of a kind, and oneDNN compiles a kernel for every
# shape of every product. By default it keeps 1,024 of them and drops the one used longest ago,
# which, with more than that in every step, is always the one that is needed next. A kernel takes
# some 50 kB; the variable is read when the first one is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


MOMENTUM = 0.95
"""The fraction of it that a step keeps."""

TURNS = 8
"""Matrices take turns: each is updated in one of so many steps, by what its gradients add up to. On
two cores, updating all of them in every step would take a quarter of the time of a training."""


class Muon:
    """Momentum whose singular values are all brought near to 1 (Newton-Schulz), by the matrix.

    That is `torch.optim.Muon` without weight decay and with steps as long as AdamW's, but
    matrices take turns, and those whose turn it is are updated side by side, one core each: a
    matrix of some hundred rows gains little from several.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the length of the step is
    that of Liu et al. 2025 (arXiv 2502.16982).
    """

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        kept: Mapping[nn.Parameter, Tensor] | None = None,
        turns: int = TURNS,
    ) -> None:
        """Args:
        matrices: of one device.
        kept: masks of some of them; other entries stay zero.
        turns: in every one of so many steps, a matrix is updated; fewer if there are fewer
            matrices.
        """
        workers = torch.get_num_threads() if matrices[0].device.type == "cpu" else 1
        by_turn = _dealt(matrices, turns)
        momentum = MOMENTUM ** len(by_turn)
        self._kept = kept or {}
        self._turns = [
            [_muon(share, momentum) for share in _dealt(of_turn, workers)] for of_turn in by_turn
        ]
        self._of = {
            matrix: optimizer
            for turn in self._turns
            for optimizer in turn
            for matrix in _matrices(optimizer)
        }

    def step(self, number: int, learning_rate: float) -> None:
        """Update every matrix whose turn it is by its gradient, which is dropped; those of the
        others stay, for later ones to be added.

        Args:
            number: of the step, from 0.
            learning_rate: of one step; an update is as long as the steps since the last one.
        """
        turn = self._turns[number % len(self._turns)]
        for optimizer in turn:
            optimizer.param_groups[0]["lr"] = learning_rate * len(self._turns)
        steps = [partial(self._update, optimizer) for optimizer in turn]
        for _ in in_parallel(steps, len(steps)):
            pass

    @torch.no_grad()
    def _update(self, optimizer: torch.optim.Muon) -> None:
        masks = {
            matrix: self._kept[matrix] for matrix in _matrices(optimizer) if matrix in self._kept
        }
        for matrix, mask in masks.items():
            if matrix.grad is not None:
                matrix.grad.mul_(mask)
        optimizer.step()
        for matrix, mask in masks.items():
            matrix.mul_(mask)
        optimizer.zero_grad(set_to_none=True)

    def momentum(self, matrix: nn.Parameter) -> Tensor:
        """The momentum of a matrix, in its shape; zeros before its first turn."""
        momentum: Tensor | None = self._of[matrix].state[matrix].get("momentum_buffer")
        return torch.zeros_like(matrix) if momentum is None else momentum

    def restore(self, matrix: nn.Parameter, momentum: Tensor) -> None:
        """Go on from an earlier momentum."""
        self._of[matrix].state[matrix] = {"momentum_buffer": momentum.to(matrix.device)}


def _muon(matrices: Sequence[nn.Parameter], momentum: float) -> torch.optim.Muon:
    return torch.optim.Muon(
        matrices, weight_decay=0.0, momentum=momentum, adjust_lr_fn="match_rms_adamw"
    )


def _matrices(optimizer: torch.optim.Muon) -> Sequence[nn.Parameter]:
    matrices: Sequence[nn.Parameter] = optimizer.param_groups[0]["params"]
    return matrices


def _dealt(matrices: Sequence[nn.Parameter], n: int) -> list[list[nn.Parameter]]:
    """Shares that take about as long as each other, n at most."""
    shares: list[list[nn.Parameter]] = [[] for _ in range(min(n, len(matrices)))]
    loads = [0] * len(shares)
    for matrix in sorted(matrices, key=_cost, reverse=True):
        lightest = loads.index(min(loads))
        shares[lightest].append(matrix)
        loads[lightest] += _cost(matrix)
    return shares


def _cost(matrix: Tensor) -> int:
    """Of an iteration, in multiply-adds: two products with the matrix and one with its Gram."""
    small, large = sorted(matrix.shape)
    return small * small * (2 * large + small)
