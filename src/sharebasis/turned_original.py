"""An original in the gauge of its compressed model, so that what they are given can be compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sharebasis.compressed_index import CompressedIndex
from sharebasis.tensor_store import TensorReader
from sharebasis.value_gauge import turned_output, values_at


@torch.no_grad()
def turn_original(original: nn.Module, index: CompressedIndex, reader: TensorReader) -> None:
    """Put an original into the gauge of its compressed model; it computes what it did.

    Args:
        original: dense, changed in place.
        index: of the compressed model.
        reader: of its tensors.
    """
    for own in index.values:
        part = index.part(own.value)
        assert part.pivots is not None
        value, output = original.get_submodule(part.sublayer), original.get_submodule(own.output)
        rows = part.rows.numbers.to(_weight(value).device)
        weight = _weight(value)[rows].double()
        turn = values_at(weight, reader.read(part.pivots))
        heads = torch.linalg.solve(turn, weight.unflatten(0, turn.shape[:2]))
        _weight(value)[rows] = heads.flatten(0, 1).to(_weight(value))
        if isinstance(value.bias, Tensor):
            bias = value.bias[rows].double().view(*turn.shape[:2], 1)
            value.bias[rows] = torch.linalg.solve(turn, bias).flatten().to(value.bias)
        _weight(output).copy_(turned_output(_weight(output), turn))


def _weight(module: nn.Module) -> Tensor:
    """(d_out, d_in), a view."""
    assert isinstance(module, nn.Linear | Conv1D)
    return module.weight.T if isinstance(module, Conv1D) else module.weight
