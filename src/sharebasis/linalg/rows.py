"""Which rows of a weight: one run, or runs at a regular distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """`runs` runs of `length` rows, the first at `start`, each `stride` after the one before.

    One run is a block of rows; several are what a fused weight that is interleaved by
    head gives each of q, k and v.
    """

    start: Annotated[int, Ge(0)]
    length: Annotated[int, Gt(0)]
    runs: Annotated[int, Gt(0)] = 1
    stride: Annotated[int, Ge(0)] = 0

    def __len__(self) -> int:
        return self.length * self.runs

    def __getitem__(self, i: int) -> int:
        """The row of the weight that is row `i` of these."""
        run, offset = divmod(range(len(self))[i], self.length)
        return self.start + run * self.stride + offset

    def __iter__(self) -> Iterator[int]:
        return (self[i] for i in range(len(self)))

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self[-1] + 1

    def part(self, start: int, length: int) -> Rows:
        """`length` of these rows from the `start`-th on, as Rows.

        Raises:
            ValueError: they are not all there, or they would begin in one run and end in another
                without filling them.
        """
        if not 0 <= start < start + length <= len(self):
            raise ValueError(
                f"{length} rows from {start} on are not among the {len(self)} of {self}"
            )
        _run, offset = divmod(start, self.length)
        if offset + length <= self.length:
            return Rows(self[start], length)
        if offset or length % self.length:
            raise ValueError(f"{length} rows from {start} on are not whole runs of {self}")
        return Rows(self[start], self.length, length // self.length, self.stride)

    @property
    def resizable(self) -> bool:
        """Whether some of these may go and the others still be Rows, closer to each other."""
        return self.runs == 1 or self.length == 1

    def resized(self, before: int, after: int) -> Rows:
        """Where these rows lie once a weight has lost the same places of all its blocks.

        Args:
            before: rows of the weight.
            after: those that are left; the fraction of them is that of every block.
        """
        if before == after:
            return self
        assert self.resizable
        if self.runs == 1:
            return Rows(self.start * after // before, self.length * after // before)
        return Rows(self.start, 1, self.runs * after // before, self.stride)

    @property
    def numbers(self) -> Int64[Tensor, " n"]:
        """Of all these rows, as an index."""
        runs, offsets = torch.arange(self.runs), torch.arange(self.length)
        return (self.start + self.stride * runs[:, None] + offsets).flatten()

    def take(self, weight: Tensor) -> Tensor:
        """These rows of `weight`: a view where they are one run or single rows, else a copy."""
        if self.runs == 1:
            return weight[self.start : self.start + self.length]
        if self.length == 1:
            return weight[self.start : self.stop : self.stride]
        return weight[self.numbers]


def rows_at(places: Int64[Tensor, " some"], blocks: Sequence[Rows]) -> Int64[Tensor, " _"]:
    """The rows of a weight that have some places in one of its blocks, ascending.

    Args:
        places: in each block.
        blocks: of one length.
    """
    rows = [block.numbers.to(places.device)[places] for block in blocks]
    return torch.cat(rows).sort().values


def inverse_order(rows: Sequence[Rows]) -> Int64[Tensor, " d_out"] | None:
    """Where each row of the weight lies once the parts are stacked; None if just there.

    Args:
        rows: of parts that cover a weight, each row once.
    """
    order = torch.cat([part.numbers for part in rows])
    return None if torch.equal(order, torch.arange(len(order))) else order.argsort()
