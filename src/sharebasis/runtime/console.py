"""Tables for a person to read, in a terminal or in a log."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_tables(*tables: Table, width: int = 100) -> None:
    """Print tables as wide as the terminal; a log has no width of its own and gets `width`."""
    console = Console(width=None if Console().is_terminal else width)
    for table in tables:
        console.print(table)
