"""What a killed calibration leaves behind, and how the next run goes on from it."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sharebasis import store
from sharebasis.moment_store import Accumulators, read_moment, write_sums

log = logging.getLogger(__name__)

_PROGRESS = "progress.json"


@dataclass
class Checkpoint:
    """Sums so far and how many windows they hold, so that a killed run can go on.

    Args:
        directory: of the checkpoint.
        identity: all that the moments depend on; a checkpoint of another one is ignored.
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

    def resume(self, accumulators: Accumulators) -> int:
        """Load the sums of a killed run; return how many windows they hold, 0 if there is none."""
        store.recover(self.directory)
        if not (self.directory / _PROGRESS).exists():
            return 0
        state = store.read_json(self.directory / _PROGRESS)
        if state["key"] != self.key:
            log.info("The checkpoint in %s is of another run; starting anew.", self.directory)
            return 0
        reader = store.TensorReader(self.directory, state["files"])
        for name, accumulator in accumulators.items():
            moment = read_moment(reader, name, state["n_tokens"][name])
            accumulator.load(moment)
        log.info("Going on from window %d, the last checkpoint.", state["windows"])
        return int(state["windows"])

    def save_if_due(self, accumulators: Accumulators, windows: int) -> None:
        """Write the sums if the last checkpoint is old enough."""
        if time.monotonic() - self._last < self.seconds:
            return
        with store.writing(self.directory) as out:
            n_tokens, files = write_sums(out, accumulators)
            state = {"key": self.key, "windows": windows, "files": files, "n_tokens": n_tokens}
            store.write_json(out / _PROGRESS, state)
        self._last = time.monotonic()

    def remove(self) -> None:
        """Drop the checkpoint; the run is complete."""
        shutil.rmtree(self.directory, ignore_errors=True)
