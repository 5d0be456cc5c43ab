"""A budget is met, and nothing more is given away than it takes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharebasis.allocation.uniform import uniform_ranks
from sharebasis.architecture.families import Architecture
from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.architecture.selection import LinearModule, classify
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import BudgetError
from sharebasis.linalg.rows import Rows
from sharebasis.structures.curve import factor_numbers


def group(d_out, d_in, n_parts=1):
    modules = [
        LinearModule(f"layers.{layer}.mlp.up_proj", "Linear", (d_out, d_in), bias=False)
        for layer in range(n_parts)
    ]
    architecture = Architecture(r"layers\.(\d+)\.", {"up": WeightTypeSettings(pattern=".*")})
    sublayers = classify(modules, architecture, d_in)
    return Group(tuple(Part(sublayer, "", "up", Rows(0, d_out)) for sublayer in sublayers))


def largest_rank(one, permille):
    """In whole numbers: the largest rank that removes at least `permille` / 1000."""
    allowed = (1000 - permille) * one.n_weights
    return allowed // (1000 * factor_numbers(one, 1, "plain"))


@given(
    d_out=st.integers(1, 3000),
    d_in=st.integers(1, 3000),
    n_parts=st.integers(1, 4),
    permille=st.integers(1, 999),
)
@example(d_out=20, d_in=20, n_parts=1, permille=900)
@example(d_out=1280, d_in=1280, n_parts=1, permille=800)
def test_a_rank_is_the_largest_that_removes_at_least_the_fraction(d_out, d_in, n_parts, permille):
    one = group(d_out, d_in, n_parts)
    rank = largest_rank(one, permille)
    if rank == 0:
        with pytest.raises(BudgetError):
            uniform_ranks([one], permille / 1000)
    else:
        assert uniform_ranks([one], permille / 1000) == [rank]


def test_every_group_gets_its_own_rank_in_the_order_of_the_groups():
    wide, tall, shared = group(16, 100), group(400, 100), group(16, 100, n_parts=4)
    assert uniform_ranks([wide, tall, shared], 0.25) == [10, 60, 29]
    assert uniform_ranks([shared, wide], 0.25) == [29, 10]


def test_no_groups_need_no_ranks():
    assert uniform_ranks([], 0.5) == []


def test_a_group_too_small_for_rank_1_is_refused_with_the_numbers_and_a_way_out():
    with pytest.raises(BudgetError) as error:
        uniform_ranks([group(100, 100), group(3, 4, n_parts=2)], 0.6)
    for said in (
        "Removing 0.6 of layers.0-1.mlp.up_proj",
        "stacked to (6, 4)",
        "rank 1 already stores 10 of 24 numbers",
        "Lower fit.removed or use a coarser split",
    ):
        assert said in str(error.value)
