"""The losses of distillation against other roads, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sharebasis.linalg.divergence import CHUNK, divergence, hidden_distance


@pytest.mark.parametrize("shape", [(1, 5), (CHUNK, 7), (2, CHUNK + 3, 11)])
def test_the_divergence_and_its_gradient_are_those_of_kl_div(shape: tuple[int, ...]) -> None:
    teacher, student = 3 * torch.randn(shape), 3 * torch.randn(shape)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    logs = theirs.log_softmax(-1).flatten(0, -2), teacher.log_softmax(-1).flatten(0, -2)
    expected = functional.kl_div(*logs, log_target=True, reduction="batchmean")
    found = divergence(teacher, ours)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    (2 * found).backward()
    (2 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_equal_logits_diverge_by_nothing() -> None:
    logits = torch.randn(3, 4, 9)
    student = logits.clone().requires_grad_()
    loss = divergence(logits, student)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() == 0


def test_the_teacher_gets_no_gradient() -> None:
    teacher = torch.randn(2, 5, requires_grad=True)
    student = torch.randn(2, 5, requires_grad=True)
    divergence(teacher, student).backward()
    assert teacher.grad is None


def test_a_position_weighs_as_much_as_any_other_in_the_hidden_distance() -> None:
    """A token whose hidden state is a thousand times longer is not a million times dearer."""
    teacher = torch.randn(2, 6, 8)
    teacher[:, 0] *= 1000
    off = 1.1 * teacher
    found = hidden_distance([teacher, teacher], [off, teacher])
    assert found.item() == pytest.approx((0.01 + 0) / 2, rel=1e-4)
