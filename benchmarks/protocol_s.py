"""Protocol S: our baselines beside their authors' own code, on the same model and text.

Calibrates once on the first 128 windows of 512 tokens of one file, fits every method at
every budget, and evaluates all of them on the first 64 windows of another. The published
column was measured with the official repositories of Basis Sharing and SVD-LLM on the same
weights and files (dense perplexity 29.53).

    python benchmarks/protocol_s.py --calibration train.txt --evaluation test.txt
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from sharebasis import store
from sharebasis.calibration import calibrate, run_identity
from sharebasis.checkpoint import Checkpoint
from sharebasis.classification import classify_model
from sharebasis.compressed import load_compressed
from sharebasis.config import compose_params, parse_settings
from sharebasis.fidelity import Fidelity
from sharebasis.fitting import fit, fit_metrics
from sharebasis.hub import load_config, load_model, load_tokenizer, meta_model
from sharebasis.moment_store import MomentStore, write_moments
from sharebasis.resources import pick_device
from sharebasis.settings import Settings
from sharebasis.source import extract, find_source
from sharebasis.splitting import split_selected
from sharebasis.stage import report_errors
from sharebasis.sublayer import Classification
from sharebasis.texts import read_windows
from sharebasis.verification import compare

PUBLISHED = {
    ("basis_sharing", 0.2): (0.2004, 91.69),
    ("basis_sharing", 0.3): (0.3012, 159.61),
    ("basis_sharing", 0.4): (0.4007, 279.53),
    ("basis_sharing", 0.5): (0.5009, 441.68),
    ("svd_llm", 0.2): (0.2006, 90.40),
    ("svd_llm", 0.3): (0.3012, 138.15),
    ("svd_llm", 0.4): (0.4013, 259.59),
    ("svd_llm", 0.5): (0.5008, 424.32),
}
"""(method, removed fraction asked for) -> (removed fraction, perplexity) of the official code."""


def settings_of(arguments: argparse.Namespace, method: str, removed: float) -> Settings:
    overrides = [
        "experiment=protocol_s",
        f"fit={method}",
        f"fit.removed={removed}",
        f"data.calibration.path={arguments.calibration}",
        f"data.evaluation.path={arguments.evaluation}",
    ]
    return parse_settings(yaml.safe_load(compose_params(overrides=overrides)), str(overrides))


def gather(work: Path, settings: Settings, model: Classification) -> None:
    """Calibrate into `work`, or go on where an earlier run was stopped."""
    weights = work / "weights"
    windows = read_windows(load_tokenizer(weights), settings.data, "calibration", settings.seed)
    batch = settings.data.batch
    identity = run_identity(weights, model.selected, windows, batch=batch)
    checkpoint = Checkpoint(work / "checkpoint", identity, 60)
    dense = load_model(weights, "float32", pick_device(settings.device))
    write_moments(work / "moments", *calibrate(dense, model.selected, windows, batch, checkpoint))
    checkpoint.remove()


def fit_all(arguments: argparse.Namespace) -> None:
    """Every method at every budget, on one calibration."""
    settings = settings_of(arguments, "svd", 0.2)
    weights = arguments.work / "weights"
    extract(find_source(settings.model.source), weights)
    model = classify_model(meta_model(load_config(weights)))
    gather(arguments.work, settings, model)
    parts, moments = split_selected(model, "none"), MomentStore(arguments.work / "moments")
    for method, asked in PUBLISHED:
        own, target = settings_of(arguments, method, asked), arguments.work / f"{method}-{asked}"
        fitted = fit(weights, parts, moments, own.fit, target, pick_device(own.device))
        store.write_json(target.with_suffix(f"{target.suffix}.json"), fit_metrics(fitted, own.fit))


def evaluate(arguments: argparse.Namespace) -> Mapping[str, Fidelity]:
    """All fits against the dense model, by their names."""
    settings = settings_of(arguments, "svd", 0.2)
    weights, device = arguments.work / "weights", pick_device(settings.device)
    names = [f"{method}-{asked}" for method, asked in PUBLISHED]
    compressed = {name: load_compressed(arguments.work / name, device=device) for name in names}
    windows = read_windows(load_tokenizer(weights), settings.data, "evaluation", settings.seed)
    dense = load_model(weights, "float32", device)
    return compare(dense, compressed, windows, settings.data.batch)


def report(arguments: argparse.Namespace, fidelity: Mapping[str, Fidelity]) -> None:
    table = Table(title="Protocol S: perplexity")
    for column in ("method", "removed", "by us", "perplexity", "ours", "ratio"):
        table.add_column(column, justify="right" if table.columns else "left")
    for (method, asked), (their_removed, theirs) in PUBLISHED.items():
        name = f"{method}-{asked}"
        removed = store.read_json(arguments.work / f"{name}.json")["removed_fraction"]
        ours = fidelity[name].compressed_perplexity
        table.add_row(
            method,
            f"{their_removed:.4f}",
            f"{removed:.4f}",
            f"{theirs:.2f}",
            f"{ours:.2f}",
            f"{ours / theirs:.4f}",
        )
    console = Console()
    console.print(table)
    console.print(f"dense perplexity {next(iter(fidelity.values())).dense_perplexity:.2f}")


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", required=True, help="WikiText-2 raw, training split")
    parser.add_argument("--evaluation", required=True, help="WikiText-2 raw, test split")
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmarks/protocol_s"))
    parser.add_argument(
        "--evaluate-only", action="store_true", help="take the fits that an earlier run has left"
    )
    arguments = parser.parse_args()
    if not arguments.evaluate_only:
        fit_all(arguments)
    report(arguments, evaluate(arguments))


if __name__ == "__main__":
    logging.captureWarnings(True)
    main()
