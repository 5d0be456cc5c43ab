"""Extreme tokens, planted: clipped to the limit, left out, or counted in full."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeDirectory, MakeSettings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sharebasis.architecture.parts import split_selected
from sharebasis.config.calibrate import EVERY_TOKEN, Outliers, OutlierSettings
from sharebasis.errors import CalibrationError
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.moments import MomentAccumulator
from sharebasis.linalg.outliers import clip_or_trim
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.problems import Problems
from sharebasis.moments.store import Accumulators, MomentStore, trimmed_of, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.calibrate.track import ALL_COUNT

CLIP, TRIM = Outliers("clip", 3.0), Outliers("trim", 3.0)
WINDOWS = torch.randint(1, 280, (6, 12), generator=torch.Generator().manual_seed(0))


def _text(windows: int, window: int, d: int = 4) -> Tensor:
    """Unit vectors, so that every window's median is 1."""
    x = torch.randn(windows, window, d, generator=torch.Generator().manual_seed(1)).double()
    return x / x.norm(dim=-1, keepdim=True)


def _planted() -> tuple[Tensor, Tensor]:
    """Windows of other scales, one token of each extreme, and where those are."""
    x = _text(3, 9) * torch.tensor([1e-3, 1.0, 50.0]).double()[:, None, None]
    extreme = torch.zeros(3, 9, dtype=torch.bool)
    extreme[range(3), (0, 4, 8)] = True
    x[extreme] *= 200
    x[:, 2] *= 2.9  # long, but not extreme
    return x, extreme


def test_clipped_tokens_are_as_long_as_the_limit_and_point_where_they_did() -> None:
    x, extreme = _planted()
    clipped = clip_or_trim(x, CLIP)
    assert torch.equal(clipped[~extreme], x[~extreme])
    torch.testing.assert_close(clipped[extreme], x[extreme] * 3 / 200, rtol=1e-12, atol=0)


def test_trimmed_tokens_are_in_no_sum_and_in_no_count() -> None:
    x, extreme = _planted()
    accumulator = MomentAccumulator("site", 4, outliers=TRIM)
    accumulator.update(x)
    moment, kept = accumulator.moment(), x[~extreme]
    torch.testing.assert_close(moment.total, kept.T @ kept, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moment.sum, kept.sum(0), rtol=1e-12, atol=1e-12)
    assert (accumulator.n_tokens, accumulator.n_trimmed) == (24, 3)


def test_without_a_treatment_the_very_same_tensor_is_counted() -> None:
    x, _ = _planted()
    assert clip_or_trim(x, EVERY_TOKEN) is x


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 8), max_size=3),
    treatment=st.sampled_from(["clip", "trim"]),
    seed=st.integers(0, 2**16),
)
def test_neither_the_batch_nor_the_unit_changes_which_tokens_are_extreme(
    cuts: list[int], treatment: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 7, 3, generator=generator).double()
    x = x * torch.randn(8, 7, 1, generator=generator).double().exp().square()
    outliers = Outliers(treatment, 2.0)  # type: ignore[arg-type]
    whole = clip_or_trim(x, outliers)
    pieces = [clip_or_trim(one, outliers).reshape(-1, 3) for one in x.tensor_split(sorted(cuts))]
    assert torch.equal(torch.cat(pieces), whole.reshape(-1, 3))
    assert torch.equal(clip_or_trim(x * 1024, outliers), whole * 1024)


@pytest.mark.parametrize("outliers", [CLIP, TRIM], ids=["clip", "trim"])
def test_tokens_of_zeros_make_nothing_extreme(outliers: Outliers) -> None:
    x = _text(2, 9)
    x[0, 1:] = 0
    x[1] = 0
    assert torch.equal(clip_or_trim(x, outliers).reshape(-1, 4), x.reshape(-1, 4))
    assert clip_or_trim(x[:0], outliers).numel() == 0


@pytest.mark.parametrize("outliers", [CLIP, TRIM], ids=["clip", "trim"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_input_that_is_not_finite_is_not_trimmed_away(outliers: Outliers, bad: float) -> None:
    x = _text(2, 9)
    x[1, 3, 0] = bad
    accumulator = MomentAccumulator("site", 4, outliers=outliers)
    accumulator.update(x)
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        accumulator.moment()


# In a model


@pytest.fixture(scope="module")
def directory(make_directory: MakeDirectory) -> Path:
    return make_directory("llama")


def _gather(
    directory: Path,
    outliers: OutlierSettings,
    target: Path,
    batch: int = 2,
    checkpoint: Checkpoint | None = None,
    windows: Tensor = WINDOWS,
) -> tuple[MomentStore, Accumulators]:
    model = load_model(directory, "float32", torch.device("cpu"))
    selected = classify_model(model).selected
    checkpoint = checkpoint or Checkpoint(target / "checkpoint", {}, math.inf)
    found = calibrate(model, selected, windows, batch, checkpoint, "text", outliers)
    write_moments(target / "moments", *found)
    return MomentStore(target / "moments"), found[1]


GATE = "model.layers.1.mlp.gate_proj"
TIGHT = Outliers("trim", 1.05)


@pytest.mark.parametrize("side", ["inputs", "gradients"])
def test_a_side_is_treated_by_itself_and_window_by_window(
    side: str, directory: Path, tmp_path: Path
) -> None:
    store, sums = _gather(directory, replace(ALL_COUNT, **{side: TIGHT}), tmp_path / "1")
    _, other = _gather(directory, replace(ALL_COUNT, **{side: TIGHT}), tmp_path / "2", batch=6)
    trimmed = trimmed_of(sums)
    assert trimmed == trimmed_of(other)
    assert {name.endswith(".gradient") for name in trimmed} == {side == "gradients"}
    for name, own in sums.items():
        assert store.n_seen(name) == WINDOWS.numel() == own.n_tokens + trimmed.get(name, 0)
    assert store.n_tokens == WINDOWS.numel()


def test_a_run_that_goes_on_knows_what_was_trimmed_before(directory: Path, tmp_path: Path) -> None:
    both = OutlierSettings(TIGHT, TIGHT)
    _, whole = _gather(directory, both, tmp_path / "whole")
    stopped = Checkpoint(tmp_path / "checkpoint", {"windows": "first"}, -1.0)
    _gather(directory, both, tmp_path / "first", checkpoint=stopped, windows=WINDOWS[:4])
    _, resumed = _gather(directory, both, tmp_path / "second", checkpoint=stopped)
    assert trimmed_of(resumed) == trimmed_of(whole)
    for name, own in resumed.items():
        assert torch.equal(own.moment().total, whole[name].moment().total)


def test_trimmed_gradients_count_as_the_others_do_on_average(
    directory: Path, tmp_path: Path, make_settings: MakeSettings
) -> None:
    """Not as gradients of zero, which would make light of sublayers with many outliers."""
    store, sums = _gather(directory, replace(ALL_COUNT, gradients=TIGHT), tmp_path)
    classification = classify_model(meta_model(load_config(directory)))
    (part,) = (one for one in split_selected(classification, "none") if one.sublayer.name == GATE)
    chosen = make_settings({"fit.two_sided": True, "fit.damping_gradients": 0.0}).fit
    problems = Problems(store, {GATE: ()}, chosen, torch.device("cpu"))
    problem = problems.of_part(part, torch.zeros(part.sublayer.shape))
    assert problem is not None
    gradient, kept = problem.gradients, sums[f"{GATE}.gradient"].moment()
    assert gradient is not None
    assert 0 < kept.n_tokens < WINDOWS.numel()
    torch.testing.assert_close(gradient.second, kept.second, rtol=1e-12, atol=0)
