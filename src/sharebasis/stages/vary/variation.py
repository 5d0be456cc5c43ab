"""How much layers differ from each other, measured over a model."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from threading import Lock

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from sharebasis.config.analyse import VarySettings
from sharebasis.errors import SelectionError
from sharebasis.gauge.alignment import Distances, distances
from sharebasis.gauge.layers import Layers
from sharebasis.gauge.tensors import Tensors
from sharebasis.linalg.rows import Rows
from sharebasis.runtime.progress import progress
from sharebasis.runtime.threads import in_parallel
from sharebasis.structures.layer_distances import Pair

SMALL = 2**24
"""Numbers of a layer up to which a core works on a pair of its own; threads within one product
or decomposition do not pay for such, and two pairs are in memory at once on two cores."""


@dataclass(frozen=True)
class Variation:
    """Distances between the layers of a model, and between consecutive ones of random weights."""

    layers: Sequence[int]
    """Which ones, in order."""
    measured: Mapping[Pair, Distances]
    """By the numbers of two layers, the smaller first; the second was brought to the first."""
    random: Mapping[Pair, Distances]
    """The same of consecutive layers whose numbers are in random order."""

    @property
    def families(self) -> Sequence[str]:
        """Every family that some pair has."""
        pairs = self.measured.values()
        return list(dict.fromkeys(family for pair in pairs for family in pair.aligned))

    @property
    def consecutive(self) -> Sequence[Pair]:
        return list(pairwise(self.layers))

    def matrix(self, family: str) -> Float64[np.ndarray, "layers layers"]:
        """Aligned distances of every two layers, symmetric; NaN where nothing was measured.

        Row and column i belong to layer `layers[i]`.
        """
        place = {layer: i for i, layer in enumerate(self.layers)}
        matrix = np.full((len(place), len(place)), np.nan)
        np.fill_diagonal(matrix, 0.0)
        for (first, second), pair in self.measured.items():
            if family in pair.aligned:
                i, j = place[first], place[second]
                matrix[i, j] = matrix[j, i] = pair.aligned[family]
        return matrix

    def over_depth(self, family: str) -> Mapping[str, Sequence[float]]:
        """`unaligned`, `aligned` and `random` of each layer and the next; NaN where missing."""
        by_pair = {
            "unaligned": [self.measured[pair].unaligned for pair in self.consecutive],
            "aligned": [self.measured[pair].aligned for pair in self.consecutive],
            "random": [self.random[pair].aligned for pair in self.consecutive],
        }
        return {
            name: [by_family.get(family, float("nan")) for by_family in pairs]
            for name, pairs in by_pair.items()
        }


def measure_variation(
    tensors: Tensors, layers_of: Callable[[Tensors], Layers], settings: VarySettings, seed: int
) -> Variation:
    """Measure a model's layers, and beside them its own numbers in random order.

    Args:
        tensors: of the model.
        layers_of: finds the layers among them.
        settings: which pairs, and what is removed first.
        seed: of the random order.

    Raises:
        SelectionError: there are fewer than two layers in the range.
    """
    layers, shuffled = layers_of(tensors), layers_of(Shuffled(tensors, seed))
    numbers = _in_range(layers.numbers, settings.layers)
    consecutive = list(pairwise(numbers))
    pairs = list(combinations(numbers, 2)) if settings.pairs == "all" else consecutive
    first_layer = layers.read(numbers[0]).families.values()
    n_numbers = sum(weight.numel() for weights in first_layer for weight in weights)
    workers = torch.get_num_threads() if n_numbers <= SMALL else 1
    with progress("vary", len(pairs) + len(consecutive), "pairs") as advance:
        reading = Lock()  # a reader keeps what it has just converted

        def measure(of: Layers, pair: Pair) -> Distances:
            with reading:
                first, second = map(of.read, pair)
            apart = distances(second, first, of.freedom(pair[1]), settings.alignment)
            advance()
            return apart

        tasks = [partial(measure, layers, pair) for pair in pairs]
        tasks += [partial(measure, shuffled, pair) for pair in consecutive]
        results = iter(list(in_parallel(tasks, workers)))
        measured = {pair: next(results) for pair in pairs}
        return Variation(numbers, measured, {pair: next(results) for pair in consecutive})


def _in_range(numbers: Sequence[int], bounds: Pair | None) -> Sequence[int]:
    low, high = bounds or (numbers[0], numbers[-1])
    selected = [number for number in numbers if low <= number <= high]
    if len(selected) < 2:
        raise SelectionError(
            f"vary.layers={list(bounds or ())} leaves {len(selected)} of the layers {numbers[0]} "
            f"to {numbers[-1]}; variation needs two at least."
        )
    if high > numbers[-1]:
        raise SelectionError(
            f"vary.layers={[low, high]} goes beyond the layers, which are {numbers[0]} to "
            f"{numbers[-1]}."
        )
    return selected


class Shuffled:
    """A model of random weights: every tensor's own numbers, in random order.

    So it has the same shapes and the same distribution of numbers, gains of norms included,
    and nothing that layers could have in common but that.
    """

    def __init__(self, tensors: Tensors, seed: int) -> None:
        self._tensors, self._seed = tensors, seed
        self.names = tensors.names

    def read(self, name: str, rows: Rows | None = None, transposed: bool = False) -> Tensor:
        tensor = self._tensors.read(name, rows, transposed)
        seed = zlib.crc32(f"{name} {rows} {self._seed}".encode())
        order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed))
        return tensor.flatten()[order].view(tensor.shape)
