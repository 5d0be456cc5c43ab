"""Factors -> the files of artifacts/compressed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from sharebasis.compressed.index import (
    INDEX_FILE,
    CompressedGroup,
    CompressedIndex,
    NarrowedMlp,
    TurnedOutput,
)
from sharebasis.forms.mask import pack
from sharebasis.io.manifest import MANIFEST
from sharebasis.io.records import save_record
from sharebasis.io.tensor_files import TensorWriter
from sharebasis.linalg.interpolative import Interpolative, interpolate
from sharebasis.linalg.optimal_brain_surgeon import Sparse
from sharebasis.linalg.value_gauge import FixedValues


class CompressedWriter:
    """Writes a compressed model, holding one group and one shard in memory.

    Args:
        directory: to write into, from `store.writing`.
        shard_bytes: size at which a shard is closed.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        self._directory = directory
        self._writer = TensorWriter(directory, "sharebasis", shard_bytes)
        self._groups: list[CompressedGroup] = []

    @property
    def n_numbers(self) -> int:
        """Numbers written so far."""
        return self._writer.n_numbers

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor of the model that is as it was."""
        self._writer.add(name, tensor)

    def add_dense(self, group: CompressedGroup, weights: Mapping[str, Tensor]) -> None:
        """A group without a basis, or one whose tensors are as they are to be stored.

        Args:
            group: what to call its tensors.
            weights: the rows of its parts, or all of its tensors, by those names.
        """
        for name, weight in weights.items():
            self._writer.add(name, weight)
        self._groups.append(group)

    def add_values(self, group: CompressedGroup, values: FixedValues, dtype: torch.dtype) -> None:
        """Values of which some columns are known.

        Args:
            group: without a basis, whose part has a tensor for the numbers of those columns.
            values: what to store.
            dtype: of the other columns.
        """
        (part,) = group.parts
        assert part.pivots is not None
        self._writer.add(part.pivots, values.pivots.to("cpu", torch.int32))
        self._writer.add(part.coefficient, values.coefficient.to("cpu", dtype))
        self._groups.append(group)

    def add_sparse(self, group: CompressedGroup, left: Sparse, dtype: torch.dtype) -> None:
        """A weight that lacks entries.

        Args:
            group: without a basis, whose part has a tensor for the mask.
            left: what to store.
            dtype: of the entries.
        """
        (part, *_) = group.parts
        assert part.mask is not None
        self._writer.add(part.mask, pack(left.kept))
        self._writer.add(part.coefficient, left.weight[left.kept].to("cpu", dtype))
        self._groups.append(group)

    def add_factors(
        self,
        group: CompressedGroup,
        basis: Float64[Tensor, "rank shared"],
        coefficients: Mapping[str, Float64[Tensor, "_ rank"]],
        dtype: torch.dtype,
    ) -> None:
        """A group with a basis, in interpolative form where its parts have pivots.

        Args:
            group: what to call its tensors.
            basis: that its parts share; transposed, if that is on the output side.
            coefficients: of its parts in their order, by the names of their tensors; a part
                that has several names is there once. Transposed like the basis.
            dtype: of what is stored.
        """
        assert group.basis is not None
        parts = {part.coefficient: part for part in group.parts}
        pivots = {name: part.pivots for name, part in parts.items() if part.pivots}
        first = dict.fromkeys(coefficients, 0)
        rank = len(basis)
        if group.side == "output":
            tensors = _of_writes(group.basis, basis, coefficients, pivots)
        elif pivots:
            form = interpolate(torch.cat(list(coefficients.values())), basis)
            lengths = {name: len(own) for name, own in coefficients.items()}
            basis, coefficients, own_pivots, first = _cut(form, lengths)
            named = {pivots[name]: own for name, own in own_pivots.items()}
            tensors = {**named, group.basis: basis, **coefficients}
        else:
            tensors = {group.basis: basis, **coefficients}
        for name, tensor in tensors.items():
            own = dtype if tensor.is_floating_point() else torch.int32
            self._writer.add(name, tensor.to("cpu", own))
        placed = tuple(replace(part, first=first[part.coefficient]) for part in group.parts)
        self._groups.append(replace(group, rank=rank, parts=placed))

    def finish(
        self,
        companions: Path,
        mlps: Sequence[NarrowedMlp] = (),
        values: Sequence[TurnedOutput] = (),
    ) -> None:
        """Write the index, and what else a directory in hub format holds.

        Args:
            companions: a directory whose files go along, but for those of weights.
            mlps: that lack neurons.
            values: that lack columns.
        """
        self._writer.flush()
        for path in companions.iterdir():
            ours = path.name in (MANIFEST, INDEX_FILE)
            if ".safetensors" not in path.name and not ours:
                shutil.copyfile(path, self._directory / path.name)
        index = CompressedIndex(tuple(self._groups), self._writer.files, tuple(mlps), tuple(values))
        save_record(self._directory / INDEX_FILE, index)


Named = dict[str, Tensor]


def _of_writes(
    name: str,
    basis: Tensor,
    coefficients: Mapping[str, Tensor],
    pivots: Mapping[str, str],
) -> Named:
    """What is stored of a group that shares on the output side.

    In interpolative form the coefficients, side by side, are rows of the weights, side by side;
    the parts share which ones, and how the other rows are made of them.
    """
    if not pivots:
        return {name: basis.T, **{key: own.T for key, own in coefficients.items()}}
    form = interpolate(basis.T, torch.cat(list(coefficients.values())).T)
    lengths = [len(own) for own in coefficients.values()]
    own = dict(zip(coefficients, form.basis.split(lengths, dim=1), strict=True))
    (shared,) = set(pivots.values())
    return {shared: form.pivots, name: form.coefficient, **own}


def _cut(
    form: Interpolative, lengths: Mapping[str, int]
) -> tuple[Tensor, Named, Named, dict[str, int]]:
    """(basis, and by part: coefficients of its other rows, its pivots, the first one's row)."""
    coefficients: Named = {}
    pivots: Named = {}
    firsts: dict[str, int] = {}
    start = first = row = 0
    for name, length in lengths.items():
        own = form.pivots[(form.pivots >= start) & (form.pivots < start + length)] - start
        n_rest = length - len(own)
        coefficients[name], pivots[name] = form.coefficient[row : row + n_rest], own
        firsts[name] = first
        start, first, row = start + length, first + len(own), row + n_rest
    return form.basis, coefficients, pivots, firsts
