"""Whether the neurons of an MLP have nothing to do with each other, by its own forward pass.

Where gate and up are one weight, nothing but the module's code knows which rows of it are a
neuron's, and whether there may be fewer of them. So it is asked: with what both sublayers say made
up, and few neurons, one row after the other is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sharebasis.linalg.rows import Rows

SIZES = (3, 5)
"""Neurons to try it with; a width that the code insists on is at most one of them."""


CHANGE, LEAST = 0.25, 1e-4
"""Of a row, and of a neuron that heard of it; between 0.5 and 1.5, all activations are steep."""


def neurons_are_apart(
    module: nn.Module, read: str, down: str, d_model: int, gate_up: Sequence[Rows]
) -> bool:
    """Whether neuron i is made of row i of gate and of row i of up alone, however many there are.

    Args:
        module: the MLP, which need not have any memory; it is not changed.
        read: its child that is gate and up.
        down: its child that neurons are given to.
        d_model: width of what `module` is given.
        gate_up: the rows of gate and of up.
    """
    return all(_are_apart(module, read, down, d_model, gate_up, n) for n in SIZES)


def _are_apart(
    module: nn.Module, read: str, down: str, d_model: int, gate_up: Sequence[Rows], n: int
) -> bool:
    n_rows = len(gate_up) * n
    blocks = [own.resized(sum(map(len, gate_up)), n_rows) for own in gate_up]
    changes = torch.cat([torch.zeros(1, n_rows), CHANGE * torch.eye(n_rows)])
    says = _Stand((torch.linspace(0.5, 1.5, n_rows) + changes)[None])
    hears = _Stand(torch.zeros(1, n_rows + 1, d_model))
    small = copy.copy(module)
    small._modules = {**module._modules, read: says, down: hears}
    try:
        small(torch.zeros(1, n_rows + 1, d_model))
    except Exception:  # of the model's own code, of any kind
        return False
    if hears.heard is None or hears.heard.shape != (1, n_rows + 1, n) or hears.heard.is_meta:
        return False
    first, *others = hears.heard[0]
    changed = (torch.stack(others) - first).abs() > LEAST
    wanted = torch.zeros(n_rows, n, dtype=torch.bool)
    for block in blocks:
        wanted[block.numbers, torch.arange(n)] = True
    return torch.equal(changed, wanted)


class _Stand(nn.Module):
    """In the place of a sublayer: says what it was told to, and keeps what it is given."""

    def __init__(self, says: Tensor) -> None:
        super().__init__()
        self.says = says
        self.heard: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.heard = x
        return self.says
