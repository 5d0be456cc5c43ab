"""What precision costs: one fit in either storage, run in each dtype. After `make repro`:

    python benchmarks/precision.py [--evaluation 8] [--dtypes float32 bfloat16]

Fitted at the default removed fraction from the moments and factors that are there. Perplexities
are over the first windows of 512 tokens of the default text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich import box
from rich.table import Table

from sharebasis import load_compressed
from sharebasis.config.schema import Settings
from sharebasis.config.types import DType, Storage
from sharebasis.data.windows import read_windows
from sharebasis.model.hub import DTYPES, load_model, load_tokenizer
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compose import compose_settings
from sharebasis.pipeline.paths import MOMENTS, SPECTRA, WEIGHTS
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.console import print_tables
from sharebasis.runtime.devices import pick_device
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.verify.verify import compare

STORAGES = get_args(Storage)


def fit_all(work: Path, settings: Settings) -> None:
    device, moments = pick_device(settings.device), MomentStore(MOMENTS)
    for storage in STORAGES:
        fit(
            WEIGHTS,
            SPECTRA,
            replace(settings.fit, storage=storage),
            work / storage,
            device,
            moments,
        )


def measure(work: Path, settings: Settings, dtypes: Sequence[DType]) -> Table:
    device = pick_device(settings.device)
    windows = read_windows(load_tokenizer(WEIGHTS), settings.data, "evaluation", settings.seed)
    table = Table(box=box.MARKDOWN)
    for column in ("dtype", "perplexity, dense", "storage", "compressed", "KL per token"):
        table.add_column(column, justify="right" if table.columns else "left")
    for dtype in dtypes:
        dense = load_model(WEIGHTS, dtype, device)
        models = {own: load_compressed(work / own, DTYPES[dtype], device) for own in STORAGES}
        for storage, found in compare(dense, models, windows, settings.data.batch).items():
            table.add_row(
                dtype,
                f"{found.dense_perplexity:.3f}",
                storage,
                f"{found.compressed_perplexity:.3f}",
                f"{found.kl_mean:.4f}",
            )
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
        print_tables(measure(Path(work), settings, arguments.dtypes))


if __name__ == "__main__":
    main()
