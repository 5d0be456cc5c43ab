"""A compressed directory, written anew with other weights in the place of some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sharebasis.compressed.edits import edits_of
from sharebasis.compressed.index import CompressedIndex, StoredGroup
from sharebasis.compressed.writer import CompressedWriter
from sharebasis.forms.form import Form
from sharebasis.forms.table import FORMS
from sharebasis.io.tensor_files import TensorReader


@dataclass(frozen=True)
class Rewriting:
    """What is written in the place of what is stored; edits add to it."""

    index: CompressedIndex
    reader: TensorReader
    """Of the stored tensors."""
    forms: dict[str, Form]
    """By group: editable ones, or of the kind that the group is stored in."""
    tensors: dict[str, Tensor]
    """By name: other than of groups."""

    def form(self, group: StoredGroup) -> Form:
        """The new one, or the stored one."""
        if group.name in self.forms:
            return self.forms[group.name]
        return group.read(self.reader)

    def tensor(self, name: str) -> Tensor:
        """The new one, or the stored one."""
        return self.tensors[name] if name in self.tensors else self.reader.read(name)


def rewrite(
    out: Path,
    source: Path,
    index: CompressedIndex,
    forms: Mapping[str, Form],
    tensors: Mapping[str, Tensor],
    shard_bytes: int,
) -> None:
    """Copy a compressed directory, with other weights in the place of some.

    Args:
        out: to write into, from `io.atomic.writing`.
        source: artifacts/compressed.
        index: of `source`.
        forms: by the names of groups, editable.
        tensors: by name, other than of groups.
        shard_bytes: size at which a shard is closed.

    Raises:
        StoreError: the disk is full.
    """
    reader = TensorReader(source, index.files)
    rewriting = Rewriting(index, reader, dict(forms), dict(tensors))
    edits = edits_of(index)
    for edit in edits:
        edit.settle(rewriting)
    of_groups = index.group_tensors
    others = {name: file for name, file in index.files.items() if name not in of_groups}
    writer = CompressedWriter(out, shard_bytes)
    for name, tensor in TensorReader(source, others).stream():
        new = rewriting.tensors.get(name)
        writer.add(name, tensor if new is None else new.to("cpu", tensor.dtype))
    for group in index.groups:
        form = rewriting.forms.get(group.name)
        if form is None:
            writer.copy_group(group, reader)
            continue
        dtype = reader.read(group.tensor_names[0], slice(0, 1)).dtype
        writer.add_group(group, _stored(form, group), dtype)
    writer.finish(source, edits)


def _stored(form: Form, group: StoredGroup) -> Form:
    """In the kind that a group is stored in; what is computed for that, in float64."""
    if form.kind == group.form:
        return form
    return FORMS[group.form].of(form.map(_float64))


def _float64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)
