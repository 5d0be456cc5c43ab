"""plots/fit against the metrics of the fit and the singular values of the weights."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeDirectory, MakeSettings

from sharebasis.architecture.parts import split_selected
from sharebasis.config.fit import FitSettings
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, meta_model
from sharebasis.model.part_weights import read_part
from sharebasis.spectra.store import Spectra
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel, fit_metrics
from sharebasis.stages.fit.tables import STEPS, ranks_csv, spectrum_csv

CPU = torch.device("cpu")
CASES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "alone": ("llama", "none", {"fit.group_size": 1, "fit.shared": []}),
    "heads": ("llama", "heads", {"fit.group_size": 1, "fit.shared": []}),
    "dense": (
        "llama",
        "none",
        {"fit.group_size": 1, "fit.shared": [], "fit.exclude": [".*v_proj"]},
    ),
    "experts": ("mixtral", "none", {"fit.group_size": 1, "fit.shared": []}),
}


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest,
    make_directory: MakeDirectory,
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[FittedModel, FitSettings, Path, Path]:
    """A small model, its plain SVD at 0.4, its weights and spectra."""
    family, strategy, changes = CASES[request.param]
    settings = make_settings({"fit.method": "svd", "fit.removed": 0.4, **changes}).fit
    weights, target = make_directory(family), tmp_path_factory.mktemp("fit")
    found = classify_model(meta_model(load_config(weights)))
    parts = split_selected(found, strategy)  # type: ignore[arg-type]
    decompose(weights, found, parts, None, settings, target / "spectra", CPU)
    fitted = fit(weights, target / "spectra", settings, target / "compressed", CPU, None)
    return fitted, settings, weights, target / "spectra"


def _rows(table: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table)))


def test_the_cells_sum_to_what_the_metrics_say(case: Any) -> None:
    fitted, settings, _, _ = case
    metrics = fit_metrics(fitted, settings)
    rows = _rows(ranks_csv(fitted))
    assert len({(row["family"], row["layer"]) for row in rows}) == len(rows)
    for family, own in metrics["families"].items():
        cells = [row for row in rows if row["family"] == family]
        assert sum(int(row["stored"]) for row in cells) == own["stored_numbers"]
        assert sum(int(row["original"]) for row in cells) == own["original_numbers"]
        assert sum(int(row["parts"]) for row in cells) == own["n_groups"]
        assert sum(own["forms"].values()) == own["n_groups"]
        ranks = [float(row["rank"]) for row in cells if row["rank"]]
        if set(own["forms"]) == {"dense"}:
            assert (ranks, own["min_rank"], own["max_rank"]) == ([], None, None)
        else:
            assert own["min_rank"] <= min(ranks) <= max(ranks) <= own["max_rank"]


def test_a_shared_basis_counts_for_each_part_that_uses_it(
    llama_directory: Path, make_settings: MakeSettings, tmp_path: Path
) -> None:
    changes = {"fit.method": "basis_sharing", "fit.group_size": 2, "fit.shared": ["q"]}
    settings = make_settings(changes).fit
    found = classify_model(meta_model(load_config(llama_directory)))
    parts = split_selected(found, "none")
    plain = replace(settings, method="svd")
    decompose(llama_directory, found, parts, None, plain, tmp_path / "s", CPU)
    fitted = fit(llama_directory, tmp_path / "s", settings, tmp_path / "out", CPU, None)
    (shared, *_) = [one for one in fitted.groups if len(one.group.parts) == 2]
    stored = {(row["family"], row["layer"]): int(row["stored"]) for row in _rows(ranks_csv(fitted))}
    layers = [str(part.sublayer.layer) for part in shared.group.parts]
    assert layers == ["0", "1"]
    assert [stored["q", layer] for layer in layers] == [shared.n_stored / 2] * 2


def test_the_spectrum_is_that_of_the_weights(case: Any) -> None:
    fitted, _, weights, spectra = case
    dense = DenseWeights(weights)
    tails: dict[tuple[str, int], np.ndarray] = {}
    for one in fitted.groups:
        (part,) = one.group.parts
        values = torch.linalg.svdvals(read_part(dense, part).double()).square().numpy()
        ranks = [step * len(values) // STEPS for step in range(STEPS)]
        own = np.array([values[rank:].sum() for rank in ranks])
        key = part.family, part.sublayer.layer
        tails[key] = tails.get(key, 0) + own
    energies = list(Spectra(spectra).energies.values())
    rows = _rows(spectrum_csv([one.group for one in fitted.groups], energies))
    assert len(rows) == STEPS * len(tails)
    for row in rows:
        own = tails[row["family"], int(row["layer"])]
        left = own[round(float(row["rank_fraction"]) * STEPS)] / own[0]
        assert float(row["loss"]) == pytest.approx(left, rel=6e-4)  # four digits
