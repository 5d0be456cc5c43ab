"""Muon for some hundreds of matrices, on as many cores as there are."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sharebasis.parallel import in_parallel

# Allocated ranks make nearly every matrix one of a kind, and oneDNN compiles a kernel for every
# shape of every product. By default it keeps 1,024 of them and drops the one used longest ago,
# which, with more than that in every step, is always the one that is needed next. A kernel takes
# some 50 kB; the variable is read when the first one is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


class Muon:
    """Momentum whose singular values are all brought near to 1 (Newton-Schulz), by the matrix.

    That is `torch.optim.Muon` without weight decay and with steps as long as AdamW's, but
    matrices are updated side by side, one core each: a matrix of some hundred rows gains little
    from several.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the length of the step is
    that of Liu et al. 2025 (arXiv 2502.16982).
    """

    def __init__(self, matrices: Sequence[nn.Parameter]) -> None:
        """Args:
        matrices: of one device.
        """
        workers = torch.get_num_threads() if matrices[0].device.type == "cpu" else 1
        self._optimizers = [
            torch.optim.Muon(share, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            for share in _dealt(matrices, workers)
        ]
        self._of = {
            matrix: optimizer
            for optimizer in self._optimizers
            for matrix in optimizer.param_groups[0]["params"]
        }

    def step(self, learning_rate: float) -> None:
        """Update every matrix by its gradient, which is dropped."""
        for optimizer in self._optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate
        steps = [optimizer.step for optimizer in self._optimizers]
        for _ in in_parallel(steps, len(steps)):
            pass
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def momentum(self, matrix: nn.Parameter) -> Tensor:
        """What it has gathered for a matrix, in its shape; after the first step."""
        gathered: Tensor = self._of[matrix].state[matrix]["momentum_buffer"]
        return gathered

    def restore(self, matrix: nn.Parameter, momentum: Tensor) -> None:
        """Go on from what had been gathered."""
        self._of[matrix].state[matrix] = {"momentum_buffer": momentum.to(matrix.device)}


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
