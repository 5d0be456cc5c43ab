"""What is measured is what theory and another road say."""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import CORPUS, REPOSITORY, MakeSettings, with_changes
from safetensors.torch import load_file, save_file
from sensing import AUTO, PROBES, STRUCTURES, WINDOWS, Case, MakeCase, logits_of, maker
from small_pipeline import CPU, MakeSmallModel, pruned
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sharebasis.allocation.loss_weights import part_weight
from sharebasis.compressed.index import load_index
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.config.types import SplitStrategy
from sharebasis.io.records import save_record
from sharebasis.spectra.store import Spectra
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.sensitivity.corrections import cells_of
from sharebasis.stages.sensitivity.draft import compressed, wrap_parts
from sharebasis.stages.sensitivity.measure import measure_sensitivity
from sharebasis.stages.sensitivity.probes import probe


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, make_case: MakeCase) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module", params=STRUCTURES)
def any_case(request: pytest.FixtureRequest, case: Case, make_case: MakeCase) -> Case:
    """Neurons may go in the second, entries in the third."""
    plain = request.param == "private"
    return case if plain else make_case(case.family, structure=request.param)


@pytest.fixture(scope="module")
def make_case(
    small_model: MakeSmallModel,
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeCase:
    return maker(small_model, make_settings, tmp_path_factory)


# What is measured


def _divergence_of(case: Case, directory: Path, groups: Sequence[int]) -> float:
    """By torch's own divergence, from a model whose weights are written over by hand."""
    model = case.load()
    original, small = logits_of(model), open_compressed(directory)
    mlps = pruned(small.index)
    with torch.no_grad():
        for i in groups:
            group = small.index.groups[i]
            ((part,), (linear,)) = group.parts, small.linears(group)
            module: Any = model.get_submodule(part.sublayer)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            new = linear.dense()
            kept = [list(mlp.kept) for mlp in mlps if part.sublayer in mlp.reads]
            columns = [list(mlp.kept) for mlp in mlps if part.sublayer == mlp.down]
            if columns:
                weight[:] = 0
                weight[:, columns[0]] = new
            else:
                weight[kept[0] if kept else part.rows.numbers] = new
    p, q = (x.flatten(0, 1).double().log_softmax(-1) for x in (original, logits_of(model)))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True).item()


def test_a_probe_is_the_divergence_of_the_model_with_one_cell_compressed(
    any_case: Case, tmp_path: Path
) -> None:
    case = any_case
    fit(case.weights, case.spectra, case.fit, tmp_path / "small", CPU, case.moments)
    model = case.load()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with case.draft() as plan:
        cells = cells_of(plan.groups, 3)
        linears = wrap_parts(model, Spectra(case.spectra))
        found = probe(model, linears, plan, cells, WINDOWS[:3], 2, case.found.blocks)
    expected = [_divergence_of(case, tmp_path / "small", cell.groups) for cell in cells]
    assert max(expected) > 1e-3
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
    # Afterwards it is the model that it was.
    assert torch.equal(logits_of(model), logits_of(case.load()))
    assert all(torch.equal(before[name], own) for name, own in case.load().state_dict().items())


def test_with_all_cells_in_place_it_is_the_compressed_model(any_case: Case, tmp_path: Path) -> None:
    case, model = any_case, any_case.load()
    fit(case.weights, case.spectra, case.fit, tmp_path / "small", CPU, case.moments)
    index = load_index(tmp_path / "small")
    assert bool(pruned(index)) == ("neurons" in case.fit.structures)
    forms = {group.form for group in index.groups}
    assert ("masked" in forms) == ("sparse" in case.fit.structures)
    linears = wrap_parts(model, Spectra(case.spectra))
    with case.draft() as plan, compressed(linears, plan, range(len(plan.groups))):
        found = logits_of(model)
    wanted = logits_of(load_compressed(tmp_path / "small"))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (logits_of(model) - wanted).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("split", ["none", "qkv"])
def test_so_it_is_where_gate_and_up_are_one_weight(
    split: SplitStrategy, make_case: MakeCase, tmp_path: Path
) -> None:
    case = make_case("phi3", structure="neurons", split=split)
    test_with_all_cells_in_place_it_is_the_compressed_model(case, tmp_path)


def test_where_the_loss_is_small_half_of_it_is_the_divergence(
    small_model: MakeSmallModel, make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Labels drawn by the model, many of them: the Fisher information is the curvature.

    What is left is what K-FAC neglects; without the half, or the count of tokens, it would be
    off by 2 and more.
    """
    windows = torch.randint(1, 280, (256, 24), generator=torch.Generator().manual_seed(5))
    small = small_model("llama", windows=windows, batch=32, labels="model")
    own = replace(make_settings(AUTO).fit, removed=0.02, damping_gradients=0.0)
    small.decompose(tmp_path / "spectra", own)
    sensing = replace(PROBES, removed=0.02, runs=1, windows=16, batch=16)
    models = small.weights, tmp_path / "spectra", small.moments, small.classification
    scratch = tmp_path / "draft"
    one = measure_sensitivity(*models, windows[:16], sensing, own, "float32", scratch, CPU)
    assert one.ratio == pytest.approx(1.0, abs=0.35)


def _scaled(case: Case, target: Path, groups: set[int], factor: float) -> Case:
    """The same with wrong energies of some groups."""
    target.mkdir()
    for path in case.spectra.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for i in groups:
                if f"{i}.energies" in tensors:
                    tensors[f"{i}.energies"] = factor * tensors[f"{i}.energies"]
            save_file(tensors, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
    return replace(case, spectra=target)


def test_a_cell_whose_prediction_is_wrong_by_a_factor_gets_that_factor_back(
    case: Case, tmp_path: Path
) -> None:
    # Uniform ranks are the same whatever was predicted, and so is what is measured.
    uniform = {"allocation": "uniform", "removed": 0.4}
    right = case.measure(**uniform)
    groups = Spectra(case.spectra).baseline
    wrong_cell = max((one for one in right.cells if one.weight > 1e-6), key=lambda x: x.measured)
    wrong = {
        i
        for i, group in enumerate(groups)
        if (group.family, group.parts[0].sublayer.layer) == (wrong_cell.kind, wrong_cell.layers[0])
    }
    assert len(wrong) == wrong_cell.n_groups
    other = _scaled(case, tmp_path / "wrong", wrong, 7.0)
    found = other.measure(**uniform)
    for i, group in enumerate(groups):
        before, after = (part_weight(one, group.parts) * one.ratio for one in (right, found))
        change = before / after
        assert change == pytest.approx(7.0 if i in wrong else 1.0, rel=1e-4)
    # With its factor back, the allocation is what it would have been.
    true, planted = Spectra(case.spectra).energies, Spectra(other.spectra).energies
    for i, group in enumerate(groups):
        expected = right.ratio * part_weight(right, group.parts) * true[i]
        weighed = found.ratio * part_weight(found, group.parts) * planted[i]
        np.testing.assert_allclose(weighed, expected, rtol=1e-4)


# The stage


def test_the_stage_writes_weights_that_fit_reads(
    case: Case, make_settings: MakeSettings, params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("artifacts").mkdir()
    Path("artifacts/weights").symlink_to(case.weights)
    Path("artifacts/spectra").symlink_to(case.spectra)
    Path("artifacts/moments").symlink_to(case.model.moments_directory)
    save_record(Path("artifacts/sublayers.json"), case.found)
    Path("text.txt").write_text(CORPUS)
    ranges = []
    for by in ("none", "probes"):
        changes = {
            **AUTO,
            "sensitivity.by": by,
            "sensitivity.windows": 3,
            "sensitivity.window": 16,
            "sensitivity.clip": 2.0,
            "data.source": "files",
            "data.calibration.path": "text.txt",
            "data.evaluation.path": "nowhere.txt",  # never read
            "device": "cpu",
        }
        Path("params.yaml").write_text(yaml.safe_dump(with_changes(params, changes)))
        for stage in ("sensitivity", "fit"):
            runpy.run_path(str(REPOSITORY / "stages" / f"{stage}.py"), run_name="__main__")
        metrics = json.loads(Path("metrics/fit.json").read_text())["sensitivity"]
        assert metrics["by"] == json.loads(Path("artifacts/sensitivity.json").read_text())["by"]
        assert metrics["by"] == by
        ranges.append((metrics["min_weight"], metrics["max_weight"]))
    assert ranges[0] == (1.0, 1.0)
    low, high = ranges[1]
    assert 0.5 - 1e-9 <= low < 1 < high <= 2 + 1e-9
