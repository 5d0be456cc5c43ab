"""What a killed run leaves behind, and how the next one goes on from it."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sharebasis.io.artefact import TensorArtefact, TensorIndex
from sharebasis.io.atomic import recover
from sharebasis.io.hashing import json_digest
from sharebasis.io.tensor_files import TensorReader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress(TensorIndex):
    """How far a run was."""

    key: str
    """Digest of the identity of the run."""
    record: Mapping[str, Any]
    """What the run wants to know of it."""
    files: Mapping[str, str]
    """Tensor name -> file name."""


PROGRESS = TensorArtefact("progress.json", Progress, "state")


@dataclass
class Checkpoint:
    """Tensors and a record of how far a run was, so that a killed one can go on.

    Args:
        directory: of the checkpoint.
        identity: all that the result depends on; a checkpoint of another one is ignored.
        seconds: longest time between two checkpoints.
    """

    directory: Path
    identity: Mapping[str, object]
    seconds: float

    def __post_init__(self) -> None:
        self._last = time.monotonic()

    @property
    def key(self) -> str:
        """Digest of the identity."""
        return json_digest(self.identity)

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        return time.monotonic() - self._last >= self.seconds

    def resume(self) -> tuple[Mapping[str, Any], TensorReader] | None:
        """The record and the tensors of a killed run; None if there is none."""
        recover(self.directory)
        if not PROGRESS.is_in(self.directory):
            return None
        progress, reader = PROGRESS.open(self.directory)
        if progress.key != self.key:
            log.info("The checkpoint in %s is of another run; starting anew.", self.directory)
            return None
        return progress.record, reader

    def save(self, record: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take the place of the last checkpoint; whole or not at all.

        Args:
            record: JSON.
            tensors: by name, read one at a time.
        """
        with PROGRESS.writing(self.directory) as checkpoint:
            for name, tensor in tensors:
                checkpoint.add(name, tensor)
            checkpoint.finish(lambda files: Progress(self.key, record, files))
        self._last = time.monotonic()

    def remove(self) -> None:
        """Drop the checkpoint; the run is complete."""
        shutil.rmtree(self.directory, ignore_errors=True)
