"""Windows of text -> sums of moments, with checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable

from jaxtyping import Int64
from torch import Tensor

from sharebasis.io.checkpoint import Checkpoint
from sharebasis.moments.store import Accumulators, packed, read_moment, tokens_of, trimmed_of
from sharebasis.runtime.progress import progress

log = logging.getLogger(__name__)


def gather(
    run: Callable[[Int64[Tensor, "windows window"], int], None],
    accumulators: Accumulators,
    windows: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
    stage: str,
) -> None:
    """Run a text past trackers, a batch at a time.

    Args:
        run: is given a batch and the number of its first window.
        accumulators: what the trackers feed, by site name.
        windows: token ids, on the device of the model.
        batch: windows a forward pass.
        checkpoint: of the sums, where a run that was killed goes on from.
        stage: for the progress bar.
    """
    done, tokens = _resume(checkpoint, accumulators), windows.shape[1]
    with progress(stage, windows.numel(), "tokens", done * tokens) as advance:
        for start in range(done, len(windows), batch):
            chunk = windows[start : start + batch]
            run(chunk, start)
            advance(chunk.numel())
            if checkpoint.due:
                counts = {
                    "n_tokens": tokens_of(accumulators),
                    "n_trimmed": trimmed_of(accumulators),
                }
                checkpoint.save({"windows": start + len(chunk), **counts}, packed(accumulators))


def _resume(checkpoint: Checkpoint, accumulators: Accumulators) -> int:
    """Load the sums of a killed run; return how many windows they hold, 0 if there is none."""
    if (saved := checkpoint.resume()) is None:
        return 0
    record, reader = saved
    for name, accumulator in accumulators.items():
        moment = read_moment(reader, name, record["n_tokens"][name])
        accumulator.load(moment, record["n_trimmed"].get(name, 0))
    log.info("Going on from window %d, the last checkpoint.", record["windows"])
    return int(record["windows"])
