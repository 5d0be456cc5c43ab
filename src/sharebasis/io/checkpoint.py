"""What a killed run leaves behind, and how the next one goes on from it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sharebasis.io.atomic import recover, writing
from sharebasis.io.records import read_json, write_json
from sharebasis.io.tensor_files import TensorReader, TensorWriter

log = logging.getLogger(__name__)

_PROGRESS = "progress.json"
SHARD_BYTES = 64 * 2**20
"""Of its files; what writing a checkpoint adds to the memory in use."""


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
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another one."""
        return time.monotonic() - self._last >= self.seconds

    def resume(self) -> tuple[Mapping[str, Any], TensorReader] | None:
        """The record and the tensors of a killed run; None if there is none."""
        recover(self.directory)
        if not (self.directory / _PROGRESS).exists():
            return None
        state = read_json(self.directory / _PROGRESS)
        if state["key"] != self.key:
            log.info("The checkpoint in %s is of another run; starting anew.", self.directory)
            return None
        return state["record"], TensorReader(self.directory, state["files"])

    def save(self, record: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take the place of the last checkpoint; whole or not at all.

        Args:
            record: JSON.
            tensors: by name, read one at a time.
        """
        with writing(self.directory) as out:
            writer = TensorWriter(out, "state", SHARD_BYTES)
            for name, tensor in tensors:
                writer.add(name, tensor)
            writer.flush()
            state = {"key": self.key, "record": record, "files": writer.files}
            write_json(out / _PROGRESS, state)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Drop the checkpoint; the run is complete."""
        shutil.rmtree(self.directory, ignore_errors=True)
