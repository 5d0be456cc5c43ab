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

TRIED_WIDTHS = (3, 5)
"""Neurons to try it with; a width that the code insists on is at most one of them."""
CHANGE, CHANGED = 0.25, 1e-4
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
    return all(_are_apart(module, read, down, d_model, gate_up, n) for n in TRIED_WIDTHS)


def _are_apart(
    module: nn.Module, read: str, down: str, d_model: int, gate_up: Sequence[Rows], n: int
) -> bool:
    n_rows = len(gate_up) * n
    projections = [rows.resized(sum(map(len, gate_up)), n_rows) for rows in gate_up]
    changes = torch.cat([torch.zeros(1, n_rows), CHANGE * torch.eye(n_rows)])
    read_stub = _Stub((torch.linspace(0.5, 1.5, n_rows) + changes)[None])
    down_stub = _Stub(torch.zeros(1, n_rows + 1, d_model))
    small = copy.copy(module)
    small._modules = {**module._modules, read: read_stub, down: down_stub}
    try:
        small(torch.zeros(1, n_rows + 1, d_model))
    except Exception:  # of the model's own code, of any kind
        return False
    neurons = down_stub.inputs
    if neurons is None or neurons.shape != (1, n_rows + 1, n) or neurons.is_meta:
        return False
    first, *others = neurons[0]
    changed = (torch.stack(others) - first).abs() > CHANGED
    expected = torch.zeros(n_rows, n, dtype=torch.bool)
    for rows in projections:
        expected[rows.numbers, torch.arange(n)] = True
    return torch.equal(changed, expected)


class _Stub(nn.Module):
    """In the place of a sublayer: returns what it was told to, and keeps what it is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.inputs: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = x
        return self.output
