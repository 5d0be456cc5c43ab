"""The residual streams of two models between two blocks."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sharebasis.compressed.index import CompressedIndex
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.stages.propagate.refitted import Refitted


@dataclass
class Streams:
    """The hidden states of the original and of the compressed model at one depth, on the CPU."""

    original: Float[Tensor, "windows window d_model"]
    compressed: Float[Tensor, "windows window d_model"]

    @property
    def distance(self) -> float:
        """Median over tokens of ‖h - ĥ‖² / ‖h‖²."""
        original, compressed = self.original.float(), self.compressed.float()
        error = (original - compressed).square().sum(-1)
        return (error / original.square().sum(-1)).median().item()


@dataclass
class Progress:
    """How far a run is."""

    before: float | None
    """Divergence on held-out windows."""
    distances: list[float]
    refitted: Refitted
    """Of the blocks that were passed."""
    streams: Streams

    def save(self, checkpoint: Checkpoint, index: CompressedIndex) -> None:
        """The streams count as tensors, too."""
        streams = [("original", self.streams.original), ("compressed", self.streams.compressed)]
        record = {"before": self.before, "distances": self.distances}
        checkpoint.save(record, [*streams, *self.refitted.named(index)])
