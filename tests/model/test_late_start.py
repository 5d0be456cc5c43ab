"""A pass that starts at a later block is the whole pass, or is not started there."""

from __future__ import annotations

import pytest
import torch
from small_pipeline import WINDOWS, MakeSmallModel, SmallModel
from torch import Tensor, nn

from sharebasis.model.blocks import LateStart


@pytest.fixture(params=["llama", "gpt2"])
def small(request: pytest.FixtureRequest, small_model: MakeSmallModel) -> SmallModel:
    return small_model(request.param)


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor = WINDOWS[:3]) -> Tensor:
    return model(input_ids=windows).logits[:, :-1]


def test_a_pass_can_start_at_every_block_of_a_plain_stack(small: SmallModel) -> None:
    model = small.load()
    late = LateStart(model, small.classification.blocks)
    assert late.exact({0, 1, 2}, lambda: _logits(model)) == {1, 2}
    whole, outputs = late.record({1, 2}, lambda: _logits(model))
    with late.start_at(2, outputs):  # the first blocks do not run, whatever they are given
        assert torch.equal(_logits(model, WINDOWS[3:6]), whole)
    assert torch.equal(_logits(model), whole)
    assert not torch.equal(_logits(model, WINDOWS[3:6]), whole)


class _Remembering(nn.Module):
    """A block that leaves something for a later one."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.linear, self.asks = nn.Linear(4, 4), asks

    def forward(self, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.linear(x) + (memory["first"] if self.asks else 0)
        memory.setdefault("first", y)
        return y


def test_no_pass_starts_where_a_later_block_asks_for_what_an_earlier_one_left() -> None:
    blocks = nn.ModuleList([_Remembering(i == 2) for i in range(4)])
    x = torch.randn(2, 4)

    def run() -> Tensor:
        memory: dict[str, Tensor] = {}
        y = x
        for block in blocks:
            y = block(y, memory)
        return y

    late = LateStart(blocks, {i: str(i) for i in range(4)})
    assert late.exact({1, 2, 3}, run) == {3}
    assert torch.equal(run(), run())
