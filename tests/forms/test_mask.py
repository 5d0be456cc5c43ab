"""Weights that lack entries are stored as their values and a mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharebasis.errors import StateError
from sharebasis.forms.form import RoleTensors
from sharebasis.forms.masked import Masked, pack, unpack
from sharebasis.forms.share_linear import ShareLinear, State


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _loaded(values: Tensor, kept: Tensor) -> Masked:
    tensors = RoleTensors({}, ({"dense": values, "mask": pack(kept)},))
    return Masked.load(tensors, [(kept.shape[0], kept.shape[1])])


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 100))
def test_masks_are_what_was_packed(d_out: int, d_in: int, seed: int) -> None:
    kept = torch.rand(d_out, d_in, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(kept)
    assert torch.equal(unpack(packed, (d_out, d_in)), kept)
    n = int(kept.sum())
    assert Masked.n_numbers(n, kept.numel()) == n + len(packed) == n + math.ceil(d_out * d_in / 16)
    weight = torch.where(kept, torch.arange(1.0, 1 + kept.numel()).view_as(kept), 0.0)
    assert torch.equal(_loaded(weight[kept], kept).weight, weight)


def test_the_first_entries_are_in_the_lowest_bits() -> None:
    kept = torch.zeros(2, 10, dtype=torch.bool)
    kept[0, 0] = kept[0, 4] = kept[1, 9] = True
    assert pack(kept).tolist() == [0b10001, 0b1000]


def test_a_module_says_what_the_weight_says_and_knows_what_is_there() -> None:
    kept = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    weight = torch.where(kept, _random(5, 7).float(), 0.0)
    linear, x = ShareLinear(torch.empty(5, 7, device="meta")), _random(3, 7).float()
    form = _loaded(weight[kept], kept)
    linear.compress(form.modules()[0])
    assert linear.state is State.COMPRESSED
    assert torch.equal(form.support, kept)
    torch.testing.assert_close(linear(x), x @ weight.T)
    assert torch.equal(linear.dense(), weight)


def test_a_mask_of_other_values_is_told() -> None:
    kept = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(StateError, match="6 entries does not go with 5 values"):
        _loaded(torch.ones(5), kept)
