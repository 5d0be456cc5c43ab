"""What is lost at every budget: one decomposition, a fit and a comparison for each."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from rich.table import Table
from torch import Tensor

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import DType
from sharebasis.errors import BudgetError
from sharebasis.io.atomic import write_text
from sharebasis.io.tables import csv_text
from sharebasis.model.hub import DTYPES, load_model
from sharebasis.moments.store import MomentStore
from sharebasis.runtime.console import print_tables
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.verify.verify import compare

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A budget, and what it costs."""

    removed: float
    """Fraction of the selected sublayers' numbers that was asked for."""
    removed_fraction: float
    """The fraction that the stored files lack."""
    perplexity: float
    kl_mean: float
    """Mean over predictions of KL(original || compressed), in nats."""
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class LossCurve:
    """The original, and points in the order of their budgets."""

    dense_perplexity: float
    n_predictions: int
    points: tuple[CurvePoint, ...]


def measure_curve(
    weights: Path,
    spectra: Path,
    moments: MomentStore,
    sensitivity: Sensitivity,
    settings: FitSettings,
    removed: Sequence[float],
    windows: Int64[Tensor, "windows window"],
    batch: int,
    dtype: DType,
    scratch: Path,
    device: torch.device,
) -> LossCurve:
    """Fit one budget after the other, and compare each with the original.

    Memory holds the original and one compressed model, the disk one of them besides.

    Args:
        weights: artifacts/weights.
        spectra: artifacts/spectra, which holds every budget.
        moments: that they were made by.
        sensitivity: what the losses of every part count in the allocation.
        settings: everything but the budget.
        removed: the budgets, as fractions in (0, 1); at least one. Those that cannot be met are
            left out, with a warning.
        windows: token ids, one sequence a row.
        batch: windows a forward pass.
        dtype: arithmetic of the passes.
        scratch: directory for the compressed models; gone at the end.
        device: for fits and passes.

    Raises:
        BudgetError: none of the budgets can be met.
        WeightsError, StoreError: what is read is not usable.
    """
    original, points = load_model(weights, dtype, device), []
    try:
        for budget in sorted(removed):
            at_budget = replace(settings, removed=budget)
            try:
                fitted = fit(weights, spectra, at_budget, scratch, device, moments, sensitivity)
            except BudgetError as error:  # limits that suit fit.removed need not suit all of these
                log.warning("The curve goes without %g: %s", budget, error)
                refused = error
                continue
            model = load_compressed(scratch, DTYPES[dtype], device)
            fidelity = compare(original, {"compressed": model}, windows, batch)["compressed"]
            del model  # before there is another one
            points.append(
                CurvePoint(
                    budget,
                    fit_metrics(fitted, at_budget)["removed_fraction"],
                    fidelity.compressed_perplexity,
                    fidelity.kl_mean,
                    fidelity.top1_agreement,
                )
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not points:
        raise refused
    return LossCurve(fidelity.dense_perplexity, fidelity.n_predictions, tuple(points))


def curve_metrics(curve: LossCurve) -> dict[str, Any]:
    """metrics/curve.json: a section for each budget."""
    points = {f"{point.removed:g}": asdict(point) for point in curve.points}
    return {
        "dense": {"perplexity": curve.dense_perplexity},
        "n_predictions": curve.n_predictions,
        "points": points,
    }


def write_curve(path: Path, curve: LossCurve) -> None:
    """A row for each budget, the original first."""
    dense = CurvePoint(0.0, 0.0, curve.dense_perplexity, 0.0, 1.0)
    columns = [field.name for field in fields(CurvePoint)]
    rows = (asdict(point).values() for point in (dense, *curve.points))
    write_text(path, csv_text(columns, rows))


def print_curve(curve: LossCurve) -> None:
    """A table for a person."""
    table = Table(title=f"What a budget costs, over {curve.n_predictions:,} predictions")
    for column in ("asked", "removed", "perplexity", "KL per token, mean", "top-1 agreement"):
        table.add_column(column, justify="right")
    table.add_row("", "original", f"{curve.dense_perplexity:.2f}", "", "")
    for point in curve.points:
        table.add_row(
            f"{point.removed:g}",
            f"{point.removed_fraction:.4f}",
            f"{point.perplexity:.2f}",
            f"{point.kl_mean:.4f} nats",
            f"{point.top1_agreement:.1%}",
        )
    print_tables(table)
