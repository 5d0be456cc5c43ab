"""An original in the gauge of its compressed model, so that what they are given can be compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharebasis.compressed.index import CompressedIndex
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.value_gauge import turned_output, turned_values, values_at
from sharebasis.model.surgery import weight_of


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
        values, outputs = (original.get_submodule(name) for name in (part.sublayer, own.output))
        rows = part.rows.numbers.to(weight_of(values).device)
        turn = values_at(weight_of(values)[rows], reader.read(part.pivots))
        added = [values.bias] if isinstance(values.bias, Tensor) else []
        for every in (weight_of(values), *added):
            every[rows] = turned_values(every[rows], turn).to(every)
        weight_of(outputs).copy_(turned_output(weight_of(outputs), turn))
