"""Protocol S: our baselines beside their authors' own code, on the same model and text.

Calibrates on the first 128 windows of 512 tokens of one file, once for all methods that ask for
the same gradients, fits every method at every budget, and evaluates all of them on the first 64
windows of another. What was removed is counted in the files. The published column was measured
with the official repositories of Basis Sharing, SVD-LLM and KFAC-SVD on the same weights and
files (dense perplexity 29.53).

A run that was stopped goes on where it was: only spectra and fits are made again.

    python benchmarks/protocol_s.py --calibration train.txt --evaluation test.txt
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from itertools import groupby
from math import prod
from operator import itemgetter
from pathlib import Path

from gathering import gather, make_once
from rich.table import Table
from safetensors import safe_open

from sharebasis.allocation.sensitivity import UNWEIGHED, Sensitivity
from sharebasis.architecture.parts import split_selected
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.schema import Settings
from sharebasis.data.windows import cut, read_windows
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import read_json, write_json
from sharebasis.linalg.fidelity import Fidelity
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, load_tokenizer, meta_model
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compose import compose_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.console import print_tables
from sharebasis.runtime.devices import pick_device
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.propagate.propagate import (
    propagate,
    propagation_identity,
    propagation_windows,
)
from sharebasis.stages.recover.recover import recover, recovery_identity, recovery_windows
from sharebasis.stages.sensitivity.measure import measure_sensitivity
from sharebasis.stages.verify.verify import compare

PUBLISHED: Mapping[tuple[str, float], tuple[float | None, float]] = {
    ("basis_sharing", 0.2): (0.2004, 91.69),
    ("basis_sharing", 0.3): (0.3012, 159.61),
    ("basis_sharing", 0.4): (0.4007, 279.53),
    ("basis_sharing", 0.5): (0.5009, 441.68),
    ("svd_llm", 0.2): (0.2006, 90.40),
    ("svd_llm", 0.3): (0.3012, 138.15),
    ("svd_llm", 0.4): (0.4013, 259.59),
    ("svd_llm", 0.5): (0.5008, 424.32),
    ("kfac", 0.2): (None, 74.7),  # uniform ranks
    ("kfac", 0.3): (None, 102.7),
    ("kfac", 0.4): (None, 155.0),
    ("kfac", 0.5): (None, 272.7),
}
"""(method, removed fraction asked for) -> (removed fraction, where it is known, and perplexity)
of the official code."""

ELSEWHERE: Mapping[str, Mapping[float, float]] = {
    "kfac with LEMS, official code": {0.2: 39.74, 0.5: 128.94},
}
"""What else there is to compare with."""

METHODS = {
    "svd": ["fit=svd"],
    "basis_sharing": ["fit=basis_sharing"],
    "svd_llm": ["fit=svd_llm"],
    "auto": ["fit=auto"],
    "asvd": ["fit=asvd"],
    "fwsvd": ["fit=fwsvd", "calibrate.gradients=text"],
    "kfac": ["fit=kfac", "calibrate.gradients=text"],
    "auto-one_sided": ["fit=auto", "fit.two_sided=false"],
    "auto-text": ["fit=auto", "calibrate.gradients=text"],
    "auto-uniform": ["fit=auto", "fit.structures=[private]", "fit.allocation=uniform"],
    "auto-private": ["fit=auto", "fit.structures=[private]"],
    "auto-factors": ["fit=auto", "fit.structures=[private,neurons]"],
    "auto-plain": ["fit=auto", "fit.storage=plain"],
    "auto-whole": ["fit=auto", "fit.value_gauge=false"],
    "auto-probes": ["fit=auto", "fit.structures=[private]", "sensitivity=probes"],
}
"""Method -> overrides; those of `auto` without one ingredient are the ablation."""

DERIVED = {
    "basis_sharing-updated": ("basis_sharing", "propagate=update"),
    "svd_llm-updated": ("svd_llm", "propagate=update"),
    "auto-propagated": ("auto", "propagate=regression"),
    "auto-recovered": ("auto", "recover=distill"),
    "auto-propagated-recovered": ("auto-propagated", "recover=distill"),
    "auto-factors-propagated": ("auto-factors", "propagate=regression"),
    "auto-factors-recovered": ("auto-factors", "recover=distill"),
}
"""Method -> the one whose models it goes on from, and the stage that does so."""

LARGE = 1e5
"""A perplexity above the size of the vocabulary: worse than no model, its digits say nothing."""

Point = tuple[str, float]
"""Method and the removed fraction asked for."""


def settings_of(arguments: argparse.Namespace, method: str, removed: float) -> Settings:
    *derived, root = lineage(method)
    overrides = [
        "experiment=protocol_s",
        *METHODS[root],
        *(DERIVED[own][1] for own in derived),
        f"fit.removed={removed}",
        f"data.calibration.path={arguments.calibration}",
        f"data.evaluation.path={arguments.evaluation}",
    ]
    return compose_settings(overrides)


def lineage(method: str) -> list[str]:
    """A method, that whose models it goes on from, and so on."""
    return [method, *(lineage(DERIVED[method][0]) if method in DERIVED else [])]


def points_of(arguments: argparse.Namespace) -> list[Point]:
    return [(method, removed) for method in arguments.methods for removed in arguments.removed]


def name_of(point: Point) -> str:
    return f"{point[0]}-{point[1]}"


def fit_all(arguments: argparse.Namespace) -> None:
    """Every method at every budget, on one calibration and one decomposition a method.

    What one method goes on from is made before it, asked for or not.
    """
    settings = settings_of(arguments, "auto", 0.2)
    work, device = arguments.work, pick_device(settings.device)
    extract(find_source(settings.model.source), work / "weights")
    model = classify_model(meta_model(load_config(work / "weights")))
    tokenizer = load_tokenizer(work / "weights")
    windows = read_windows(tokenizer, settings.data, "calibration", settings.seed)
    parts = split_selected(model, "none")
    for method in dict.fromkeys(own for one in arguments.methods for own in lineage(one)[::-1]):
        make = derive_one if method in DERIVED else fit_one
        if method not in DERIVED:
            first = settings_of(arguments, method, arguments.removed[0])
            moments = gather(work / "weights", gathered(work, first), first, model, windows)
            models = work / "weights", model, parts, moments
            decompose(*models, first.fit, work / "spectra", device)
        for removed in arguments.removed:
            make(work, settings_of(arguments, method, removed), (method, removed))


def gathered(work: Path, settings: Settings) -> Path:
    """Where the calibration of a method lies: one for all that ask for the same gradients."""
    return work / f"gradients-{settings.calibrate.gradients}"


def moments_of(work: Path, settings: Settings) -> MomentStore:
    return MomentStore(gathered(work, settings) / "moments")


def fit_one(work: Path, settings: Settings, point: Point) -> None:
    moments, sensitivity = moments_of(work, settings), sense(work, settings)
    models = work / "weights", work / "spectra", settings.fit, work / name_of(point)
    fitted = fit(*models, pick_device(settings.device), moments, sensitivity)
    write_json(work / f"{name_of(point)}.json", fit_metrics(fitted, settings.fit))


def derive_one(work: Path, settings: Settings, point: Point) -> None:
    method, removed = point
    source, override = DERIVED[method]
    step = propagate_one if override.startswith("propagate") else recover_one
    step(work, settings, work / name_of((source, removed)), work / name_of(point))


def propagate_one(work: Path, settings: Settings, source: Path, target: Path) -> None:
    weights, own, device = work / "weights", settings.propagate, pick_device(settings.device)
    windows = propagation_windows(load_tokenizer(source), settings.data, own, settings.seed)
    identity = propagation_identity(weights, source, windows, own, settings.fit)
    checkpoint = Checkpoint(work / "propagation", identity, own.checkpoint_seconds)
    model = classify_model(meta_model(load_config(weights)))
    models = weights, model, source, moments_of(work, settings)
    rest = own, settings.fit, checkpoint, target, device
    make_once(target, checkpoint, lambda: propagate(*models, windows, *rest))


def recover_one(work: Path, settings: Settings, source: Path, target: Path) -> None:
    weights, own, seed = work / "weights", settings.recover, settings.seed
    windows = recovery_windows(load_tokenizer(source), settings.data, own, seed)
    identity = recovery_identity(weights, source, windows, own, seed=seed)
    checkpoint = Checkpoint(work / "recovery", identity, own.checkpoint_seconds)
    rest = checkpoint, target, settings.fit.shard_bytes, pick_device(settings.device)
    make_once(target, checkpoint, lambda: recover(weights, source, windows, own, seed, *rest))


def sense(work: Path, settings: Settings) -> Sensitivity:
    own, weights, device = settings.sensitivity, work / "weights", pick_device(settings.device)
    if own.by == "none":
        return UNWEIGHED
    data = cut(settings.data, "calibration", own.windows, own.window)
    windows = read_windows(load_tokenizer(weights), data, "calibration", settings.seed)
    model, dtype = classify_model(meta_model(load_config(weights))), settings.model.dtype
    artefacts = weights, work / "spectra", moments_of(work, settings), model
    return measure_sensitivity(
        *artefacts, windows, own, settings.fit, dtype, work / "draft", device
    )


def evaluate(arguments: argparse.Namespace) -> Mapping[str, Fidelity]:
    """All fits against the dense model, by their names; those of one method are in memory."""
    settings = settings_of(arguments, "auto", 0.2)
    weights, device = arguments.work / "weights", pick_device(settings.device)
    windows = read_windows(load_tokenizer(weights), settings.data, "evaluation", settings.seed)
    dense, found = load_model(weights, "float32", device), dict[str, Fidelity]()
    for _, points in groupby(points_of(arguments), key=itemgetter(0)):
        names = map(name_of, points)
        own = {name: load_compressed(arguments.work / name, device=device) for name in names}
        found |= compare(dense, own, windows, settings.data.batch)
    return found


def removed_fraction(work: Path, point: Point) -> float:
    """By what the files of the original and of a compressed model hold."""
    *_, root = lineage(point[0])
    selected = read_json(work / f"{name_of((root, point[1]))}.json")["original_numbers"]
    return (n_numbers(work / "weights") - n_numbers(work / name_of(point))) / selected


def n_numbers(directory: Path) -> int:
    """In the safetensors files of a model, pivots included."""
    n = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 - no mapping
            n += sum(prod(own.get_shape()) for own in tensors)
    return n


def report(arguments: argparse.Namespace, fidelity: Mapping[str, Fidelity]) -> None:
    """A row a method, below it one of its authors' own code; in brackets, what was removed.

    At the end what was measured elsewhere.
    """
    table = Table(title="Protocol S: perplexity (fraction removed)")
    for column in ("method", *map(str, arguments.removed)):
        table.add_column(column, justify="right" if table.columns else "left")
    for method, points in groupby(points_of(arguments), key=itemgetter(0)):
        own = list(points)
        found = ((fidelity[name_of(one)], removed_fraction(arguments.work, one)) for one in own)
        table.add_row(method, *(cell(one.compressed_perplexity, part) for one, part in found))
        if any(point in PUBLISHED for point in own):
            theirs = (PUBLISHED.get(point, (None, None)) for point in own)
            table.add_row(
                "  official code", *(cell(value, part) if value else "" for part, value in theirs)
            )
    table.add_section()
    for what, known in ELSEWHERE.items():
        values = (known.get(removed) for removed in arguments.removed)
        table.add_row(what, *("" if value is None else f"{value:.2f}" for value in values))
    print_tables(table)
    print(f"dense perplexity {next(iter(fidelity.values())).dense_perplexity:.2f}")


def cell(perplexity: float, removed: float | None) -> str:
    shown = f"{perplexity:.2f}" if perplexity < LARGE else f"{perplexity:.1e}"
    return f"{shown} ({'?' if removed is None else f'{removed:.4f}'})"


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", required=True, help="WikiText-2 raw, training split")
    parser.add_argument("--evaluation", required=True, help="WikiText-2 raw, test split")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*METHODS, *DERIVED],
        default=["basis_sharing", "svd_llm", "auto"],
    )
    parser.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5])
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
