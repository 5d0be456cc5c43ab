"""Where every tensor of artifacts/weights came from."""

from __future__ import annotations

from dataclasses import dataclass

MANIFEST = "manifest.json"
"""In a directory that `extract` wrote: where every tensor came from."""


@dataclass(frozen=True)
class TensorOrigin:
    """One tensor of artifacts/weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    """Of its bytes, little-endian and row by row."""
    file: str
    source: str
    """The file it was read from."""


@dataclass(frozen=True)
class Manifest:
    """What artifacts/weights holds and where it came from."""

    source: str
    source_version: str
    """Commit of a hub model, version of a package, sha256 of a GGUF file; '' if none."""
    tensors: tuple[TensorOrigin, ...]
