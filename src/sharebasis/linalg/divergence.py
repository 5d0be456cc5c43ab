"""What a model that learns from another one is told: logits and hidden states to come near to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 16
"""Positions looked at at a time, so few that what lies between stays in a core's cache."""


def divergence(
    teacher: Float[Tensor, "*batch d_vocab"], student: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, ""]:
    """Mean over positions of KL(teacher || student), in nats; differentiable in `student`.

    Equal to `functional.kl_div` of log-softmaxes. The gradient, softmax(student) -
    softmax(teacher), is made in the same sweep, so that only one tensor of the size of the
    logits is kept for the backward pass.
    """
    loss: Tensor = _Divergence.apply(teacher.detach(), student)
    return loss


def hidden_distance(
    teacher: Sequence[Float[Tensor, "*batch d_model"]],
    student: Sequence[Float[Tensor, "*batch d_model"]],
) -> Float[Tensor, ""]:
    """Mean over layers and positions of ‖teacher - student‖² / ‖teacher‖².

    By position, so that the few tokens whose hidden states are hundreds of times longer than
    the others' weigh no more than they do.
    """
    ratios = [
        ((theirs.float() - ours.float()).pow(2).sum(-1) / theirs.float().pow(2).sum(-1)).mean()
        for theirs, ours in zip(teacher, student, strict=True)
    ]
    return torch.stack(ratios).mean()


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor) -> Tensor:
        ours, theirs = student.flatten(0, -2), teacher.flatten(0, -2)
        gradient = torch.empty_like(ours)
        total = torch.zeros((), dtype=torch.float64, device=ours.device)
        chunks = theirs.split(CHUNK), ours.split(CHUNK), gradient.split(CHUNK)
        for p, q, out in zip(*chunks, strict=True):
            log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p - log_q).sum()
            out.copy_(log_q.exp_().sub_(p))
        ctx.save_for_backward(gradient)
        ctx.shape = student.shape
        return (total / len(ours)).float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[None, Tensor]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * (outer / len(gradient))).view(ctx.shape)
