"""Weights that lack entries are stored as their values and a mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sharebasis.forms.mask import n_kept, pack, unpack, whole
from sharebasis.forms.mask import n_stored as n_with_mask
from torch import Tensor

from sharebasis.errors import StateError
from sharebasis.forms.share_linear import ShareLinear, State


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 100))
def test_masks_are_what_was_packed(d_out: int, d_in: int, seed: int) -> None:
    kept = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(kept)
    assert torch.equal(unpack(packed, (d_out, d_in)), kept)
    n = int(kept.sum())
    assert n_with_mask(n, kept.numel()) == n + len(packed) == n + math.ceil(d_out * d_in / 16)
    assert n_kept(n + len(packed), kept.numel()) == n
    weight = torch.where(kept, torch.arange(1.0, 1 + kept.numel()).view_as(kept), 0.0)
    assert torch.equal(whole(weight[kept], kept), weight)


def test_the_first_entries_are_in_the_lowest_bits() -> None:
    kept = torch.zeros(2, 10, dtype=torch.bool)
    kept[0, 0] = kept[0, 4] = kept[1, 9] = True
    assert pack(kept).tolist() == [0b10001, 0b1000]


def test_a_module_says_what_the_weight_says_and_knows_what_is_there() -> None:
    kept = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = torch.where(kept, _random(5, 7).float(), 0.0)
    linear, x = ShareLinear(torch.empty(5, 7, device="meta")), _random(3, 7).float()
    linear.leave_out(weight[kept], pack(kept))
    assert linear.state is State.COMPRESSED
    assert linear.kept is not None
    assert torch.equal(linear.kept, kept)
    torch.testing.assert_close(linear(x), x @ weight.T)
    assert torch.equal(linear.dense(), weight)
    with pytest.raises(StateError, match="cannot become compressed"):
        linear.leave_out(weight[kept], pack(kept))


def test_a_mask_of_other_values_is_told() -> None:
    kept = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(StateError, match="6 entries does not go with 5 values"):
        ShareLinear(torch.empty(2, 3)).leave_out(torch.ones(5), pack(kept))
