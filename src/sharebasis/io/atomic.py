"""Artefacts on disk: records in JSON, tables and directories, whole or not at all.

It loads no torch; tensors are the matter of tensor_files.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sharebasis.errors import StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(directory: Path) -> Iterator[Path]:
    """Yield a directory to write into that takes the place of `directory` at the end.

    A failure or a kill before the end leaves what `directory` held as it was; what the
    next run finds half-written, it removes. A link stays, and what it leads to is replaced.

    Raises:
        StoreError: the disk is full, or what a kill has left cannot be removed.
    """
    recover(directory)
    directory = _behind_link(directory)
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
    """Undo what a kill in the middle of `writing(directory)` has left behind.

    Raises:
        StoreError: it cannot be removed.
    """
    directory = _behind_link(directory)
    if _old(directory).exists() and not directory.exists():
        _old(directory).rename(directory)  # killed between the two renames
    for leftover in (_old(directory), _partial(directory)):
        shutil.rmtree(leftover, ignore_errors=True)
        if os.path.lexists(leftover):
            raise StoreError(
                f"{leftover}, which an earlier run has left, is in the way and cannot be removed; "
                "remove it and run again."
            )


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


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with disk_errors(path):
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        partial.replace(path)


def _disk_full(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"The disk is full: {path} could not be written ({error}). Free some space and run "
        "again; earlier artefacts are as they were."
    )


def _behind_link(directory: Path) -> Path:
    return directory.resolve() if directory.is_symlink() else directory


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
