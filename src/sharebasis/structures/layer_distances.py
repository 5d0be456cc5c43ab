"""artifacts/variation.csv: a row for every two layers and family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sharebasis.errors import StoreError
from sharebasis.io.tables import csv_rows

COLUMNS = ("first", "second", "family", "unaligned", "aligned", "random")

Pair = tuple[int, int]
"""The numbers of two layers, the smaller first."""

LayerDistances = Mapping[str, Mapping[Pair, float]]
"""Family -> two layers -> how far its weights are from each other."""


def read_table(path: Path) -> Mapping[str, LayerDistances]:
    """Read the distances: `unaligned`, `aligned` or `random` -> family -> two layers -> distance.

    Raises:
        StoreError: the file is missing or no such table.
    """
    columns: Mapping[str, dict[str, dict[Pair, float]]] = {name: {} for name in COLUMNS[3:]}
    try:
        for row in csv_rows(path.read_text(encoding="utf-8")):
            layers = int(row["first"]), int(row["second"])
            for name, families in columns.items():
                if row[name]:
                    families.setdefault(row["family"], {})[layers] = float(row[name])
    except FileNotFoundError:
        raise StoreError(f"{path} is missing; run the stage that writes it (dvc repro).") from None
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is no table of distances ({error}); remove it and run dvc repro."
        ) from None
    return columns
