"""The fit against the SVD of the outputs themselves, which never forms a moment."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank_fits import fit_rank

from sharebasis.errors import CalibrationError
from sharebasis.linalg.moments import MomentAccumulator

WIDE = (3, 4), 9
"""d_out of each weight and d_in: Σ d_out <= d_in."""
TALL = (6, 2, 5), 8
"""Σ d_out > d_in."""
BRANCHES = pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])


def problem(shape, n=40, seed=0):
    """Weights, and inputs whose directions differ in size by a factor of ten."""
    d_outs, d_in = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    sizes = torch.logspace(-0.5, 0.5, d_in, dtype=torch.float64)
    inputs = (normal(n, d_in) * sizes) @ torch.linalg.qr(normal(d_in, d_in))[0] + 0.1
    return [normal(d_out, d_in) for d_out in d_outs], inputs


def moment_of(inputs):
    accumulator = MomentAccumulator("layers.0.q_proj", inputs.shape[1])
    accumulator.update(inputs)
    return accumulator.moment()


def product(factors):
    return torch.cat([coefficient @ factors.basis for coefficient in factors.coefficients])


def outputs(dense, inputs):
    """What the weights write, scaled so that its squared norm is an average over tokens."""
    return inputs @ dense.T / len(inputs) ** 0.5


def loss_of(dense, weights, inputs):
    return outputs(torch.cat(weights) - dense, inputs).square().sum().item()


def best_outputs(weights, inputs, rank):
    """The closest outputs of this rank, and how far they are from the true ones."""
    u, s, v = torch.linalg.svd(outputs(torch.cat(weights), inputs), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    return best, s[rank:].square().sum().item()


def energy_of(weights, inputs):
    return loss_of(torch.zeros_like(torch.cat(weights)), weights, inputs)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_loss_and_energy_are_those_of_the_best_outputs(data):
    d_outs = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3), label="d_outs")
    d_in = data.draw(st.integers(1, 12), label="d_in")
    n = data.draw(st.integers(1, 16), label="tokens")
    rank = data.draw(st.integers(1, min(sum(d_outs), d_in)), label="rank")
    weights, x = problem((d_outs, d_in), n, seed=data.draw(st.integers(0, 2**16), label="seed"))
    factors = fit_rank(weights, moment_of(x), rank)
    energy = energy_of(weights, x)
    off = 1e-10 * energy  # the null space of a singular moment weighs up to d * NULL_SPACE
    assert factors.energy == pytest.approx(energy, abs=off)
    assert factors.loss == pytest.approx(best_outputs(weights, x, rank)[1], abs=off)
    assert factors.loss == pytest.approx(loss_of(product(factors), weights, x), abs=off)
    assert factors.basis.shape == (rank, d_in)
    assert [c.shape for c in factors.coefficients] == [(d_out, rank) for d_out in d_outs]


@pytest.mark.parametrize("n", [5, 40], ids=["fewer tokens than d_in", "many tokens"])
@BRANCHES
def test_the_outputs_are_the_truncated_svd_of_the_outputs(shape, n):
    weights, x = problem(shape, n)
    factors = fit_rank(weights, moment_of(x), 3)
    best, loss = best_outputs(weights, x, 3)
    assert loss > 0.01 * energy_of(weights, x)
    # A singular moment is inverted with a condition of 1e6; else rounding is all there is.
    off = 1e-9 if n < shape[1] else 1e-10
    torch.testing.assert_close(outputs(product(factors), x), best, rtol=0, atol=off)


@BRANCHES
def test_without_a_moment_the_fit_is_the_truncated_svd_of_the_weights(shape):
    weights, _ = problem(shape)
    factors = fit_rank(weights, None, 3)
    u, s, v = torch.linalg.svd(torch.cat(weights), full_matrices=False)
    torch.testing.assert_close(product(factors), (u[:, :3] * s[:3]) @ v[:3], rtol=0, atol=1e-11)
    assert factors.loss == pytest.approx(s[3:].square().sum().item(), rel=1e-12)
    assert factors.energy == pytest.approx(s.square().sum().item(), rel=1e-12)


@BRANCHES
def test_a_fit_for_other_inputs_is_seen_by_the_oracle_as_worse(shape):
    weights, x = problem(shape)
    _, best = best_outputs(weights, x, 3)
    _, strangers = problem(shape, seed=1)
    for moment in (None, moment_of(strangers)):
        planted = fit_rank(weights, moment, 3)
        assert loss_of(product(planted), weights, x) > 1.05 * best
        assert planted.loss != pytest.approx(loss_of(product(planted), weights, x), rel=1e-3)


@BRANCHES
def test_no_perturbation_of_the_factors_does_better(shape):
    weights, x = problem(shape)
    factors = fit_rank(weights, moment_of(x), 3)
    a, b = torch.cat(factors.coefficients), factors.basis
    loss = loss_of(a @ b, weights, x)
    generator = torch.Generator().manual_seed(2)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            da = size * torch.randn(a.shape, dtype=a.dtype, generator=generator)
            db = size * torch.randn(b.shape, dtype=b.dtype, generator=generator)
            assert loss_of((a + da) @ (b + db), weights, x) >= loss * (1 - 1e-12)


@BRANCHES
def test_the_loss_is_stationary_in_both_factors(shape):
    weights, x = problem(shape)
    factors = fit_rank(weights, moment_of(x), 3)
    a = torch.cat(factors.coefficients).requires_grad_()
    b = factors.basis.clone().requires_grad_()
    outputs(torch.cat(weights) - a @ b, x).square().sum().backward()
    scale = energy_of(weights, x)
    assert a.grad.abs().max() < 1e-11 * scale
    assert b.grad.abs().max() < 1e-11 * scale


@BRANCHES
def test_more_rank_is_never_worse_and_full_rank_loses_nothing(shape):
    weights, x = problem(shape)
    full = min(sum(shape[0]), shape[1])
    fits = [fit_rank(weights, moment_of(x), rank) for rank in range(1, full + 1)]
    losses = [loss_of(product(fit), weights, x) for fit in fits]
    assert all(more < less for less, more in pairwise(losses))
    assert losses[-1] < 1e-20 * energy_of(weights, x)
    assert fits[-1].loss == 0


@pytest.mark.parametrize("n", [5, 40, None], ids=["fewer tokens than d_in", "many", "no moment"])
@BRANCHES
def test_at_full_rank_the_weights_are_reproduced(shape, n):
    weights, x = problem(shape, n or 1)
    moment = moment_of(x) if n else None
    factors = fit_rank(weights, moment, min(sum(shape[0]), shape[1]))
    for weight, coefficient in zip(weights, factors.coefficients, strict=True):
        torch.testing.assert_close(coefficient @ factors.basis, weight, rtol=0, atol=1e-8)


@BRANCHES
def test_a_group_is_fitted_as_one_stacked_weight(shape):
    weights, x = problem(shape)
    moment = moment_of(x)
    group, single = (fit_rank(some, moment, 3) for some in (weights, [torch.cat(weights)]))
    assert torch.equal(group.basis, single.basis)
    assert torch.equal(torch.cat(group.coefficients), single.coefficients[0])
    assert (group.loss, group.energy) == (single.loss, single.energy)


@BRANCHES
def test_each_coefficient_belongs_to_the_weight_in_its_place(shape):
    weights, x = problem(shape)
    moment = moment_of(x)
    there = fit_rank(weights, moment, 3)
    back = fit_rank(weights[::-1], moment, 3)
    for one, other in zip(there.coefficients, back.coefficients[::-1], strict=True):
        torch.testing.assert_close(one @ there.basis, other @ back.basis, rtol=0, atol=1e-10)


@pytest.mark.parametrize("with_moment", [True, False])
@BRANCHES
def test_a_basis_row_is_as_long_as_its_coefficient_column(shape, with_moment):
    weights, x = problem(shape)
    factors = fit_rank(weights, moment_of(100 * x) if with_moment else None, 3)
    lengths = torch.cat(factors.coefficients).norm(dim=0)
    torch.testing.assert_close(factors.basis.norm(dim=1), lengths, rtol=1e-12, atol=0)


@pytest.mark.parametrize("true_rank", [0, 1])
@BRANCHES
def test_rank_that_the_weights_do_not_have_is_left_unused(shape, true_rank):
    weights, x = problem(shape)
    weights = [weight[:, :true_rank] @ weights[0][:true_rank] for weight in weights]
    factors = fit_rank(weights, moment_of(x), 3)
    assert product(factors).isfinite().all()
    torch.testing.assert_close(product(factors), torch.cat(weights), rtol=0, atol=1e-10)
    assert factors.loss == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@BRANCHES
def test_weights_of_low_precision_are_fitted_in_float64(shape, dtype):
    weights, x = problem(shape)
    low = [weight.to(dtype) for weight in weights]
    moment = moment_of(x)
    from_low, exact = (
        fit_rank(some, moment, 3) for some in (low, [weight.double() for weight in low])
    )
    assert torch.equal(from_low.basis, exact.basis)
    assert from_low.basis.dtype == torch.float64


@BRANCHES
def test_a_moment_of_another_width_is_refused(shape):
    weights, x = problem(shape)
    with pytest.raises(CalibrationError) as error:
        fit_rank(weights, moment_of(x[:, :4]), 1)
    for said in ("layers.0.q_proj is 4 wide", f"inputs of width {shape[1]}"):
        assert said in str(error.value)


@BRANCHES
def test_a_moment_of_nothing_but_zeros_is_refused(shape):
    weights, x = problem(shape)
    with pytest.raises(CalibrationError, match=r"layers\.0\.q_proj has no positive eigenvalue"):
        fit_rank(weights, moment_of(torch.zeros_like(x)), 3)
