"""A directory of tensors with an index that says which file holds which, and what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from sharebasis.io.atomic import writing
from sharebasis.io.records import load_record, save_record
from sharebasis.io.tensor_files import TensorReader, TensorWriter

SHARD_BYTES = 64 * 2**20
"""Of a file; what writing an artefact adds to the memory in use."""


class TensorIndex:
    """Base of an index, which is a frozen dataclass; the place of `files` among its fields is
    where the dataclass declares it."""

    files: Mapping[str, str]
    """Tensor name -> file name."""


Index = TypeVar("Index", bound=TensorIndex)


@dataclass(frozen=True)
class TensorArtefact(Generic[Index]):
    """A kind of artefact: how its directory is opened and written.

    Args:
        index_file: name of the index, a record as JSON.
        index_type: of that record.
        stem: of the tensors' files, `stem-00001.safetensors` and so on.
    """

    index_file: str
    index_type: type[Index]
    stem: str

    def is_in(self, directory: Path) -> bool:
        """Whether a directory holds one."""
        return (directory / self.index_file).exists()

    def open(self, directory: Path) -> tuple[Index, TensorReader]:
        """The index, and a reader of the tensors that it names.

        Raises:
            StoreError: there is none, or another version of the code wrote it.
        """
        index = load_record(directory / self.index_file, self.index_type)
        return index, TensorReader(directory, index.files)

    @contextmanager
    def writing(
        self, directory: Path, shard_bytes: int = SHARD_BYTES
    ) -> Iterator[ArtefactWriter[Index]]:
        """Write one that appears whole or not at all.

        Args:
            directory: whose place it takes.
            shard_bytes: size at which a file is closed.

        Raises:
            StoreError: the disk is full.
        """
        with writing(directory) as partial:
            yield ArtefactWriter(self, partial, shard_bytes)


class ArtefactWriter(TensorWriter, Generic[Index]):
    """Writes the tensors of an artefact, and at last its index.

    Args:
        artefact: what is written.
        directory: to write into, from `atomic.writing`.
        shard_bytes: size at which a file is closed.
    """

    def __init__(
        self, artefact: TensorArtefact[Index], directory: Path, shard_bytes: int = SHARD_BYTES
    ) -> None:
        super().__init__(directory, artefact.stem, shard_bytes)
        self._index_path = directory / artefact.index_file

    def finish(self, index_of: Callable[[Mapping[str, str]], Index]) -> None:
        """Write what is pending, and the index.

        Args:
            index_of: makes it, given where every tensor is: tensor name -> file name.
        """
        self.flush()
        save_record(self._index_path, index_of(self.files))
