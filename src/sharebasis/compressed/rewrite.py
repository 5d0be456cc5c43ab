"""A compressed directory, written anew with other tensors in the place of some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sharebasis.compressed.index import CompressedIndex
from sharebasis.compressed.writer import CompressedWriter
from sharebasis.forms.mask import unpack
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.value_gauge import fix_values, turned_bias, turned_output


def rewrite(
    out: Path,
    source: Path,
    index: CompressedIndex,
    replaced: Mapping[str, Tensor],
    shard_bytes: int,
) -> None:
    """Copy a compressed directory, with other tensors in the place of some.

    Args:
        out: to write into, from `store.writing`.
        source: artifacts/compressed.
        index: of `source`.
        replaced: by name, the factors of a group in plain form (all of them or none), or the rows
            of one that has no basis (all columns of values; of a weight that lacks entries, zeros
            in their place), or any other tensor.
        shard_bytes: size at which a shard is closed.

    Raises:
        StoreError: the disk is full.
    """
    reader = TensorReader(source, index.files)
    replaced = _without_zeros(index, reader, _fixed_again(index, reader, replaced))
    of_groups = {name for group in index.groups for name in group.tensors}
    others = {name: file for name, file in index.files.items() if name not in of_groups}
    writer = CompressedWriter(out, shard_bytes)
    for name, tensor in TensorReader(source, others).stream():
        writer.add(name, replaced[name].to("cpu", tensor.dtype) if name in replaced else tensor)
    for group in index.groups:
        dtype = reader.read(group.tensors[0], slice(0, 1)).dtype
        names = dict.fromkeys(part.coefficient for part in group.parts)
        if group.basis is not None and replaced.keys() >= {group.basis, *names}:
            plain = {name: replaced[name].detach().double() for name in (group.basis, *names)}
            if group.side == "output":
                plain = {name: factor.T for name, factor in plain.items()}
            writer.add_factors(group, plain.pop(group.basis), plain, dtype)
        else:
            new = {
                name: own.detach().to("cpu", dtype if own.is_floating_point() else torch.int32)
                for name in group.tensors
                if (own := replaced.get(name)) is not None
            }
            kept = (name for name in group.tensors if name not in replaced)
            writer.add_dense(group, new | {name: reader.read(name) for name in kept})
    writer.finish(source, index.mlps, index.values)


def _fixed_again(
    index: CompressedIndex, reader: TensorReader, replaced: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """What is to be stored where new values do not have the known columns any more."""
    found = dict(replaced)
    for own in index.values:
        if own.value not in replaced:
            continue
        part, group = index.part(own.value), index.group_of(own.output)
        assert part.pivots is not None
        values = fix_values(replaced[own.value].detach(), reader.shape(part.pivots)[0])
        found |= {part.pivots: values.pivots, own.value: values.coefficient}
        (output,) = (one for one in group.parts if one.sublayer == own.output)
        on_inputs = group.basis if group.basis and group.side == "input" else output.coefficient
        weight = found[on_inputs] if on_inputs in found else reader.read(on_inputs)
        found[on_inputs] = turned_output(weight.detach(), values.turn)
        name = f"{part.sublayer}.bias"
        if name in index.files:
            bias = found[name] if name in found else reader.read(name)
            found[name] = turned_bias(bias, part.rows.numbers, values.turn)
    return found


def _without_zeros(
    index: CompressedIndex, reader: TensorReader, replaced: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """What is to be stored of weights that lack entries."""
    found = dict(replaced)
    parts = {part.coefficient: part for group in index.groups for part in group.parts}
    for name, part in parts.items():
        if part.mask and name in replaced:
            weight = replaced[name].detach().cpu()
            d_out, d_in = weight.shape
            found[name] = weight[unpack(reader.read(part.mask), (d_out, d_in))]
    return found
