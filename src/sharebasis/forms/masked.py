"""Unstructured sparsity: the entries that a mask keeps, and a bit for each entry as the mask.

It saves space on disk only: in memory, and in products, a masked weight is dense, with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16
from torch import Tensor
from torch.nn import functional

from sharebasis.errors import StateError
from sharebasis.forms.dense import DenseModule
from sharebasis.forms.form import Form, RoleTensors, trained
from sharebasis.linalg.objective import Problem
from sharebasis.linalg.optimal_brain_surgeon import refit

MASK_BITS = 16
"""Of an integer of a mask: as many as a number in half precision has."""


class MaskedModule(DenseModule):
    """x Wᵀ, zeros included."""

    kind: ClassVar[str] = "masked"


@dataclass(frozen=True, slots=True)
class Masked(Form):
    """One weight with unstructured zeros."""

    kind: ClassVar[str] = "masked"
    weight: Float[Tensor, "d_out d_in"]
    kept: Bool[Tensor, "d_out d_in"]
    """Which entries are stored."""

    @staticmethod
    def n_numbers(n_kept: int, n: int) -> int:
        """Numbers stored of a weight of `n` entries: those kept, and the integers of the mask."""
        return n_kept + -(-n // MASK_BITS)

    @classmethod
    def load(cls, tensors: RoleTensors, shapes: Sequence[tuple[int, int]]) -> Masked:
        ((part,), (shape,)) = tensors.parts, shapes
        kept, n_values = unpack(part["mask"], shape), len(part["dense"])
        if n_values != kept.sum():
            raise StateError(f"A mask of {kept.sum()} entries does not go with {n_values} values.")
        weight = torch.zeros_like(kept, dtype=part["dense"].dtype)
        return cls(weight.masked_scatter(kept, part["dense"].detach()), kept)

    def tensors(self) -> RoleTensors:
        return RoleTensors({}, ({"dense": self.weight[self.kept], "mask": pack(self.kept)},))

    def modules(self) -> Sequence[MaskedModule]:
        return [MaskedModule(self.weight)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Masked:
        weight = function(self.weight)
        return replace(self, weight=weight, kept=self.kept.to(weight.device))

    @classmethod
    def n_in_memory(cls, shapes: Sequence[tuple[int, int]]) -> int:
        return sum(map(prod, shapes))

    def refit(self, problems: Sequence[Problem]) -> Masked:
        (problem,) = problems
        return Masked(refit(problem, self.weight.detach(), self.kept), self.kept)

    def trainable(self, edited: bool) -> Masked:
        return Masked(trained(self.weight), self.kept)

    def parameters(self) -> RoleTensors:
        return RoleTensors({}, ({"dense": self.weight},))

    @property
    def support(self) -> Bool[Tensor, "d_out d_in"]:
        return self.kept


def pack(kept: Bool[Tensor, "d_out d_in"]) -> Int16[Tensor, " _"]:
    """A bit for every entry, row by row, the first ones in the lowest bits."""
    flat = kept.cpu().flatten()
    flat = functional.pad(flat, (0, -len(flat) % MASK_BITS))
    packed = np.packbits(flat.numpy(), bitorder="little").view("<i2")
    return torch.from_numpy(packed.astype(np.int16))


def unpack(mask: Int16[Tensor, " _"], shape: tuple[int, int]) -> Bool[Tensor, "d_out d_in"]:
    """What was packed, where the mask is."""
    packed = mask.cpu().numpy().astype("<i2").view(np.uint8)
    bits = np.unpackbits(packed, count=prod(shape), bitorder="little")
    return torch.from_numpy(bits).view(shape).bool().to(mask.device)
