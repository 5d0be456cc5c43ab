"""Experts are calibrated by the tokens that went to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrating import (
    WINDOWS,
    assert_identical,
    count_windows,
    load,
    moments_of,
    never_saved,
    selected_of,
)
from conftest import MakeDirectory, MakeSettings, fit_at_once
from low_rank_fits import fit_rank
from torch import Tensor

from sharebasis.architecture.parts import split_selected
from sharebasis.compressed.loader import load_compressed
from sharebasis.errors import CalibrationError
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_config, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.metrics import fit_metrics

IDLE, UNSEEN = 2, "model.layers.1.mlp.experts"
"""Number of an expert, and where it is, that no token goes to."""


@pytest.fixture(scope="module")
def experts(make_directory: MakeDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/weights of a model with one expert that its router never chooses."""
    directory = make_directory("gpt_oss")
    model = load(directory)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.router").bias[IDLE] = -1e4
    model.save_pretrained(directory)
    weights = tmp_path_factory.mktemp("artifacts") / "weights"
    extract(find_source(str(directory)), weights)
    return weights


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("sharebasis") and record.levelname == "WARNING"
    ]


def test_an_expert_that_no_token_went_to_is_told_and_has_an_empty_moment(
    experts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    selected = selected_of(experts)
    sites, sums = calibrate(load(experts), selected, WINDOWS, 4, never_saved(tmp_path))
    (warning,) = _warnings(caplog)
    for said in (f"went to 2 of {len(sites)} inputs", f"{UNSEEN}.gate_up_proj.{IDLE} among"):
        assert said in warning
    write_moments(tmp_path / "moments", sites, sums)
    stored = MomentStore(tmp_path / "moments")
    assert_identical({site.name: stored.read(site.name) for site in sites}, moments_of(sums))
    for name in ("gate_up_proj", "down_proj"):
        seen = [stored.read(stored.site(f"{UNSEEN}.{name}.{i}")) for i in range(4)]
        assert sum(moment.n_tokens for moment in seen) == 2 * WINDOWS.numel()  # two for each token
        assert [moment.n_tokens == 0 for moment in seen] == [i == IDLE for i in range(4)]
        assert seen[IDLE].total.count_nonzero() == 0
        with pytest.raises(CalibrationError, match=f"{name}.{IDLE} has seen no tokens"):
            _ = seen[IDLE].second


def test_experts_see_the_tokens_that_went_to_them(experts: Path, tmp_path: Path) -> None:
    selected = selected_of(experts)
    sites, sums = calibrate(load(experts), selected, WINDOWS, 4, never_saved(tmp_path))
    assert {len(site.readers) for site in sites if ".experts." in site.name} == {1}
    model, moments = load(experts), moments_of(sums)
    chosen: list[Tensor] = []
    inputs: list[Tensor] = []
    own = model.get_submodule(UNSEEN)
    own.register_forward_pre_hook(
        lambda _, args: (inputs.append(args[0].double()), chosen.append(args[1]))[0]
    )
    with torch.no_grad():
        for chunk in WINDOWS.split(4):
            model(input_ids=chunk)
    for expert in range(4):
        x = torch.cat(inputs)[(torch.cat(chosen) == expert).any(dim=1)]
        moment = moments[f"{UNSEEN}.gate_up_proj.{expert}"]
        assert moment.n_tokens == len(x)
        torch.testing.assert_close(moment.total, x.T @ x, rtol=1e-5, atol=1e-5 * len(x))
        torch.testing.assert_close(moment.sum, x.sum(0), rtol=1e-5, atol=1e-5 * len(x))


def test_a_text_that_reaches_every_expert_is_no_reason_to_warn(
    make_directory: MakeDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_directory("gpt_oss")
    calibrate(load(directory), selected_of(directory), WINDOWS, 4, never_saved(tmp_path))
    assert not _warnings(caplog)


def test_a_run_with_an_expert_that_no_token_went_to_goes_on(experts: Path, tmp_path: Path) -> None:
    selected = selected_of(experts)
    whole = calibrate(load(experts), selected, WINDOWS, 2, never_saved(tmp_path))[1]
    often = Checkpoint(tmp_path / "checkpoint", {"run": 1}, 1e-9)
    calibrate(load(experts), selected, WINDOWS[:6], 2, often)
    model = load(experts)
    batches = count_windows(model)
    resumed = calibrate(model, selected, WINDOWS, 2, never_saved(tmp_path))[1]
    assert batches == [1, 2, 2]
    assert_identical(moments_of(resumed), moments_of(whole))


@pytest.mark.parametrize("share_experts", [False, True])
def test_an_expert_that_no_token_went_to_is_fitted(
    experts: Path, make_settings: MakeSettings, tmp_path: Path, share_experts: bool
) -> None:
    found = classify_model(meta_model(load_config(experts)))
    sites, sums = calibrate(load(experts), found.selected, WINDOWS, 4, never_saved(tmp_path))
    write_moments(tmp_path / "moments", sites, sums)
    changes = {"fit.method": "svd_llm", "fit.group_size": 1, "fit.shared": []}
    settings = make_settings({**changes, "fit.share_experts": share_experts}).fit
    parts, moments = split_selected(found, "none"), MomentStore(tmp_path / "moments")
    fitted = fit_at_once(experts, parts, moments, settings, tmp_path / "small")
    assert 0 < fit_metrics(fitted, settings)["relative_loss"] < 1
    small, dense = load_compressed(tmp_path / "small"), load(experts)
    unstack(dense)
    numbers = range(4) if share_experts else [IDLE]
    for name in ("gate_up_proj", "down_proj"):
        names = [f"{UNSEEN}.{name}.{i}" for i in numbers]
        pooled = sum(
            (moments.read(moments.site(name)) for name in names[1:]), moments.read(names[0])
        )
        factors = [small.get_submodule(name).parts[0] for name in names]
        expected = fit_rank(
            [dense.get_submodule(name).weight for name in names],
            pooled if share_experts else None,  # without tokens there is nothing to whiten by
            len(factors[0].form.basis),
        )
        for own, coefficient in zip(factors, expected.coefficients, strict=True):
            found_product = own.form.coefficient.double() @ own.form.basis.double()
            product = coefficient @ expected.basis
            torch.testing.assert_close(found_product, product.double(), rtol=0, atol=1e-5)
