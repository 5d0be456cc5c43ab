"""Components are what is added, whatever is done to them on the way, and in whatever order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sharebasis.residual.residual_sums import BlockSums, StreamSums

D = 8
Step = Callable[[Tensor, Tensor, Tensor], Tensor]

SUMS: dict[str, tuple[Step, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "one after the other": (lambda x, a, m: (x + a) + m, lambda a: a, lambda m: m),
    "the stream second": (lambda x, a, m: m + (a + x), lambda a: a, lambda m: m),
    "side by side": (lambda x, a, m: x + (a + m), lambda a: a, lambda m: m),
    "in place of a branch": (lambda x, a, m: m.add_(a) + x, lambda a: a, lambda m: m),
    "in place of the stream": (lambda x, a, m: x.clone().add_(a).add_(m), lambda a: a, lambda m: m),
    "multiplied": (lambda x, a, m: x + 0.5 * a + m * 3, lambda a: 0.5 * a, lambda m: m * 3),
    "multiplied in place": (lambda x, a, m: x + a.mul_(2) + m, lambda a: 2 * a, lambda m: m),
    "normed": (
        lambda x, a, m: x + functional.rms_norm(a, (D,)) + m,
        lambda a: functional.rms_norm(a, (D,)),
        lambda m: m,
    ),
    "dropped out of nothing": (
        lambda x, a, m: x + functional.dropout(a + m, 0.1, training=False),
        lambda a: a,
        lambda m: m,
    ),
    "flattened": (
        lambda x, a, m: (x.view(-1, D) + (a + m).reshape(-1, D)).view(x.shape),
        lambda a: a,
        lambda m: m,
    ),
    "cast to and fro": (
        lambda x, a, m: (x.double() + (a.double() + m.double())).float(),
        lambda a: a,
        lambda m: m,
    ),
}


def run(step: Step) -> tuple[BlockSums, Tensor, Tensor]:
    x, a, m = torch.randn(3, 2, 5, D).unbind()
    sums = StreamSums()
    written = a.clone(), m.clone()
    with sums, torch.no_grad():
        sums.enter(x.clone(), None)
        stream = sums.block.before if sums.block else x
        sums.written(written[0], "attn")
        sums.written(written[1], "mlp")
        return sums.leave(step(stream, *written)), a, m


@pytest.mark.parametrize("name", SUMS)
def test_components_are_what_was_added(name: str) -> None:
    step, of_a, of_m = SUMS[name]
    block, a, m = run(step)
    for kind, wanted in (("attn", of_a(a)), ("mlp", of_m(m))):
        found = block.of(kind)  # type: ignore[arg-type]
        assert found is not None
        torch.testing.assert_close(found.to(wanted.dtype), wanted)
    assert block.error() < 8


@pytest.mark.parametrize(
    "step",
    [
        lambda x, a, m: functional.layer_norm(x + a + m, (D,)),
        lambda x, a, m: (x + a + m) * 1.01,
        lambda x, a, m: functional.rms_norm(x, (D,)) + a + m,
        lambda x, a, m: x - a + m,
        lambda x, a, m: torch.lerp(x, a + m, 0.5),
    ],
)
def test_what_is_no_sum_shows_in_the_error(step: Step) -> None:
    block, _, _ = run(step)
    assert block.error() > 1000
