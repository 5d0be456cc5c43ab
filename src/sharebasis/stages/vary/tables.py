"""The variation between layers as numbers: metrics/vary.json, artifacts/variation.csv, terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from sharebasis.config.analyse import VarySettings
from sharebasis.io.atomic import write_text
from sharebasis.io.tables import csv_text
from sharebasis.runtime.console import print_tables
from sharebasis.stages.vary.variation import Variation
from sharebasis.structures.layer_distances import COLUMNS


def variation_metrics(variation: Variation, settings: VarySettings) -> dict[str, Any]:
    """What metrics/vary.json says: each family over consecutive layers, and their ranking."""
    families = {
        family: _statistics(variation.over_depth(family)) for family in sorted(variation.families)
    }
    means = {family: numbers["mean"] for family, numbers in families.items() if numbers["count"]}
    return {
        "alignment": settings.alignment,
        "n_layers": len(variation.layers),
        "n_pairs": len(variation.measured),
        "n_units_left": sum(pair.n_left for pair in variation.measured.values()),
        "ranking": sorted(means, key=lambda family: means[family]),
        "families": families,
    }


def _statistics(series: Mapping[str, Sequence[float]]) -> dict[str, float | int]:
    """Of the aligned distances, and means of what they are compared with."""
    present = {name: [x for x in values if x == x] for name, values in series.items()}
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
    for pair, apart in variation.measured.items():
        random = variation.random.get(pair)
        for family, aligned in apart.aligned.items():
            of_random = random.aligned.get(family) if random else None
            rows.append((*pair, family, apart.unaligned[family], aligned, of_random))
    write_text(path, csv_text(COLUMNS, rows))
