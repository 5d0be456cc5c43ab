"""Tables as CSV, and counts as text."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table as CSV, with a head and plain line ends."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def csv_rows(text: str) -> list[dict[str, str]]:
    """The rows of a table as CSV, by the names of its head."""
    return list(csv.DictReader(io.StringIO(text)))


def counted(counts: Mapping[str, int]) -> str:
    """How many there are of each kind, the most frequent first: `17 dense, 13 masked`."""
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {kind}" for kind, n in most_first if n)
