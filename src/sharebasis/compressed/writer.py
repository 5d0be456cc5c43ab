"""Forms of groups -> the files of artifacts/compressed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sharebasis.compressed.edits import Edit, edit_record
from sharebasis.compressed.index import INDEX_FILE, CompressedIndex, StoredGroup
from sharebasis.forms.form import Form
from sharebasis.io.manifest import MANIFEST
from sharebasis.io.records import save_record
from sharebasis.io.tensor_files import TensorReader, TensorWriter


class CompressedWriter(TensorWriter):
    """Writes a compressed model, holding one group and one shard in memory.

    What belongs to no group is added by its name (`add`).

    Args:
        directory: to write into, from `io.atomic.writing`.
        shard_bytes: size at which a shard is closed.
    """

    def __init__(self, directory: Path, shard_bytes: int) -> None:
        super().__init__(directory, "sharebasis", shard_bytes)
        self._groups: list[StoredGroup] = []

    def add_group(self, group: StoredGroup, form: Form, dtype: torch.dtype) -> None:
        """A group in its form.

        Args:
            group: what to call its tensors.
            form: of the kind that the group names.
            dtype: of the numbers.
        """
        assert form.kind == group.form
        # Indices and masks come before the numbers that they are about.
        for name, tensor in sorted(group.named(form.tensors()), key=_is_number):
            self.add(name, tensor.to("cpu", dtype if tensor.is_floating_point() else None))
        self._groups.append(replace(group, rank=form.rank))

    def copy_group(self, group: StoredGroup, reader: TensorReader) -> None:
        """A group as it was.

        Args:
            group: of another directory.
            reader: of that.
        """
        for name in group.tensor_names:
            self.add(name, reader.read(name))
        self._groups.append(group)

    def finish(self, companions: Path, edits: Sequence[Edit] = ()) -> None:
        """Write the index, and what else a directory in hub format holds.

        Args:
            companions: a directory whose files go along, but for those of weights.
            edits: what is changed around the weights.
        """
        self.flush()
        for path in companions.iterdir():
            ours = path.name in (MANIFEST, INDEX_FILE)
            if ".safetensors" not in path.name and not ours:
                shutil.copyfile(path, self.directory / path.name)
        records = tuple(map(edit_record, edits))
        index = CompressedIndex(tuple(self._groups), self.files, records)
        save_record(self.directory / INDEX_FILE, index)


def _is_number(named: tuple[str, Tensor]) -> bool:
    return named[1].is_floating_point()
