"""Our Muon is torch's, matrix by matrix, however many cores it has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from sharebasis.muon import Muon

SHAPES = [(40, 24), (24, 24), (8, 64), (64, 8), (33, 17)]


def _matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _gradients(step: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _step(ours: Muon, matrices: Sequence[nn.Parameter], step: int, rate: float) -> None:
    for matrix, gradient in zip(matrices, _gradients(step), strict=True):
        matrix.grad = gradient
    ours.step(rate)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_step_is_that_of_torch(threads: int) -> None:
    expected, matrices, before = _matrices(), _matrices(), torch.get_num_threads()
    theirs = torch.optim.Muon(expected, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    torch.set_num_threads(threads)
    try:
        ours = Muon(matrices)
        for step, rate in enumerate([0.1, 0.05]):
            _step(ours, matrices, step, rate)
    finally:
        torch.set_num_threads(before)
    for step, rate in enumerate([0.1, 0.05]):
        for matrix, gradient in zip(expected, _gradients(step), strict=True):
            matrix.grad = gradient
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    for own, wanted, start in zip(matrices, expected, _matrices(), strict=True):
        assert own.grad is None
        moved = (wanted - start).norm()
        # bfloat16 inside, and the order of its sums is the number of threads'
        assert (own - wanted).norm() < 0.01 * moved


def test_it_goes_on_from_its_momentum() -> None:
    whole, first, second = _matrices(), _matrices(), _matrices()
    ours = Muon(whole)
    _step(ours, whole, 0, 0.1)
    _step(ours, whole, 1, 0.1)
    before = Muon(first)
    _step(before, first, 0, 0.1)
    after = Muon(second)
    for matrix, old in zip(second, first, strict=True):
        matrix.data.copy_(old)
        after.restore(matrix, before.momentum(old))
    _step(after, second, 1, 0.1)
    for own, wanted in zip(second, whole, strict=True):
        assert torch.equal(own, wanted)
