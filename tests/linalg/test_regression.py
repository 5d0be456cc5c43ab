"""The regression undoes what can be undone, and outlier tokens do not have the last word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharebasis.errors import CalibrationError
from sharebasis.linalg.drift_regression import (
    PairAccumulator,
    PairedMoment,
    regressed,
    token_weights,
)


def _pair(
    x: Tensor, y: Tensor, weights: Tensor | None = None, kept: Tensor | None = None
) -> PairedMoment:
    accumulator = PairAccumulator("site", x.shape[-1], kept)
    accumulator.update(x, y, torch.ones(x.shape[:-1]) if weights is None else weights)
    return accumulator.moment()


@given(d=st.integers(1, 6), d_out=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_known_distortion_is_undone_exactly(d: int, d_out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(8, 9, d, generator=generator), torch.randn(d_out, d)
    distortion = torch.eye(d) + 0.2 * torch.randn(d, d, generator=generator)
    found = regressed(weight, _pair(x, x @ distortion.T), 1.0)
    torch.testing.assert_close(found @ distortion.double(), weight.double(), rtol=1e-3, atol=1e-4)


def test_the_regression_is_that_of_least_squares() -> None:
    x, y, weight = torch.randn(4, 50, 5), torch.randn(4, 50, 5), torch.randn(3, 5)
    y = x + 0.7 * y
    weights = torch.rand(4, 50)
    root = weights.flatten().sqrt()[:, None]
    oracle = torch.linalg.lstsq(root * y.flatten(0, 1), root * x.flatten(0, 1) @ weight.T)
    found = regressed(weight, _pair(x, y, weights), 1.0)
    torch.testing.assert_close(found.float(), oracle.solution.T, rtol=1e-4, atol=1e-5)
    between = regressed(weight, _pair(x, y, weights), 0.25)
    torch.testing.assert_close(between, 0.75 * weight.double() + 0.25 * found)


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_equal_streams_leave_a_weight_whatever_the_damping(damping: float) -> None:
    x, weight = torch.randn(4, 20, 6), torch.randn(5, 6)
    found = regressed(weight, _pair(x, x), 1.0, damping=damping)
    torch.testing.assert_close(found, weight.double(), rtol=1e-6, atol=1e-6)


def test_damping_lets_a_direction_that_says_nothing_alone() -> None:
    """Without it such a direction has no inverse; damped, it stays and does not shrink to zero."""
    x, weight = torch.randn(4, 20, 6), torch.randn(5, 6)
    x[..., 5] = 0
    with pytest.raises(CalibrationError, match=r"of site do not span .* propagate\.damping"):
        regressed(weight, _pair(x, x), 1.0)
    found = regressed(weight, _pair(x, x), 1.0, damping=1e-3)
    torch.testing.assert_close(found[:, 5], weight[:, 5].double())


@given(seed=st.integers(0, 99), n_left=st.integers(1, 5), amount=st.floats(0, 1))
def test_what_is_left_says_what_all_said(seed: int, n_left: int, amount: float) -> None:
    """By torch's own least squares: of all that was said, where the start is the best for it."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, 40, 6, generator=generator), torch.randn(4, 6, generator=generator)
    kept = torch.randperm(6, generator=generator)[:n_left]
    y = x[..., kept] + 0.3 * torch.randn(3, 40, n_left, generator=generator)
    said = (x @ weight.T).flatten(0, 1).double()
    start, best = (
        torch.linalg.lstsq(own.flatten(0, 1).double(), said).solution.T for own in (x[..., kept], y)
    )
    found = regressed(weight, _pair(x, y, kept=kept), amount, start=start)
    torch.testing.assert_close(found, (1 - amount) * start + amount * best, rtol=1e-4, atol=1e-4)


def test_without_drift_little_text_does_not_unlearn_what_much_has_taught() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 6, generator=generator), torch.randn(4, 6, generator=generator)
    kept, start = torch.tensor([4, 0, 1]), torch.randn(4, 3, generator=generator)
    found = regressed(weight, _pair(x, x[..., kept], kept=kept), 1.0, start=start)
    torch.testing.assert_close(found, start.double(), rtol=1e-4, atol=1e-4)


def test_batches_and_the_scale_of_weights_change_nothing() -> None:
    x, y, weights = torch.randn(6, 9, 4), torch.randn(6, 9, 4), torch.rand(6, 9)
    whole, pieces = _pair(x, y, 7 * weights), PairAccumulator("site", 4)
    for one, other, own in zip(x.split(4), y.split(4), weights.split(4), strict=True):
        pieces.update(one, other, own)
    parts = pieces.moment()
    torch.testing.assert_close(parts.cross, whole.cross, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.compressed.sum, whole.compressed.sum, rtol=1e-5, atol=1e-5)
    assert parts.compressed.n_tokens == whole.compressed.n_tokens == 54


OUTLIERS = {"nothing": (0, None), "skip": (1, None), "clip": (0, 3.0), "both": (1, 3.0)}


def test_outlier_tokens_are_heard_less() -> None:
    """The first token of every window is long, and has a distortion of its own."""
    x, weight = torch.randn(8, 40, 5), torch.randn(4, 5)
    x[:, 0] *= 300
    distortion = torch.eye(5) + 0.1 * torch.randn(5, 5)
    y = x @ distortion.T
    y[:, 0] = x[:, 0] @ (torch.eye(5) + 0.5 * torch.randn(5, 5)).T
    off = {}
    for name, (skip, clip) in OUTLIERS.items():
        found = regressed(weight, _pair(x, y, token_weights(x, skip, clip)), 1.0)
        off[name] = (found @ distortion.double() - weight).norm().item()
    assert off["clip"] < 0.5 * off["nothing"]
    assert max(off["skip"], off["both"]) < 1e-3 * off["nothing"]


def test_weights_are_hubers() -> None:
    x = torch.tensor([1.0, 2.0, 2.0, 2.0, 12.0])[None, :, None]
    assert token_weights(x, 0, None).tolist() == [[1, 1, 1, 1, 1]]
    assert token_weights(x, 2, 3.0).tolist() == [[0, 0, 1, 1, 0.25]]


def test_what_is_no_pair_or_not_finite_is_refused() -> None:
    accumulator = PairAccumulator("site", 4)
    with pytest.raises(CalibrationError, match="no token that counts"):
        accumulator.moment()
    with pytest.raises(CalibrationError, match=r"site is given \(2, 3, 4\) .* \(2, 2, 4\)"):
        accumulator.update(torch.ones(2, 3, 4), torch.ones(2, 2, 4), torch.ones(2, 3))
    accumulator.update(torch.full((2, 3, 4), torch.inf), torch.ones(2, 3, 4), torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        accumulator.moment()
