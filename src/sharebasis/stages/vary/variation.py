"""How much layers differ from each other, measured over a model."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from rich.table import Table
from torch import Tensor

from sharebasis.config.analyse import VarySettings
from sharebasis.errors import SelectionError
from sharebasis.gauge.alignment import Distances, distances
from sharebasis.gauge.layers import Layers
from sharebasis.gauge.tensors import Tensors
from sharebasis.io.atomic import write_text
from sharebasis.io.tables import csv_text
from sharebasis.linalg.rows import Rows
from sharebasis.runtime.console import print_tables
from sharebasis.runtime.progress import progress
from sharebasis.runtime.threads import in_parallel
from sharebasis.structures.layer_distances import COLUMNS, Pair, read_table

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
        return list(dict.fromkeys(x for pair in self.measured.values() for x in pair.aligned))

    @property
    def consecutive(self) -> Sequence[Pair]:
        return list(pairwise(self.layers))

    def matrix(self, family: str) -> Float64[np.ndarray, "layers layers"]:
        """Aligned distances of every two layers, symmetric; NaN where nothing was measured.

        Row and column i belong to layer `layers[i]`.
        """
        place = {layer: i for i, layer in enumerate(self.layers)}
        found = np.full((len(place), len(place)), np.nan)
        np.fill_diagonal(found, 0.0)
        for (first, second), pair in self.measured.items():
            if family in pair.aligned:
                i, j = place[first], place[second]
                found[i, j] = found[j, i] = pair.aligned[family]
        return found

    def over_depth(self, family: str) -> Mapping[str, Sequence[float]]:
        """`unaligned`, `aligned` and `random` of each layer and the next; NaN where missing."""
        of = {
            "unaligned": [self.measured[pair].unaligned for pair in self.consecutive],
            "aligned": [self.measured[pair].aligned for pair in self.consecutive],
            "random": [self.random[pair].aligned for pair in self.consecutive],
        }
        return {name: [x.get(family, float("nan")) for x in own] for name, own in of.items()}


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
    n_numbers = sum(x.numel() for own in layers.read(numbers[0]).families.values() for x in own)
    workers = torch.get_num_threads() if n_numbers <= SMALL else 1
    with progress("vary", len(pairs) + len(consecutive), "pairs") as advance:
        reading = Lock()  # a reader keeps what it has just converted

        def measure(of: Layers, pair: Pair) -> Distances:
            with reading:
                first, second = map(of.read, pair)
            found = distances(second, first, of.freedom(pair[1]), settings.alignment)
            advance()
            return found

        every = [*((layers, pair) for pair in pairs), *((shuffled, pair) for pair in consecutive)]
        found = list(in_parallel((partial(measure, *one) for one in every), workers))
        of_model, of_random = found[: len(pairs)], found[len(pairs) :]
        measured = dict(zip(pairs, of_model, strict=True))
        return Variation(numbers, measured, dict(zip(consecutive, of_random, strict=True)))


def _in_range(numbers: Sequence[int], bounds: Pair | None) -> Sequence[int]:
    low, high = bounds or (numbers[0], numbers[-1])
    chosen = [number for number in numbers if low <= number <= high]
    if len(chosen) < 2:
        raise SelectionError(
            f"vary.layers={list(bounds or ())} leaves {len(chosen)} of the layers {numbers[0]} to "
            f"{numbers[-1]}; variation needs two at least."
        )
    if high > numbers[-1]:
        raise SelectionError(
            f"vary.layers={[low, high]} goes beyond the layers, which are {numbers[0]} to "
            f"{numbers[-1]}."
        )
    return chosen


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


def variation_metrics(variation: Variation, settings: VarySettings) -> dict[str, Any]:
    """What metrics/vary.json says: each family over consecutive layers, and their ranking."""
    families = {
        family: _statistics(variation.over_depth(family)) for family in sorted(variation.families)
    }
    measured = {name: of for name, of in families.items() if of["count"]}
    return {
        "alignment": settings.alignment,
        "n_layers": len(variation.layers),
        "n_pairs": len(variation.measured),
        "n_units_left": sum(pair.n_left for pair in variation.measured.values()),
        "ranking": sorted(measured, key=lambda name: measured[name]["mean"]),
        "families": families,
    }


def _statistics(series: Mapping[str, Sequence[float]]) -> dict[str, float | int]:
    """Of the aligned distances, and means of what they are compared with."""
    present = {name: [x for x in own if x == x] for name, own in series.items()}
    aligned = present["aligned"]
    if not aligned:
        return {"count": 0}
    return {
        "mean": statistics.fmean(aligned),
        "min": min(aligned),
        "max": max(aligned),
        "std": statistics.pstdev(aligned),
        "count": len(aligned),
        "unaligned_mean": statistics.fmean(present["unaligned"]),
        "random_mean": statistics.fmean(present["random"]),
    }


def print_variation(metrics: Mapping[str, Any]) -> None:
    """Print what metrics/vary.json says, from the least to the most variation."""
    table = Table(title=f"Distance of consecutive layers, alignment {metrics['alignment']}")
    columns = ("mean", "min", "max", "std", "unaligned_mean", "random_mean")
    for column in ("family", *columns, "count"):
        title = column.replace("_mean", "")
        table.add_column(title, justify="left" if column == "family" else "right")
    for family in metrics["ranking"]:
        row = metrics["families"][family]
        table.add_row(family, *(f"{row[column]:.3f}" for column in columns), str(row["count"]))
    print_tables(table)


def write_distances(path: Path, variation: Variation) -> None:
    """Write every distance as CSV, a row for each pair and family."""
    rows: list[tuple[Any, ...]] = []
    for pair, found in variation.measured.items():
        random = variation.random.get(pair)
        for family, aligned in found.aligned.items():
            beside = random.aligned.get(family) if random else None
            rows.append((*pair, family, found.unaligned[family], aligned, beside))
    write_text(path, csv_text(COLUMNS, rows))


def read_distances(path: Path) -> Variation:
    """Read what `write_distances` wrote, which is all but random weights' unaligned distances.

    Raises:
        StoreError: the file is missing or no such table.
    """
    table = read_table(path)
    unaligned, aligned, random = (_by_pair(table[name]) for name in COLUMNS[3:])
    return Variation(
        sorted({layer for pair in aligned for layer in pair}),
        {pair: Distances(unaligned[pair], own, 0) for pair, own in aligned.items()},
        {pair: Distances({}, own, 0) for pair, own in random.items()},
    )


def _by_pair(
    families: Mapping[str, Mapping[Pair, float]],
) -> Mapping[Pair, Mapping[str, float]]:
    found: dict[Pair, dict[str, float]] = {}
    for family, pairs in families.items():
        for pair, distance in pairs.items():
            found.setdefault(pair, {})[family] = distance
    return found
