"""What precision costs: the same model stored and run in each dtype. After `make repro`:

    python benchmarks/precision.py [--calibration 16] [--evaluation 8]

The dense model is cast, calibrated on and fitted by svd_llm at a removed fraction of 0.2;
moments and decompositions are float64 whatever the dtype. Perplexities are over the first
windows of 512 tokens of the default text.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from sharebasis import load_compressed
from sharebasis.calibration import calibrate
from sharebasis.checkpoint import Checkpoint
from sharebasis.classification import classify_model
from sharebasis.config import compose_params, parse_settings
from sharebasis.decomposition import decompose
from sharebasis.fitting import fit
from sharebasis.hub import DTYPES, load_model, load_tokenizer
from sharebasis.moment_store import MomentStore, write_moments
from sharebasis.resources import pick_device
from sharebasis.settings import DType, Settings
from sharebasis.splitting import rows_by_sublayer, split_selected
from sharebasis.stage import WEIGHTS
from sharebasis.texts import read_windows
from sharebasis.verification import compare, lossless_difference


def run(work: Path, dtype: DType, settings: Settings) -> list[str]:
    """One row of the table."""
    device = pick_device(settings.device)
    tokenizer, batch = load_tokenizer(WEIGHTS), settings.data.batch
    calibration = read_windows(tokenizer, settings.data, "calibration", settings.seed)
    evaluation = read_windows(tokenizer, settings.data, "evaluation", settings.seed)
    load_model(WEIGHTS, dtype, torch.device("cpu")).save_pretrained(work / "weights")
    dense = load_model(work / "weights", dtype, device)
    model = classify_model(dense)
    parts = split_selected(model, "none")
    lossless = lossless_difference(dense, rows_by_sublayer(parts), evaluation[:1])
    checkpoint = Checkpoint(work / "checkpoint", {}, math.inf)
    write_moments(
        work / "moments", *calibrate(dense, model.selected, calibration, batch, checkpoint)
    )
    weights, spectra, moments = work / "weights", work / "spectra", MomentStore(work / "moments")
    decompose(weights, parts, moments, settings.fit, spectra, device)
    fit(weights, spectra, settings.fit, work / "small", device, moments)
    small = load_compressed(work / "small", device=device)
    dense = load_model(work / "weights", dtype, device)
    fidelity = compare(dense, {"small": small}, evaluation, batch)["small"]
    megabytes = sum(path.stat().st_size for path in (work / "small").glob("*.safetensors")) / 1e6
    return [
        dtype,
        f"{lossless:.0e}",
        f"{fidelity.dense_perplexity:.3f}",
        f"{fidelity.compressed_perplexity:.3f}",
        f"{megabytes:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=int, default=16, help="windows")
    parser.add_argument("--evaluation", type=int, default=8, help="windows")
    arguments = parser.parse_args()
    overrides = [
        "fit=svd_llm",
        f"data.calibration.windows={arguments.calibration}",
        f"data.evaluation.windows={arguments.evaluation}",
    ]
    settings = parse_settings(yaml.safe_load(compose_params(overrides=overrides)), str(overrides))
    table = Table(box=box.MARKDOWN)
    for column in ("dtype", "lossless wrap", "perplexity, dense", "compressed", "MB"):
        table.add_column(column, justify="right" if table.columns else "left")
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as work:
            table.add_row(*run(Path(work), dtype, settings))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
