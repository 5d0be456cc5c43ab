"""Tensors on disk, in safetensors: written shard by shard, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sharebasis.errors import StoreError, WeightsError
from sharebasis.io.atomic import disk_errors
from sharebasis.io.records import read_json

REOPEN_BYTES = 64 * 2**20
"""After so much has been read of a file, it is closed and opened again."""


class TensorWriter:
    """Writes tensors to numbered safetensors files, holding one file's worth in memory.

    Args:
        directory: to write into.
        stem: of the files, `stem-00001.safetensors` and so on.
        shard_bytes: size at which a file is closed.
    """

    def __init__(self, directory: Path, stem: str, shard_bytes: int) -> None:
        self.directory, self._stem, self._shard_bytes = directory, stem, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._n_files = 0
        self.files: dict[str, str] = {}
        """Tensor name -> file name."""
        self.n_numbers = 0
        """Numbers in all tensors added so far."""
        self._names: set[str] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise StoreError(f"{name} is written twice to {self.directory}.")
        self._names.add(name)
        self.n_numbers += tensor.numel()
        # A clone keeps a view from dragging the storage of a whole fused weight along.
        self._pending[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; to be called once after the last tensor."""
        if not self._pending:
            return
        self._n_files += 1
        file = f"{self._stem}-{self._n_files:05d}.safetensors"
        with disk_errors(self.directory):
            save_file(self._pending, self.directory / file, metadata={"format": "pt"})
            # safetensors keeps its files to their owner; ours are as readable as others are.
            umask = os.umask(0)
            os.umask(umask)
            (self.directory / file).chmod(0o666 & ~umask)
        self.files |= dict.fromkeys(self._pending, file)
        self._pending, self._pending_bytes = {}, 0


class TensorReader:
    """Reads tensors of a directory one at a time.

    Args:
        directory: that holds the files.
        files: tensor name -> file name.
    """

    def __init__(self, directory: Path, files: Mapping[str, str]) -> None:
        self.directory, self.files = directory, files

    @classmethod
    def of_checkpoint(cls, directory: Path) -> TensorReader:
        """All safetensors of a directory in hub format, sharded or not.

        Raises:
            WeightsError: there is none, or one that the index names is missing or truncated.
        """
        index = directory / "model.safetensors.index.json"
        if index.exists():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict):
                raise WeightsError(f"{index} has no weight_map; fetch or write it again.")
            return cls(directory, files)
        single = directory / "model.safetensors"
        if not single.exists():
            raise WeightsError(f"{directory} holds neither {single.name} nor {index.name}.")
        with opened(single) as file:
            return cls(directory, dict.fromkeys(file.keys(), single.name))

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Read one tensor, or some rows of one, or columns of a matrix, into memory of its own.

        Raises:
            WeightsError: there is no such tensor, or its file is missing or truncated.
        """
        if name not in self.files:
            raise WeightsError(f"{self.directory} holds no tensor {name}.")
        with opened(self.directory / self.files[name]) as file:
            if rows == columns == slice(None):
                return _get(file, name)
            with _naming(name):
                selection = (rows,) if columns == slice(None) else (rows, columns)
                return file.get_slice(name)[selection].clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read.

        Raises:
            WeightsError: its file is missing or truncated.
        """
        with opened(self.directory / self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def layout(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of every tensor, file by file; of a tensor, a row is read at most.

        Raises:
            WeightsError: a file is missing or truncated.
        """
        for file_name, names in self._by_file():
            with opened(self.directory / file_name) as file:
                for name in names:
                    shape = tuple(file.get_slice(name).get_shape())
                    first_row = file.get_slice(name)[:1] if shape else file.get_tensor(name)
                    yield name, shape, first_row.dtype

    def _by_file(self) -> Iterator[tuple[str, list[str]]]:
        by_file: dict[str, list[str]] = {}
        for name, file_name in self.files.items():
            by_file.setdefault(file_name, []).append(name)
        yield from sorted(by_file.items())

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file."""
        for file_name, names in self._by_file():
            names.reverse()
            while names:
                # What has been read of a mapped file counts as memory until it is closed.
                n_bytes = 0
                with opened(self.directory / file_name) as file:
                    while names and n_bytes < REOPEN_BYTES:
                        tensor = _get(file, names[-1])
                        n_bytes += tensor.nbytes
                        yield names.pop(), tensor


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        WeightsError: it is missing, truncated or no safetensors file.
    """
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing, though its index names it.") from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise WeightsError(
            f"{path} ({size} bytes) is truncated or no safetensors file: {error}. Fetch or "
            "write it again."
        ) from None
    with file as tensors:
        yield tensors


def _get(file: Any, name: str) -> Tensor:
    with _naming(name):
        return file.get_tensor(name).clone()


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say which tensor it is that cannot be read."""
    try:
        yield
    except SafetensorError as error:
        raise WeightsError(f"Tensor {name} cannot be read: {error}.") from None
