"""What every budget costs, one after the other."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
from calibrated import fit_settings, maker
from conftest import MakeSettings
from small_pipeline import CPU, MakeSmallModel, tokens
from transformers import PreTrainedModel

from sharebasis.allocation.sensitivity import UNWEIGHED
from sharebasis.errors import BudgetError
from sharebasis.stages.curve import curve
from sharebasis.stages.curve.curve import measure_curve


def test_one_compressed_model_is_in_memory_at_a_time(
    small_model: MakeSmallModel,
    make_settings: MakeSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, settings = maker(small_model, tmp_path)("llama"), fit_settings(make_settings)
    own.fit(settings)
    loaded: list[weakref.ref[PreTrainedModel]] = []
    load, fit = curve.load_compressed, curve.fit

    def n_alive() -> int:
        return sum(model() is not None for model in loaded)

    def watch_load(*arguments: Any) -> PreTrainedModel:
        assert n_alive() == 0
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    def watch_fit(*arguments: Any) -> object:
        assert n_alive() == 0
        return fit(*arguments)

    monkeypatch.setattr(curve, "load_compressed", watch_load)
    monkeypatch.setattr(curve, "fit", watch_fit)
    artefacts = own.weights, own.directory / "spectra", own.moments, UNWEIGHED, settings
    last = tokens(4), 2, "float32", tmp_path / "curve", CPU
    found = measure_curve(*artefacts, [0.6, 0.3], *last)
    assert len(loaded) == 2
    assert [point.removed for point in found.points] == [0.3, 0.6]
    assert 0 < found.points[0].kl_mean < found.points[1].kl_mean
    assert not (tmp_path / "curve").exists()


def test_budgets_that_limits_do_not_allow_are_left_out(
    small_model: MakeSmallModel,
    make_settings: MakeSettings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = maker(small_model, tmp_path)("llama")
    settings = fit_settings(make_settings, exclude=[".*mlp.*"], removed=0.1)
    own.fit(settings)
    artefacts = own.weights, own.directory / "spectra", own.moments, UNWEIGHED, settings
    last = tokens(4), 2, "float32", tmp_path / "curve", CPU
    found = measure_curve(*artefacts, [0.1, 0.9], *last)
    assert [point.removed for point in found.points] == [0.1]
    assert "The curve goes without 0.9: Removing 0.9 leaves" in caplog.text
    with pytest.raises(BudgetError, match="the least that limits allow"):
        measure_curve(*artefacts, [0.8, 0.9], *last)
    assert not (tmp_path / "curve").exists()
