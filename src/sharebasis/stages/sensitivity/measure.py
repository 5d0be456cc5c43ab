"""artifacts/weights, artifacts/spectra and calibration text -> artifacts/sensitivity.json."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from sharebasis.allocation.sensitivity import Sensitivity
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.analyse import SensitivitySettings
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import DType
from sharebasis.model.hub import load_model
from sharebasis.moments.store import MomentStore
from sharebasis.spectra.store import Spectra
from sharebasis.stages.sensitivity.corrections import cells_of, corrections
from sharebasis.stages.sensitivity.draft import draft, wrap_parts
from sharebasis.stages.sensitivity.probes import probe


def measure_sensitivity(
    weights: Path,
    spectra: Path,
    moments: MomentStore | None,
    classification: Classification,
    windows: Int64[Tensor, "windows window"],
    settings: SensitivitySettings,
    fit: FitSettings,
    dtype: DType,
    scratch: Path,
    device: torch.device,
) -> Sensitivity:
    """Compare what a draft is predicted to lose with what it loses, cell by cell.

    Args:
        weights: artifacts/weights.
        spectra: artifacts/spectra, of the same weights.
        moments: that the spectra were made by; without them, only the groups of the baseline.
        classification: of the model's sublayers.
        windows: token ids of the calibration text, one sequence a row.
        settings: how; not by none.
        fit: budget and storage of the draft.
        dtype: of the passes.
        scratch: a directory that the draft may lie in meanwhile.
        device: for the draft and the passes.

    Raises:
        BudgetError, SelectionError: the draft cannot be made; see `fit`.
        CalibrationError: what was measured gives no weights.
        WeightsError, StoreError: what is read is not usable.
    """
    budget = replace(fit, removed=settings.removed)
    with draft(weights, spectra, moments, budget, scratch, device) as draft_model:
        cells = cells_of(draft_model.groups, settings.runs)
        model = load_model(weights, dtype, device)
        linears = wrap_parts(model, Spectra(spectra))
        batch, blocks = settings.batch, classification.blocks
        measured = probe(model, linears, draft_model, cells, windows, batch, blocks)
    predicted = [sum(draft_model.losses[i] for i in cell.groups) / 2 for cell in cells]
    losses, ratio = corrections(cells, predicted, measured, settings.clip)
    parts = {
        part.name: loss.weight
        for cell, loss in zip(cells, losses, strict=True)
        for i in cell.groups
        for part in draft_model.groups[i].parts
    }
    n_predictions = windows[:, 1:].numel()
    how = settings.by, settings.removed, settings.clip
    return Sensitivity(*how, n_predictions, ratio, tuple(losses), parts)
