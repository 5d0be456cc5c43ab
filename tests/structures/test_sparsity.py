"""Weights that lack entries, from the moments to a model that runs."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import AUTO, Calibrate, Calibrated, fit_settings, maker
from conftest import MakeSettings
from propagating import AUTO as PROPAGATING
from propagating import Case, MakeCase, n_stored
from propagating import maker as case_maker
from small_pipeline import MakeSmallModel, MakeSmallPipeline, tokens
from torch import Tensor, nn
from torch.nn import functional

from sharebasis.compressed import loader
from sharebasis.compressed.index import load_index
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import SplitStrategy
from sharebasis.errors import BudgetError, SettingsError
from sharebasis.forms.masked import Masked
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.sparsity_curve import SparsityCurve
from sharebasis.model.hub import load_model
from sharebasis.model.surgery import weight_of
from sharebasis.pipeline.compose import compose_settings
from sharebasis.stages.fit.metrics import FittedModel, fit_metrics
from sharebasis.stages.fit.tables import ranks_csv
from sharebasis.stages.recover.distill import distill
from sharebasis.stages.recover.muon import Muon
from sharebasis.stages.recover.outcome import Recovery
from sharebasis.stages.recover.recover import write_recovered
from sharebasis.stages.recover.trainable import named_parameters, supports, trainable
from sharebasis.structures.sparse import Sparse, curve_of

CPU = torch.device("cpu")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# From the moments to a model


@pytest.fixture
def calibrated(small_model: MakeSmallModel, tmp_path: Path) -> Calibrate:
    return maker(small_model, tmp_path)


OWN = {"structures": ["private", "sparse"], "removed": 0.2}


def _settings(make_settings: MakeSettings, **changes: Any) -> FitSettings:
    return fit_settings(make_settings, **{**OWN, **changes})


FAMILIES: Mapping[str, tuple[str, SplitStrategy]] = {
    "llama": ("llama", "none"),
    "transposed and fused": ("gpt2", "none"),
    "cut": ("gpt2", "qkv"),
    "interleaved": ("gpt_neox", "heads"),
    "experts": ("mixtral", "none"),
}


@torch.no_grad()
@pytest.mark.parametrize(("family", "split"), FAMILIES.values(), ids=FAMILIES)
def test_reported_losses_are_those_of_the_stored_weights(
    family: str, split: SplitStrategy, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated(family)
    settings = _settings(make_settings, damping_inputs=0.0, damping_gradients=0.0)
    fitted = run.fit(settings, split=split)
    _assert_sizes(run, fitted, settings)
    dense = load_model(run.weights, "float32", CPU)
    small = load_compressed(run.directory / "small")
    sparse = [one for one in fitted.groups if one.group.structure == "sparse"]
    assert len(sparse) > len(fitted.groups) / 2
    for one in sparse:
        (part,) = one.group.parts
        if part.sublayer.expert is not None:  # whose names in a dense model are others
            continue
        name, rows = part.sublayer.name, part.rows.numbers
        error = weight_of(dense.get_submodule(name))[rows].double()
        error = error - weight_of(small.get_submodule(name))[rows].double()
        inputs = run.moments.read(run.moments.site(name)).second
        g = run.moments.gradient(name).total[rows][:, rows] / run.moments.n_tokens
        loss = (g @ error @ inputs * error).sum().item()
        assert one.loss == pytest.approx(loss, rel=1e-3, abs=1e-6 * one.energy)
        assert one.form == "masked"


def _assert_sizes(run: Calibrated, fitted: FittedModel, settings: FitSettings) -> None:
    """The budget is exact, by the files."""
    metrics = fit_metrics(fitted, settings)
    assert metrics["removed_fraction"] == pytest.approx(settings.removed, abs=2e-3)
    assert metrics["removed_fraction"] >= settings.removed - 1e-9
    told = sum(one.n_stored for one in fitted.groups) + fitted.n_others_stored
    assert n_stored(run.directory / "small") == told
    rows = list(csv.DictReader(io.StringIO(ranks_csv(fitted))))
    for family, own in metrics["families"].items():
        n_masked = own["forms"].get("masked", 0)
        assert n_masked == own["structures"].get("sparse", 0)
        n_ranked = sum(own["forms"].get(kind, 0) for kind in ("low_rank", "interpolative"))
        assert (own["min_rank"] is None) == (n_ranked == 0)
        without_rank = [not row["rank"] for row in rows if row["family"] == family]
        assert all(without_rank) == (n_ranked == 0)


@torch.no_grad()
def test_entries_that_are_zero_go_and_nothing_is_lost(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    def thin(model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(5)
        for name, own in model.named_parameters():
            if "layers" in name and own.ndim == 2:
                own[torch.rand(own.shape, generator=generator) < 0.4] = 0

    run = calibrated("llama", thin)
    fitted = run.fit(_settings(make_settings, removed=0.3))
    assert Counter(one.group.structure for one in fitted.groups).most_common(1)[0][0] == "sparse"
    dense, small = load_model(run.weights, "float32", CPU), load_compressed(run.directory / "small")
    wanted = dense(input_ids=tokens(4, 1)).logits
    torch.testing.assert_close(
        small(input_ids=tokens(4, 1)).logits, wanted, rtol=0, atol=1e-3 * wanted.abs().max().item()
    )


def test_matrices_that_are_zero_lose_nothing_and_stop_nothing(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    """Their outputs, and so the inputs of others, are zero, too."""

    def silent(model: nn.Module) -> None:
        for name in ("layers.0.self_attn.v_proj", "layers.1.self_attn.o_proj"):
            model.get_submodule(f"model.{name}").weight.zero_()
        model.get_submodule("model.layers.2.self_attn.o_proj").weight.zero_()

    run = calibrated("llama", silent)
    structures = ["private", "neurons", "sparse", "shared:2"]
    settings = _settings(make_settings, removed=0.3, structures=structures, shared=["o"])
    fitted = run.fit(settings)
    assert all(math.isfinite(one.loss) for one in fitted.groups)
    silent_group = [one for one in fitted.groups if len(one.group.parts) == 2]
    assert [one.loss for one in silent_group] == [0.0] * len(silent_group)
    lost = {one.group.parts[0].sublayer.name: one.loss for one in fitted.groups}
    assert lost["model.layers.0.self_attn.v_proj"] == pytest.approx(0, abs=1e-12)
    assert fit_metrics(fitted, settings)["removed_fraction"] == pytest.approx(0.3, abs=2e-3)
    assert load_compressed(run.directory / "small")(input_ids=tokens(1)).logits.isfinite().all()


def test_limits_that_no_rank_meets_are_met_by_entries(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama")
    limits = [{"sublayers": "k", "floor": 0.75, "cap": 0.95}]
    changes = {"removed": 0.2, "rank_multiple": 8, "limits": limits}
    fitted = run.fit(_settings(make_settings, structures=["private", "sparse"], **changes))
    kept = {one.n_stored / one.n_original for one in fitted.groups if one.group.family == "k"}
    assert all(0.75 <= own <= 0.95 for own in kept)
    with pytest.raises(BudgetError, match=r"k_proj can be stored in no way that its limits allow"):
        run.fit(_settings(make_settings, structures=["private"], **changes))


def test_more_to_choose_from_never_loses_more(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama")
    for removed in (0.2, 0.4, 0.6):
        losses = []
        for structures in (["private"], ["private", "neurons"], ["private", "neurons", "sparse"]):
            settings = _settings(make_settings, removed=removed, structures=structures)
            fitted = run.fit(settings)
            _assert_sizes(run, fitted, settings)
            losses.append(sum(one.loss for one in fitted.groups))
        assert losses == sorted(losses, reverse=True)


def test_values_are_in_the_gauge_only_where_outputs_have_all_entries(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama")
    outputs = {True: 0, False: 0}
    for removed in (0.05, 0.3, 0.6, 0.8):
        fitted = run.fit(_settings(make_settings, removed=removed, value_gauge=True))
        of = {one.group.parts[0].sublayer.name: one for one in fitted.groups}
        for name, own in of.items():
            if own.form == "fixed_columns":
                output = of[name.replace("v_proj", "o_proj")]
                assert output.group.structure != "sparse"
                outputs[True] += 1
            elif name.endswith("v_proj"):
                outputs[False] += 1
        _assert_sizes(run, fitted, _settings(make_settings, removed=removed))
    assert min(outputs.values()) > 0


def test_limits_hold(calibrated: Calibrate, make_settings: MakeSettings) -> None:
    run = calibrated("llama")
    limits = [{"sublayers": "up", "floor": 0.9, "cap": 1.0}]
    exclude = [r".*layers\.0\.mlp\.down_proj"]
    settings = _settings(make_settings, limits=limits, exclude=exclude, rank_multiple=4)
    found = {one.group.parts[0].sublayer.name: one for one in run.fit(settings).groups}
    assert found["model.layers.0.mlp.down_proj"].form == "dense"
    ups = [one for name, one in found.items() if name.endswith("up_proj")]
    assert all(one.n_stored >= 0.9 * one.n_original for one in ups)
    for one in found.values():
        assert one.form in ("masked", "dense") or (one.rank or 1) % 4 == 0


def test_a_curve_says_what_is_stored_and_weighs_its_loss(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama")
    run.fit(_settings(make_settings))
    cell = run.cells(Sparse)[0]
    measured = SparsityCurve(*cell.read("curve").tolist())
    (n_kept, once), (_, twice) = (curve_of(cell.cell, measured, weight) for weight in (1.0, 2.0))
    n = cell.cell.n_weights
    assert (twice.loss[:-1] == 2 * once.loss[:-1]).all()
    assert once.original == once.stored[-1] == n
    assert once.stored[:-1].tolist() == [Masked.n_numbers(kept, n) for kept in n_kept[:-1]]
    kept = torch.tensor(n_kept[:-1]).double()
    assert once.loss[:-1] == pytest.approx(measured.loss_at(1 - kept / n).numpy(), rel=1e-9)
    assert math.isinf(once.loss[-1])


@pytest.mark.parametrize("fit", ["svd", "asvd"])
def test_a_method_that_does_not_look_at_correlations_does_not_offer_it(fit: str) -> None:
    overrides = [f"fit={fit}", "fit.structures=[private,sparse]", "fit.allocation=global"]
    with pytest.raises(SettingsError, match="offers sparse, but"):
        compose_settings(overrides)


# What comes after


def _zeros(directory: Path) -> dict[str, Tensor]:
    """Where the parts that lack entries have none, in a loaded model."""
    model = load_compressed(directory)
    return {
        name: module.dense() == 0
        for name, module in model.named_modules()
        if isinstance(module, ShareLinear) and module.form.kind == "masked"
    }


def test_it_is_trained_and_written_again_without_the_entries(
    calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    run = calibrated("llama")
    run.fit(_settings(make_settings, removed=0.4))
    small, target = run.directory / "small", run.directory / "recovered"
    index, model = run.index(), open_compressed(small, torch.float32)
    forms = trainable(model)
    kept = supports(model, forms)
    masked = {
        part.tensors["dense"]
        for group in index.groups
        for part in group.parts
        if "mask" in part.tensors
    }
    assert kept.keys() == masked
    assert len(masked) > len(index.groups) / 2
    settings = replace(make_settings().recover, steps=6, batch=2, windows=8, held_out=2, window=16)
    factors = dict(named_parameters(model, forms))
    before = {name: own.detach().clone() for name, own in factors.items()}
    dense, never = load_model(run.weights, "float32", CPU), Checkpoint(target / "c", {}, math.inf)
    distill(dense, model.model, factors, tokens(10), settings, 0, never, kept)
    for name, own in kept.items():
        assert (factors[name][~own] == 0).all()
    assert any((factors[name] - old).norm() > 1e-4 * old.norm() for name, old in before.items())
    with torch.no_grad():
        logits = model.model(input_ids=tokens(2)).logits
    write_recovered(target, small, index, forms, Recovery(6, 6, 1, ()), 10_000)
    assert n_stored(target) == n_stored(small)
    with torch.no_grad():
        again = load_compressed(target)(input_ids=tokens(2)).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-4 * logits.abs().max().item())
    zeros = _zeros(small)
    assert zeros
    assert all((own | ~zeros[name]).all() for name, own in _zeros(target).items())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_loading_asks_for_the_memory_that_whole_weights_take(
    dtype: torch.dtype | None,
    calibrated: Calibrate,
    make_settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = calibrated("llama", lambda model: model.bfloat16())
    run.fit(_settings(make_settings))
    asked: list[int] = []
    monkeypatch.setattr(loader, "require_memory", lambda n_bytes, *_: asked.append(n_bytes))
    model = load_compressed(run.directory / "small", dtype)
    assert _zeros(run.directory / "small")
    assert asked[0] == sum(own.nbytes for own in model.parameters())


def test_an_update_leaves_zeros_where_they_are() -> None:
    """And is Muon's of a gradient that has them, too."""
    kept = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    start, gradient = torch.where(kept, _random(4, 6).float(), 0.0), _random(4, 6, seed=1).float()
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    ours.grad, theirs.grad = gradient.clone(), torch.where(kept, gradient, 0.0)
    for matrix, masks in ((ours, {ours: kept}), (theirs, None)):
        Muon([matrix], masks).step(0, 0.1)
    assert (theirs[~kept] != 0).any()
    assert torch.equal(ours, torch.where(kept, theirs, 0.0))


@pytest.fixture
def make(small_pipeline: MakeSmallPipeline) -> MakeCase:
    always = {f"fit.{key}": value for key, value in {**AUTO, **OWN}.items()}
    return case_maker(small_pipeline, {**PROPAGATING, **always})


def _divergence(case: Case, directory: Path) -> float:
    models = case.model.load(), load_compressed(directory)
    with torch.no_grad():
        p, q = (own(input_ids=tokens(8, 3)).logits.double().log_softmax(-1) for own in models)
    return functional.kl_div(q, p, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_propagation_refits_the_entries_that_there_are(
    family: str, make: MakeCase, tmp_path: Path
) -> None:
    case = make(family, {"fit.removed": 0.5})
    found = case.propagate(tmp_path / "out")
    assert found.left == 0
    assert n_stored(tmp_path / "out") == n_stored(case.compressed)
    before, after = _zeros(case.compressed), _zeros(tmp_path / "out")
    assert before
    assert all((after[name] | ~own).all() for name, own in before.items())
    index = load_index(tmp_path / "out")
    assert index.groups == case.index.groups
    assert _divergence(case, tmp_path / "out") < _divergence(case, case.compressed)
