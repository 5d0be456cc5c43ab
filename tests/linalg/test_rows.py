"""Rows are a range, or ranges at a regular distance, and nothing is lost in putting them back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharebasis.compressed.edits import PrunedNeurons
from sharebasis.compressed.index import StoredPart
from sharebasis.linalg.rows import Rows, inverse_order, rows_at

ROWS = {
    "a block": (Rows(5, 4), [5, 6, 7, 8]),
    "a block at the start": (Rows(0, 2), [0, 1]),
    "one row": (Rows(7, 1), [7]),
    "runs": (Rows(2, 3, 4, 10), [2, 3, 4, 12, 13, 14, 22, 23, 24, 32, 33, 34]),
    "runs side by side": (Rows(1, 2, 3, 2), [1, 2, 3, 4, 5, 6]),
    "single rows": (Rows(1, 1, 4, 3), [1, 4, 7, 10]),
}


@st.composite
def some_rows(draw: st.DrawFn) -> Rows:
    start, length, runs = draw(st.tuples(*[st.integers(0, 9), *[st.integers(1, 6)] * 2]))
    return Rows(start, length, runs, draw(st.integers(length, length + 5)) if runs > 1 else 0)


def listed(rows: Rows) -> list[int]:
    """The rows by another road than the one under test."""
    return [
        rows.start + run * rows.stride + offset
        for run in range(rows.runs)
        for offset in range(rows.length)
    ]


def weight(n_rows: int = 60, d_in: int = 3) -> Tensor:
    return torch.arange(n_rows * d_in).reshape(n_rows, d_in)


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_a_sequence_of_row_numbers(case: str) -> None:
    rows, expected = ROWS[case]
    assert list(rows) == expected
    assert len(rows) == len(expected)
    assert [rows[i] for i in range(len(rows))] == expected
    assert [rows[i] for i in range(-len(rows), 0)] == expected
    assert rows.stop == expected[-1] + 1
    assert rows.numbers.tolist() == expected


@pytest.mark.parametrize("case", ROWS)
def test_a_row_beyond_the_last_is_no_row(case: str) -> None:
    rows, expected = ROWS[case]
    for beyond in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            rows[beyond]


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_taken_is_these_rows_and_a_view_where_a_slice_can_say_it(
    case: str, transposed: bool
) -> None:
    rows, expected = ROWS[case]
    whole = weight(d_in=60).T if transposed else weight()
    own = rows.take(whole)
    assert torch.equal(own, whole[torch.tensor(expected)])
    is_view = own.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert is_view == (rows.runs == 1 or rows.length == 1)


def test_biases_are_taken_like_weights() -> None:
    bias = torch.arange(60)
    for rows, expected in ROWS.values():
        assert rows.take(bias).tolist() == expected


@given(rows=some_rows(), data=st.data())
def test_a_part_is_a_piece_of_the_rows_or_is_refused(rows: Rows, data: st.DataObject) -> None:
    expected = listed(rows)
    assert list(rows) == expected
    start = data.draw(st.integers(0, len(expected) - 1))
    length = data.draw(st.integers(1, len(expected) - start))
    offset = start % rows.length
    within_a_run = offset + length <= rows.length
    whole_runs = offset == 0 and length % rows.length == 0
    if within_a_run or whole_runs:
        part = rows.part(start, length)
        assert list(part) == expected[start : start + length]
        assert (part.runs == 1) == (length <= rows.length)
    else:
        with pytest.raises(ValueError, match=f"^{length} rows from {start} on are not whole runs"):
            rows.part(start, length)


@pytest.mark.parametrize("case", ROWS)
def test_a_part_that_is_not_all_there_is_refused(case: str) -> None:
    rows, expected = ROWS[case]
    n = len(expected)
    for start, length in ((0, n + 1), (n - 1, 2), (n, 1), (n + 3, 1), (-1, 1), (0, 0), (1, -1)):
        said = rf"^{length} rows from {start} on are not among the {n} of Rows\(start={rows.start}"
        with pytest.raises(ValueError, match=said):
            rows.part(start, length)


def test_a_part_within_one_run_is_a_block_like_any_other() -> None:
    assert Rows(2, 3, 4, 10).part(3, 3) == Rows(12, 3)
    assert Rows(2, 3, 4, 10).part(7, 2) == Rows(23, 2)
    assert Rows(2, 3, 4, 10).part(3, 6) == Rows(12, 3, 2, 10)
    assert Rows(1, 1, 8, 3).part(4, 4) == Rows(13, 1, 4, 3)


def test_the_refusal_says_which_rows() -> None:
    with pytest.raises(ValueError, match=r"^4 rows from 3 on are not whole runs of Rows\(start=2"):
        Rows(2, 3, 4, 10).part(3, 4)


@pytest.mark.parametrize("turns", [False, True])
@given(kept=st.sets(st.integers(0, 8), min_size=1))
def test_what_is_left_of_blocks_lies_where_smaller_blocks_do(turns: bool, kept: set[int]) -> None:
    places = sorted(kept)
    blocks = [Rows(i, 1, 9, 2) if turns else Rows(9 * i, 9) for i in (0, 1)]
    left = rows_at(torch.tensor(places), blocks)
    assert left.tolist() == sorted(listed(block)[place] for block in blocks for place in places)
    mlp = PrunedNeurons(("gate_up",), "down", tuple(places), tuple(blocks))
    assert mlp.rows.tolist() == left.tolist()
    assert mlp.original_block(_part(Rows(0, len(left)))) is None
    for block in blocks:
        own = block.resized(18, len(left))
        assert mlp.original_block(_part(own)) == block
        assert left[own.numbers].tolist() == [listed(block)[place] for place in places]
    assert all(own.resized(18, 18) == own for own in (*blocks, Rows(0, 3, 3, 6)))


def _part(rows: Rows) -> StoredPart:
    return StoredPart(("gate_up",), rows, {})


@given(st.permutations(range(12)))
def test_rows_that_were_stacked_come_back_in_the_weights_order(order: list[int]) -> None:
    parts = [Rows(row, 1) for row in order]
    stacked = torch.cat([rows.take(weight(12)) for rows in parts])
    inverse = inverse_order(parts)
    assert (inverse is None) == (order == list(range(12)))
    assert torch.equal(stacked if inverse is None else stacked[inverse], weight(12))


def test_no_row_is_looked_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of many experts has millions of them."""
    parts = [Rows(0, 2, 30, 4), Rows(2, 2, 30, 4)]
    stop = max(rows.stop for rows in parts)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "__getitem__", lambda *_: pytest.fail("a row was looked up"))
        inverse = inverse_order(parts)
        stacked = torch.cat([rows.take(weight(stop)) for rows in parts])
    assert inverse is not None
    assert torch.equal(stacked[inverse], weight(stop))


@pytest.mark.parametrize(
    "parts",
    [
        [Rows(0, 12)],
        [Rows(0, 5), Rows(5, 7)],
        [Rows(0, 2, 3, 2), Rows(6, 6)],
        [Rows(0, 1)],
    ],
)
def test_parts_that_lie_one_after_the_other_need_no_order(parts: list[Rows]) -> None:
    assert inverse_order(parts) is None


@pytest.mark.parametrize(
    "parts",
    [
        [Rows(5, 7), Rows(0, 5)],
        [Rows(0, 2, 3, 4), Rows(2, 2, 3, 4)],
        [Rows(0, 1, 6, 2), Rows(1, 1, 6, 2)],
        [Rows(1, 1), Rows(0, 1)],
        [Rows(0, 3), Rows(4, 1), Rows(3, 1), Rows(5, 7)],  # its own inverse, and no identity
    ],
)
def test_parts_that_take_turns_come_back_in_the_weights_order(parts: list[Rows]) -> None:
    n_rows = sum(len(rows) for rows in parts)
    stacked = torch.cat([rows.take(weight(n_rows)) for rows in parts])
    inverse = inverse_order(parts)
    assert inverse is not None
    assert torch.equal(stacked[inverse], weight(n_rows))
