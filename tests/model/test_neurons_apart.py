"""An MLP's own code says which rows of its fused weight are a neuron's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn
from torch.nn import functional

from sharebasis.linalg.rows import Rows
from sharebasis.model.neuron_independence import neurons_are_apart

D_MLP, D_MODEL = 6, 4
HALVES = (Rows(0, D_MLP), Rows(D_MLP, D_MLP))
TURNS = (Rows(0, 1, D_MLP, 2), Rows(1, 1, D_MLP, 2))


class Mlp(nn.Module):
    def __init__(self, hidden: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up = nn.Linear(D_MODEL, 2 * D_MLP, device="meta")
        self.down = nn.Linear(D_MLP, D_MODEL, device="meta")
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(self.gate_up(x)))


def _of_halves(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _of_turns(x: Tensor) -> Tensor:
    return functional.gelu(x[..., 1::2]) * x[..., ::2]


def _of_a_fixed_width(x: Tensor) -> Tensor:
    gate, up = x.split(D_MLP, dim=-1)
    return functional.silu(gate) * up


def _cut_at_a_fixed_width(x: Tensor) -> Tensor:
    """Runs at any width; with three neurons, up of the first is not where it is looked for."""
    return functional.silu(x[..., :3]) * x[..., 3:6]


def _normed(x: Tensor) -> Tensor:
    return functional.rms_norm(_of_halves(x), (x.shape[-1] // 2,))


FORWARD = {
    "halves": (_of_halves, HALVES),
    "turns": (_of_turns, TURNS),
    "a fixed width": (_of_a_fixed_width, ()),
    "cut at a fixed width": (_cut_at_a_fixed_width, ()),
    "normed": (_normed, ()),
    "a sum over tokens": (lambda x: _of_halves(x).cumsum(1), ()),
    "up alone counts": (lambda x: x.chunk(2, dim=-1)[1], ()),
}


@pytest.mark.parametrize("case", FORWARD)
def test_only_neurons_that_are_what_the_layout_says_are_apart(case: str) -> None:
    hidden, wanted = FORWARD[case]
    module = Mlp(hidden)
    before = dict(module.named_modules())
    for gate_up in (HALVES, TURNS):
        found = neurons_are_apart(module, "gate_up", "down", D_MODEL, gate_up)
        assert found == (gate_up == wanted)
    assert dict(module.named_modules()) == before


def test_what_wants_more_than_hidden_states_is_not_known_to_be() -> None:
    class Routed(Mlp):
        def forward(self, x: Tensor, scores: Tensor | None = None) -> Tensor:  # type: ignore[override]
            assert scores is not None
            return super().forward(x) * scores

    assert not neurons_are_apart(Routed(_of_halves), "gate_up", "down", D_MODEL, HALVES)
