"""What precision costs: the same model stored and run in each dtype. After `make repro`:

    python benchmarks/precision.py [--set fit=svd_llm] [--calibration 16] [--evaluation 8]

The dense model is cast, calibrated on and fitted at a removed fraction of 0.2, in plain and in
interpolative storage; moments and decompositions are float64 whatever the dtype. Perplexities
are over the first windows of 512 tokens of the default text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from gathering import gather
from rich import box
from rich.console import Console
from rich.table import Table

from sharebasis import load_compressed
from sharebasis.classification import classify_model
from sharebasis.config import compose_settings
from sharebasis.decomposition import decompose
from sharebasis.fitting import fit
from sharebasis.hub import DTYPES, load_model, load_tokenizer
from sharebasis.resources import pick_device
from sharebasis.settings import Settings, Storage
from sharebasis.source import extract, find_source
from sharebasis.splitting import rows_by_sublayer, split_selected
from sharebasis.stage import WEIGHTS
from sharebasis.texts import read_windows
from sharebasis.verification import compare, lossless_difference


def run(work: Path, settings: Settings) -> Iterator[list[str]]:
    """A row of the table for every storage."""
    device, dtype = pick_device(settings.device), settings.model.dtype
    tokenizer, batch = load_tokenizer(WEIGHTS), settings.data.batch
    calibration = read_windows(tokenizer, settings.data, "calibration", settings.seed)
    evaluation = read_windows(tokenizer, settings.data, "evaluation", settings.seed)
    cast, weights, spectra = work / "cast", work / "weights", work / "spectra"
    load_model(WEIGHTS, dtype, torch.device("cpu")).save_pretrained(cast)
    tokenizer.save_pretrained(cast)
    extract(find_source(str(cast)), weights)
    dense = load_model(weights, dtype, device)
    model = classify_model(dense)
    parts = split_selected(model, "none")
    lossless = lossless_difference(dense, rows_by_sublayer(parts), evaluation[:1])
    moments = gather(weights, work, settings, model, calibration)
    decompose(weights, parts, moments, settings.fit, spectra, device)
    for storage in get_args(Storage):
        chosen = replace(settings.fit, storage=storage)
        fit(weights, spectra, chosen, work / storage, device, moments)
    dense = load_model(weights, dtype, device)
    models = {own: load_compressed(work / own, device=device) for own in get_args(Storage)}
    for storage, fidelity in compare(dense, models, evaluation, batch).items():
        size = sum(path.stat().st_size for path in (work / storage).glob("*.safetensors"))
        yield [
            dtype,
            f"{lossless:.0e}",
            f"{fidelity.dense_perplexity:.3f}",
            storage,
            f"{fidelity.compressed_perplexity:.3f}",
            f"{size / 1e6:.0f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", nargs="*", default=[], help="overrides, such as fit=svd_llm")
    parser.add_argument("--calibration", type=int, default=16, help="windows")
    parser.add_argument("--evaluation", type=int, default=8, help="windows")
    arguments = parser.parse_args()
    overrides = [
        *arguments.set,
        f"data.calibration.windows={arguments.calibration}",
        f"data.evaluation.windows={arguments.evaluation}",
    ]
    settings = compose_settings(overrides)
    table = Table(box=box.MARKDOWN)
    for column in ("dtype", "lossless wrap", "perplexity, dense", "storage", "compressed", "MB"):
        table.add_column(column, justify="right" if table.columns else "left")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as work:
            own = replace(settings, model=replace(settings.model, dtype=dtype))
            for row in run(Path(work), own):
                table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
