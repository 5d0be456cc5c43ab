"""Streamed moments against one float64 product of everything, and the whitening they give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharebasis.errors import CalibrationError
from sharebasis.linalg.moments import NULL_SPACE, PANEL, Moment, MomentAccumulator, whitening

EPS = torch.finfo(torch.float64).eps


def tokens(n, d, seed=0):
    """Float32 inputs that are correlated, off centre and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator) / d**0.5
    sizes = torch.logspace(-2, 2, d)
    return ((torch.randn(n, d, generator=generator) + 0.5) @ mixing) * sizes


def gathered(*batches, site="layers.0.q_proj"):
    accumulator = MomentAccumulator(site, batches[0].shape[-1])
    for batch in batches:
        accumulator.update(batch)
    return accumulator.moment()


def excess(total, inputs):
    """The largest error of `total`, in units of what float64 sums of `inputs` may be off by."""
    x = inputs.double()
    allowed = EPS * (len(x) + 4) * (x.abs().T @ x.abs())
    return ((total - x.T @ x).abs() / allowed).max().item()


@settings(max_examples=40, deadline=None)
@given(
    d=st.sampled_from([1, 3, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 17]),
    n=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=5),
    seed=st.integers(0, 2**16),
)
def test_any_cut_into_batches_gives_the_product_of_the_whole(d, n, cuts, seed):
    x = tokens(n, d, seed)
    moment = gathered(*x.tensor_split(sorted(min(cut, n) for cut in cuts)))
    assert excess(moment.total, x) <= 1
    assert torch.equal(moment.total, moment.total.T)
    off = (moment.sum - x.double().sum(0)).abs()
    assert (off <= EPS * (n + 4) * x.double().abs().sum(0)).all()
    assert moment.n_tokens == n


def test_the_tolerance_of_the_test_above_is_too_narrow_for_float32_sums():
    x = tokens(40, PANEL + 1)
    assert excess((x.T @ x).double(), x) > 1e3


def test_leading_dimensions_are_tokens():
    x = tokens(24, 7)
    assert torch.equal(gathered(x.reshape(2, 3, 4, 7)).total, gathered(x).total)


def test_half_precision_inputs_are_summed_where_their_squares_do_not_fit():
    x = torch.full((3, 2), 1000.0, dtype=torch.float16)
    assert torch.equal(gathered(x).total, torch.full((2, 2), 3e6, dtype=torch.float64))


def test_mean_and_second_are_averages_over_the_tokens():
    x = tokens(50, 6).double()
    moment = gathered(x[:20], x[20:])
    torch.testing.assert_close(moment.mean, x.mean(0), rtol=1e-12, atol=1e-14)
    second = torch.stack([row.outer(row) for row in x]).mean(0)
    torch.testing.assert_close(moment.second, second, rtol=1e-12, atol=1e-13)


def test_the_diagonal_is_a_power_of_the_mean_square_of_each_channel():
    x = tokens(50, 6).double()
    moment = gathered(x).diagonal(0.5)
    torch.testing.assert_close(moment.second, x.square().mean(0).sqrt().diag(), rtol=1e-12, atol=0)


def test_the_root_of_the_mean_square_is_the_mean_size_where_sizes_are_all_the_same():
    signs, sizes = tokens(50, 6).sign().double(), torch.linspace(0.1, 9, 6).double()
    x = signs * sizes
    roots = gathered(x).diagonal(0.5).second
    torch.testing.assert_close(roots, x.abs().mean(0).diag(), rtol=1e-12, atol=0)


def test_a_moment_does_not_change_while_its_accumulator_goes_on():
    accumulator = MomentAccumulator("site", 5)
    accumulator.update(tokens(9, 5))
    moment = accumulator.moment()
    total, sums = moment.total.clone(), moment.sum.clone()
    accumulator.update(tokens(9, 5, seed=1))
    assert torch.equal(moment.total, total)
    assert torch.equal(moment.sum, sums)


@pytest.mark.parametrize("d", [5, PANEL + 30])
def test_loading_a_moment_and_going_on_equals_never_having_stopped(d):
    first, second = tokens(30, d), tokens(11, d, seed=1)
    stopped = gathered(first)
    before = stopped.total.clone()
    accumulator = MomentAccumulator("layers.0.q_proj", d)
    accumulator.update(tokens(3, d, seed=2))  # what was there goes
    accumulator.load(stopped)
    accumulator.update(second)
    resumed, never_stopped = accumulator.moment(), gathered(first, second)
    assert torch.equal(resumed.total, never_stopped.total)
    assert torch.equal(resumed.sum, never_stopped.sum)
    assert resumed.n_tokens == never_stopped.n_tokens == 41
    assert torch.equal(stopped.total, before)


def test_pooled_moments_equal_one_moment_of_all_their_tokens():
    x, y = tokens(13, 6), tokens(8, 6, seed=1)
    pooled = gathered(x, site="layers.0.q_proj") + gathered(y, site="layers.1.q_proj")
    assert excess(pooled.total, torch.cat([x, y])) <= 1
    torch.testing.assert_close(pooled.sum, torch.cat([x, y]).double().sum(0), rtol=1e-13, atol=0)
    assert pooled.n_tokens == 21
    assert pooled.site == "layers.0.q_proj + layers.1.q_proj"


def test_pooling_within_a_site_keeps_its_name():
    assert (gathered(tokens(3, 2)) + gathered(tokens(4, 2))).site == "layers.0.q_proj"


def test_inputs_of_another_width_are_refused_and_leave_the_sums_alone():
    accumulator = MomentAccumulator("layers.0.q_proj", 4)
    accumulator.update(tokens(6, 4))
    before = accumulator.moment()
    with pytest.raises(CalibrationError, match=r"^layers\.0\.q_proj has inputs of width 4, not 5"):
        accumulator.update(tokens(6, 5))
    assert torch.equal(accumulator.moment().total, before.total)
    assert accumulator.n_tokens == 6


@pytest.mark.parametrize("batches", [0, 1])
@pytest.mark.parametrize(
    "use", [lambda moment: moment.mean, lambda moment: moment.second, whitening]
)
def test_a_moment_of_no_tokens_can_be_kept_and_pooled_but_not_used(batches, use):
    accumulator = MomentAccumulator("layers.0.q_proj", 4)
    for _ in range(batches):
        accumulator.update(torch.zeros(0, 4))
    moment, other = accumulator.moment(), gathered(tokens(5, 4))
    assert (moment.n_tokens, moment.total.count_nonzero(), moment.sum.count_nonzero()) == (0, 0, 0)
    assert torch.equal((moment + other).second, other.second)
    with pytest.raises(CalibrationError, match=r"^layers\.0\.q_proj has seen no tokens"):
        use(moment)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, PANEL + 1])
def test_one_input_that_is_not_finite_is_refused(bad, column):
    x = tokens(10, PANEL + 2)
    x[4, column] = bad
    accumulator = MomentAccumulator("layers.0.q_proj", PANEL + 2)
    accumulator.update(x)
    with pytest.raises(CalibrationError) as error:
        accumulator.moment()
    for said in ("layers.0.q_proj", "NaN or infinite", "10 tokens", "model.dtype=float32"):
        assert said in str(error.value)


@pytest.mark.parametrize("n", [4, 12, 60])
def test_the_root_squared_is_the_second_moment(n):
    moment = gathered(tokens(n, 12))
    root, _ = whitening(moment)
    scale = moment.second.diagonal().max().item()
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-14 * scale)
    # With fewer tokens than dimensions the null space is raised to this share of the largest.
    raised = NULL_SPACE * torch.linalg.eigvalsh(moment.second)[-1].item() if n < 12 else 0
    torch.testing.assert_close(root @ root, moment.second, rtol=0, atol=raised + 1e-13 * scale)


def test_with_fewer_tokens_than_dimensions_what_was_not_seen_weighs_little_and_is_kept():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    moment = gathered(x)
    root, inverse = whitening(moment)
    seen, unseen = torch.linalg.svd(x)[2].split([5, 7])
    identity = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(inverse @ root, identity, rtol=0, atol=1e-8)
    squared = root @ root
    torch.testing.assert_close(squared @ seen.T, moment.second @ seen.T, rtol=1e-10, atol=1e-10)
    floor = NULL_SPACE * torch.linalg.eigvalsh(moment.second)[-1]
    weight = (unseen @ squared @ unseen.T).diagonal()
    torch.testing.assert_close(weight, floor.expand(7), rtol=1e-2, atol=0)


def test_whitened_inputs_have_the_identity_for_second_moment():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).double() + 1
    white = x @ whitening(gathered(x))[1]
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(white.T @ white / len(x), identity, rtol=0, atol=1e-12)


def test_whitening_by_a_moment_without_a_positive_eigenvalue_is_refused():
    with pytest.raises(CalibrationError, match=r"The moment of layers\.0\.q_proj has no positive"):
        whitening(gathered(torch.zeros(3, 4)))


def test_whitening_does_not_mix_up_two_moments_of_one_site():
    one, two = gathered(tokens(20, 4)), gathered(tokens(20, 4) * 2)
    roots = [whitening(moment)[0] for moment in (one, two, one)]
    torch.testing.assert_close(roots[1], 2 * roots[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(roots[2], roots[0], rtol=0, atol=0)


def test_moving_a_moment_keeps_every_number():
    moment = gathered(tokens(7, 3))
    moved = moment.to("cpu")
    assert isinstance(moved, Moment)
    assert torch.equal(moved.total, moment.total)
    assert torch.equal(moved.sum, moment.sum)
    assert (moved.n_tokens, moved.site) == (moment.n_tokens, moment.site)
