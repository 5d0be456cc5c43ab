"""What precision costs: one fit in either storage, run in each dtype. After `make repro`:

    python benchmarks/precision.py [--evaluation 8] [--dtypes float32 bfloat16]

Fitted at the default removed fraction from the moments and factors that are there. Perplexities
are over the first windows of 512 tokens of the default text.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich import box
from rich.console import Console
from rich.table import Table

from sharebasis import load_compressed
from sharebasis.config import compose_settings
from sharebasis.fitting import fit
from sharebasis.hub import DTYPES, load_model, load_tokenizer
from sharebasis.moment_store import MomentStore
from sharebasis.resources import pick_device
from sharebasis.settings import Settings, Storage
from sharebasis.stage import MOMENTS, SPECTRA, WEIGHTS, report_errors
from sharebasis.texts import read_windows
from sharebasis.verification import compare

STORAGES = get_args(Storage)


def fit_all(work: Path, settings: Settings) -> None:
    for storage in STORAGES:
        chosen, device = replace(settings.fit, storage=storage), pick_device(settings.device)
        fit(WEIGHTS, SPECTRA, chosen, work / storage, device, MomentStore(MOMENTS))


def measure(work: Path, settings: Settings, dtypes: list[str]) -> Table:
    device = pick_device(settings.device)
    windows = read_windows(load_tokenizer(WEIGHTS), settings.data, "evaluation", settings.seed)
    table = Table(box=box.MARKDOWN)
    for column in ("dtype", "perplexity, dense", "storage", "compressed", "KL per token"):
        table.add_column(column, justify="right" if table.columns else "left")
    for name, dtype in ((own, DTYPES[own]) for own in DTYPES if own in dtypes):
        models = {own: load_compressed(work / own, dtype, device) for own in STORAGES}
        dense = load_model(WEIGHTS, name, device)
        for storage, found in compare(dense, models, windows, settings.data.batch).items():
            perplexities = found.dense_perplexity, found.compressed_perplexity
            before, after = (f"{own:.3f}" for own in perplexities)
            table.add_row(name, before, storage, after, f"{found.kl_mean:.4f}")
    return table


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluation", type=int, default=8, help="windows")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    arguments = parser.parse_args()
    settings = compose_settings([f"data.evaluation.windows={arguments.evaluation}"])
    with tempfile.TemporaryDirectory() as work:
        fit_all(Path(work), settings)
        Console(width=100).print(measure(Path(work), settings, arguments.dtypes))


if __name__ == "__main__":
    main()
