"""Values without the columns that their outputs take in, from a matrix to a model that runs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocating import allocate_alone
from calibrated import Calibrate, Calibrated, fit_settings, maker
from conftest import SIZES, MakeSettings
from hypothesis import given
from hypothesis import strategies as st
from small_pipeline import MakeSmallModel, tokens
from torch import Tensor

from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.compressed.edits import ValueGauge
from sharebasis.compressed.loader import LoadedModel, load_compressed, open_compressed
from sharebasis.compressed.rewrite import rewrite
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import SplitStrategy
from sharebasis.forms.dense import Dense
from sharebasis.gauge.tensors import ModelTensors
from sharebasis.io.atomic import writing
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.interpolative import MAX_COEFFICIENT
from sharebasis.linalg.value_gauge import (
    dense_values,
    fix_values,
    output_in_gauge,
    values_at,
    values_in_gauge,
)
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.spectra.store import Spectra
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.propagate.outcome import Propagation
from sharebasis.stages.propagate.propagate import propagate
from sharebasis.structures.curve import Curve

CPU = torch.device("cpu")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@given(
    n_kv_heads=st.integers(1, 3),
    n_queries=st.integers(1, 3),
    d_value=st.integers(1, 5),
    more=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_what_heads_put_out_stays(
    n_kv_heads: int, n_queries: int, d_value: int, more: int, seed: int
) -> None:
    value = _random(n_kv_heads * d_value, d_value + more, seed=seed)
    output = _random(7, n_kv_heads * n_queries * d_value, seed=seed + 1)
    bias = _random(n_kv_heads * d_value, seed=seed + 2)
    fixed = fix_values(value, n_kv_heads)
    whole = dense_values(fixed.pivots, fixed.coefficient)
    turned = output_in_gauge(output, fixed.basis_change)
    new_bias = values_in_gauge(bias, fixed.basis_change)

    def products(o: Tensor, v: Tensor) -> Tensor:
        by_head = o.view(7, n_kv_heads, n_queries, d_value)
        return torch.einsum("nkqd,kdi->kqni", by_head, v.view(n_kv_heads, d_value, -1))

    scale = products(output, value).abs().max()
    assert (products(turned, whole) - products(output, value)).abs().max() < 1e-9 * scale
    both = products(turned, new_bias[:, None]) - products(output, bias[:, None])
    assert both.abs().max() < 1e-6 * scale
    assert fixed.coefficient.abs().max() <= MAX_COEFFICIENT
    assert fixed.coefficient.numel() == value.numel() - n_kv_heads * d_value**2
    for head, own in zip(whole.chunk(n_kv_heads), fixed.pivots, strict=True):
        assert torch.equal(head[:, own], torch.eye(d_value).double())
    torch.testing.assert_close(values_at(value, fixed.pivots), fixed.basis_change)


def test_dependent_columns_are_not_divided_by() -> None:
    value = _random(8, 20)
    assert fix_values(value, 2).bounded
    value[7] = value[6]
    assert not fix_values(value, 2).bounded


def test_the_budget_counts_the_numbers_of_the_original() -> None:
    """What need not be stored is for the others to keep."""
    n = 100
    stored, loss = np.arange(1, n + 1), np.arange(n, 0, -1.0)
    stored, loss = np.append(stored, n), np.append(loss, 0.0)
    values, outputs = Curve("v", stored, 1e6 * loss), Curve("o", stored, loss)
    before = allocate_alone([values, outputs], 0.25)
    (after,) = allocate_alone([both := outputs.beside(values, 10)], 0.25)
    assert values.rank(before[0]) == -1  # dense
    assert stored[before[1]] == 50
    assert stored[after] == 60
    assert both.stored[after] == 150
    assert both.original == 200


def test_values_that_may_not_be_dense_are_not_stored_in_the_gauge() -> None:
    stored, loss = np.array([10, 20, 40]), np.array([5.0, 1.0, 0.0])
    values = Curve("v", stored, np.array([5.0, 1.0, np.inf]))
    assert np.isinf(Curve("o", stored, loss).beside(values, 4).loss).all()


@pytest.fixture
def calibrated(small_model: MakeSmallModel, tmp_path: Path) -> Calibrate:
    return partial(maker(small_model, tmp_path), windows=tokens(8))


OWN = {"value_gauge": True}


def _logits(own: Calibrated, name: str | None = None) -> Tensor:
    """Of a compressed model, or of the original."""
    model = (
        load_model(own.weights, "float32", CPU)
        if name is None
        else load_compressed(own.directory / name)
    )
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens(2, seed=5)).logits
    return logits


def _settings(make_settings: MakeSettings, **changes: Any) -> FitSettings:
    return fit_settings(make_settings, **{**OWN, **changes})


def _close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=2e-4 * float(other.abs().max()))


KNOWN = sorted(name for name in ARCHITECTURES.keys() & SIZES if ARCHITECTURES[name].positions)


@pytest.mark.parametrize("family", KNOWN)
def test_a_model_that_keeps_all_else_says_what_it_said(
    family: str, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    """All is dense but for the columns that are known, and the budget is met by these."""
    own = calibrated(family)
    settings = _settings(make_settings, removed=1e-4)
    fitted = own.fit(settings, split="qkv")
    config = load_config(own.weights)
    assert len(own.edits(ValueGauge)) == config.num_hidden_layers, "no gauge for some layer"
    assert all(one.form in ("dense", "fixed_columns") for one in fitted.groups)
    assert fit_metrics(fitted, settings)["removed_fraction"] > 1e-3
    _close(_logits(own, "small"), _logits(own))


FIVE = ["llama", "gpt2", "qwen2", "gpt_bigcode", "falcon"]
"""Grouped, fused and transposed, with biases, one key-value head, fused and interleaved."""


@pytest.mark.parametrize("family", FIVE)
def test_it_is_exact_beside_factors(
    family: str, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    """The model is the original with the products of the factors as they were found."""
    own = calibrated(family)
    limits = [{"sublayers": "v", "floor": 1.0, "cap": 1.0}]
    fitted = own.fit(_settings(make_settings, removed=0.3, limits=limits), split="qkv")
    assert own.edits(ValueGauge)
    assert any(one.group.family == "o" and one.rank is not None for one in fitted.groups)
    source, original = Spectra(own.directory / "spectra"), load_model(own.weights, "float32", CPU)
    tensors = ModelTensors(original)
    for i, one in enumerate(fitted.groups):
        (part,) = one.group.parts
        if one.rank is not None:
            basis = source.cells[i].read("basis", slice(one.rank))
            coefficient = source.cells[i].read("coefficient", columns=slice(one.rank))
            name, conv1d = f"{part.sublayer.name}.weight", part.sublayer.type == "Conv1D"
            tensors.write(name, coefficient @ basis, part.rows, conv1d)
    with torch.no_grad():
        _close(_logits(own, "small"), original(input_ids=tokens(2, seed=5)).logits)


def test_it_leaves_more_for_the_others(calibrated: Calibrate, make_settings: MakeSettings) -> None:
    own, settings = calibrated("llama"), _settings(make_settings, removed=0.2)
    with_it = own.fit(settings, split="qkv")
    without = own.fit(replace(settings, value_gauge=False), "plain", "qkv")
    assert not own.edits(ValueGauge, "plain")
    for fitted in (with_it, without):
        n_stored = sum(one.n_stored for one in fitted.groups)
        n_original = sum(one.n_original for one in fitted.groups)
        assert 0.8 - 0.02 < n_stored / n_original <= 0.8
    assert sum(one.loss for one in with_it.groups) < sum(one.loss for one in without.groups)


@pytest.mark.parametrize("what", ["v_proj", "o_proj"])
def test_what_is_excluded_stays_as_it_is(
    what: str, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    own = calibrated("llama")
    own.fit(_settings(make_settings, removed=0.1, exclude=[rf".*\.0\..*{what}"]), split="qkv")
    index, dense = own.index(), DenseWeights(own.weights)
    assert [one.output for one in own.edits(ValueGauge)] == [
        f"model.layers.{i}.self_attn.o_proj" for i in (1, 2)
    ]
    name = f"model.layers.0.self_attn.{what}"
    stored = TensorReader(own.directory / "small", index.files).read(f"{name}.dense")
    assert torch.equal(stored, dense.read(f"{name}.weight"))


@pytest.mark.parametrize("split", ["none", "heads"])
def test_values_that_are_no_part_of_their_own_stay(
    split: SplitStrategy, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    own = calibrated("gpt2")
    own.fit(_settings(make_settings, removed=0.2), split=split)
    assert not own.edits(ValueGauge)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_an_original_in_its_gauge_says_what_it_said(
    family: str, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    own = calibrated(family)
    own.fit(_settings(make_settings, removed=1e-4), split="qkv")
    index, original = own.index(), load_model(own.weights, "float32", CPU)
    loaded, edits = open_compressed(own.directory / "small"), own.edits(ValueGauge)
    assert edits
    with torch.no_grad():
        for edit in edits:
            edit.follow(original, index, loaded.reader)
        _close(original(input_ids=tokens(2, seed=5)).logits, _logits(own))
    for edit in edits:
        _, part = index.find_tensor(edit.value)
        module = original.get_submodule(part.sublayer)
        weight = module.weight if family != "gpt2" else module.weight.T
        torch.testing.assert_close(part.rows.take(weight), _values(loaded, edit))


def _values(loaded: LoadedModel, edit: ValueGauge) -> Tensor:
    """What the model multiplies by, a view."""
    group, part = loaded.index.find_tensor(edit.value)
    return loaded.linears(group)[group.parts.index(part)].dense()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_new_values_are_fixed_again(
    family: str, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    """Whoever refits values gives all of their columns, and outputs need not be new."""
    own = calibrated(family)
    own.fit(_settings(make_settings, removed=0.2), split="qkv")
    loaded = open_compressed(own.directory / "small")
    index, model = loaded.index, loaded.model
    forms, biases = {}, {}
    with torch.no_grad():
        for edit in own.edits(ValueGauge):
            weight = _values(loaded, edit)
            weight += 0.1 * _random(*weight.shape).float()
            group, part = index.find_tensor(edit.value)
            forms[group.name] = Dense((weight.clone(),))
            bias = model.get_submodule(part.sublayer).bias
            if isinstance(bias, Tensor):
                bias += 0.1 * _random(len(bias)).float()
                biases[f"{part.sublayer}.bias"] = bias.clone()
        expected = model(input_ids=tokens(2, seed=5)).logits
    assert forms
    with writing(own.directory / "again") as out:
        rewrite(out, own.directory / "small", index, forms, biases, 10**8)
    _close(_logits(own, "again"), expected)
    assert (expected - _logits(own, "small")).abs().max() > 1e-2

    def n_numbers(name: str) -> int:
        reader = TensorReader(own.directory / name, index.files)
        return sum(math.prod(reader.shape(tensor)) for tensor in index.files)

    assert n_numbers("again") == n_numbers("small")


def _propagate(own: Calibrated, make_settings: MakeSettings, by: str) -> Propagation:
    changes = {"by": by, "windows": 16, "held_out": 4, "window": 16, "batch": 4}
    settings = make_settings({f"propagate.{key}": value for key, value in changes.items()})
    return propagate(
        own.weights,
        classify_model(meta_model(load_config(own.weights))),
        own.directory / "small",
        own.moments,
        tokens(20),
        settings.propagate,
        _settings(make_settings),
        Checkpoint(own.directory / "propagation", {}, math.inf),
        own.directory / "propagated",
        CPU,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_regression_finds_nothing_to_make_up_for_where_nothing_is_lost(
    family: str, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    own = calibrated(family)
    own.fit(_settings(make_settings, removed=1e-4), split="qkv")
    assert own.edits(ValueGauge)
    result = _propagate(own, make_settings, "regression")
    assert result.distances
    assert max(result.distances) < 1e-6
    _close(_logits(own, "propagated"), _logits(own))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_an_update_aims_at_outputs_in_the_gauge_of_their_values(
    family: str, calibrated: Calibrate, make_settings: MakeSettings
) -> None:
    """Aimed at as they were, new outputs would be of no use to values that stay as they are."""
    own = calibrated(family)
    limits = [{"sublayers": "v", "floor": 1.0, "cap": 1.0}]
    own.fit(_settings(make_settings, removed=0.3, limits=limits), split="qkv")
    assert own.edits(ValueGauge)
    result = _propagate(own, make_settings, "update")
    assert result.before is not None
    assert result.after is not None
    assert result.after < result.before
