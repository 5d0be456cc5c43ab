"""Which positions or sequences: TransformerLens's way of saying it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharebasis.errors import StreamError

Slice = Any
"""None: all, as they are; an int: that one, without the dimension; a tuple: a slice of its numbers,
(1, 5) is 1:5; a list, array or tensor: those of these numbers, or of a mask; a slice; or a `Slice`
of TransformerLens."""

Index = int | slice | Tensor
"""What a tensor takes in one dimension."""


def index_of(which: Slice) -> Index:
    """What to index a dimension with.

    Raises:
        StreamError: this is no slice.
    """
    if hasattr(which, "slice") and hasattr(which, "mode"):  # of TransformerLens
        which = which.slice
    if isinstance(which, tuple):
        return slice(*which)
    if isinstance(which, slice):
        return which
    if which is None:
        return slice(None)
    if isinstance(which, int | list | Tensor | np.ndarray | np.integer):
        indices = torch.as_tensor(which)
        if indices.ndim == 1 and not indices.is_floating_point():
            return indices
        if indices.ndim == 0 and indices.dtype == torch.int64:
            return int(indices)
    raise StreamError(
        f"{which!r} is no slice; an int, a tuple (start, stop, step), a list of ints, or None is."
    )


def cut(x: Tensor, which: Slice, dimension: int) -> Tensor:
    """Some of a tensor along a dimension; a view unless `which` is a list or tensor."""
    index = index_of(which)
    if isinstance(index, int):
        return x.select(dimension, index)
    indices: list[Any] = [slice(None)] * x.ndim
    indices[dimension] = index.to(x.device) if isinstance(index, Tensor) else index
    return x[tuple(indices)]
