"""Which entries a weight has that lacks others: a bit for each, in integers as files hold them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16
from torch import Tensor
from torch.nn import functional

BITS = 16
"""Of an integer of a mask: as many as a number of a model in half precision has."""


def pack(kept: Bool[Tensor, "d_out d_in"]) -> Int16[Tensor, " _"]:
    """A bit for every entry, row by row, the first ones in the lowest bits."""
    flat = kept.cpu().flatten()
    flat = functional.pad(flat, (0, -len(flat) % BITS))
    packed = np.packbits(flat.numpy(), bitorder="little").view("<i2")
    return torch.from_numpy(packed.astype(np.int16))


def unpack(mask: Int16[Tensor, " _"], shape: tuple[int, int]) -> Bool[Tensor, "d_out d_in"]:
    """What was packed, where the mask is."""
    packed = mask.cpu().numpy().astype("<i2").view(np.uint8)
    bits = np.unpackbits(packed, count=shape[0] * shape[1], bitorder="little")
    return torch.from_numpy(bits).view(shape).bool().to(mask.device)


def n_stored(n_kept: int, n: int) -> int:
    """Numbers of a weight of `n` entries that keeps some: these, and the integers of the mask."""
    return n_kept + -(-n // BITS)


def n_kept(stored: int, n: int) -> int:
    """The entries of a weight that stores so many numbers."""
    return stored - n_stored(0, n)


def whole(
    values: Float[Tensor, " n_kept"], kept: Bool[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """The weight that has those values, row by row, and zeros."""
    return torch.zeros_like(kept, dtype=values.dtype).masked_scatter(kept, values)
