"""Artefacts on disk: tensors in safetensors, records in JSON, whole or not at all."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sharebasis.errors import StoreError, WeightsError

Record = TypeVar("Record")

REOPEN_BYTES = 64 * 2**20
"""After so much has been read of a file, it is closed and opened again."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """Yield a directory to write into that takes the place of `directory` at the end.

    A failure or a kill before the end leaves what `directory` held as it was; what the
    next run finds half-written, it removes.

    Raises:
        StoreError: the disk is full.
    """
    recover(directory)
    partial, old = _partial(directory), _old(directory)
    with disk_errors(directory):
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in partial.iterdir():
                _sync(path)
            _sync(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
        _sync(directory.parent)
        shutil.rmtree(old, ignore_errors=True)


def recover(directory: Path) -> None:
    """Undo what a kill in the middle of `writing(directory)` has left behind."""
    if _old(directory).exists() and not directory.exists():
        _old(directory).rename(directory)  # killed between the two renames
    for leftover in (_old(directory), _partial(directory)):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write under `path` into one clear StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(path, error) from error
        raise
    except SafetensorError as error:
        if any(f"code: {code}" in str(error) or f"os error {code}" in str(error) for code in _FULL):
            raise _disk_full(path, error) from error
        raise


def require_disk(path: Path, n_bytes: int) -> None:
    """Refuse to start writing what will not fit.

    Raises:
        StoreError: less than `n_bytes` are free where `path` will be.
    """
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise StoreError(
            f"{path} needs {n_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free on its "
            "disk. Free some space and run again; earlier artefacts are as they were."
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that `path` is whole or as it was."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table as CSV, with a head and plain line ends."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        partial.replace(path)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        StoreError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; run the stage that writes it (dvc repro).") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not JSON ({error}); remove it and run dvc repro.") from None


def save_record(path: Path, record: Any) -> None:
    """Write a record as JSON."""
    write_json(path, TypeAdapter(type(record)).dump_python(record, mode="json"))


def load_record(path: Path, record_type: type[Record]) -> Record:
    """Read a record back.

    Raises:
        StoreError: the file is missing, or another version of the code wrote it.
    """
    try:
        return TypeAdapter(record_type).validate_python(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise StoreError(
            f"{path} is no {record_type.__name__} that this version can read ({where or 'all'}: "
            f"{first['msg']}); run dvc repro to write it again."
        ) from None


class TensorWriter:
    """Writes tensors to numbered safetensors files, holding one file's worth in memory.

    Args:
        directory: to write into.
        stem: of the files, `stem-00001.safetensors` and so on.
        shard_bytes: size at which a file is closed.
    """

    def __init__(self, directory: Path, stem: str, shard_bytes: int) -> None:
        self._directory, self._stem, self._shard_bytes = directory, stem, shard_bytes
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
            raise StoreError(f"{name} is written twice to {self._directory}.")
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
        with disk_errors(self._directory):
            save_file(self._pending, self._directory / file, metadata={"format": "pt"})
            # safetensors keeps its files to their owner; ours are as readable as others are.
            umask = os.umask(0)
            os.umask(umask)
            (self._directory / file).chmod(0o666 & ~umask)
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
        """Read one tensor, or some rows or columns of a matrix, into memory of its own.

        Raises:
            WeightsError: there is no such tensor, or its file is missing or truncated.
        """
        if name not in self.files:
            raise WeightsError(f"{self.directory} holds no tensor {name}.")
        with opened(self.directory / self.files[name]) as file:
            if rows == columns == slice(None):
                return _get(file, name)
            with _naming(name):
                return file.get_slice(name)[rows, columns].clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read.

        Raises:
            WeightsError: its file is missing or truncated.
        """
        with opened(self.directory / self.files[name]) as file:
            return tuple(file.get_slice(name).get_shape())

    def size(self) -> int:
        """Bytes of all files together.

        Raises:
            WeightsError: one is missing or truncated.
        """
        total = 0
        for file_name in set(self.files.values()):
            with opened(self.directory / file_name):
                total += (self.directory / file_name).stat().st_size
        return total

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file."""
        by_file: dict[str, list[str]] = {}
        for name, file_name in self.files.items():
            by_file.setdefault(file_name, []).append(name)
        for file_name, names in sorted(by_file.items()):
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


def _disk_full(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"The disk is full: {path} could not be written ({error}). Free some space and run "
        "again; earlier artefacts are as they were."
    )


def _partial(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def _old(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.old")


def _sync(path: Path) -> None:
    """Have a file or directory on the disk before a rename relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
