"""Our Muon is torch's, matrix by matrix, however many cores it has."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from sharebasis.stages.recover.muon import Muon

SHAPES = [(40, 24), (24, 24), (8, 64), (64, 8), (33, 17)]


def _matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _gradients(step: int) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(1 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _step(ours: Muon, matrices: Sequence[nn.Parameter], step: int, rate: float) -> None:
    """As a backward pass would, gradients are added to those that are there."""
    for matrix, gradient in zip(matrices, _gradients(step), strict=True):
        matrix.grad = gradient if matrix.grad is None else matrix.grad + gradient
    ours.step(step, rate)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_step_is_that_of_torch(threads: int) -> None:
    expected, matrices, before = _matrices(), _matrices(), torch.get_num_threads()
    theirs = torch.optim.Muon(expected, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    torch.set_num_threads(threads)
    try:
        ours = Muon(matrices, turns=1)
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


def test_each_matrix_has_its_turn() -> None:
    matrices = _matrices()
    ours, moved = Muon(matrices, turns=3), list[int]()
    for step in range(6):
        before = [matrix.detach().clone() for matrix in matrices]
        _step(ours, matrices, step, 0.1)
        pairs = enumerate(zip(matrices, before, strict=True))
        moved += (now := [i for i, (own, was) in pairs if not torch.equal(own, was)])
        assert now == [i for i, matrix in enumerate(matrices) if matrix.grad is None]
    assert sorted(moved[: len(SHAPES)]) == list(range(len(SHAPES)))
    assert moved[len(SHAPES) :] == moved[: len(SHAPES)]


def test_a_turn_is_a_longer_step_by_the_sum_of_the_gradients() -> None:
    matrices = _matrices()
    ours = Muon(matrices, turns=len(SHAPES))
    for step in range(2 * len(SHAPES)):
        _step(ours, matrices, step, 0.1)
    largest = 0  # no other has as many multiply-adds, so the first turn is its own
    (expected,) = _matrices()[largest : largest + 1]
    theirs = torch.optim.Muon(
        [expected],
        lr=0.1 * len(SHAPES),
        weight_decay=0.0,
        momentum=0.95 ** len(SHAPES),
        adjust_lr_fn="match_rms_adamw",
    )
    for steps in ([0], range(1, 1 + len(SHAPES))):
        expected.grad = torch.stack([_gradients(step)[largest] for step in steps]).sum(0)
        theirs.step()
    moved = (expected - _matrices()[largest]).norm()
    assert (matrices[largest] - expected).norm() < 0.01 * moved


def test_it_goes_on_from_its_momentum_and_gradients() -> None:
    whole, first, second = _matrices(), _matrices(), _matrices()
    ours, before, after = Muon(whole), Muon(first), Muon(second)
    for step in range(6):
        _step(ours, whole, step, 0.1)
    for step in range(3):
        _step(before, first, step, 0.1)
    for matrix, old in zip(second, first, strict=True):
        matrix.data.copy_(old)
        matrix.grad = None if old.grad is None else old.grad.clone()
        after.restore(matrix, before.momentum(old))
    for step in range(3, 6):
        _step(after, second, step, 0.1)
    for own, wanted in zip(second, whole, strict=True):
        assert torch.equal(own, wanted)
