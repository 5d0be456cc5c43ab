"""What is a linear module, by what it computes."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture.selection import LinearModule
from sharebasis.model.explore import is_linear, linear_modules


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 4), (4, 4)])
def test_conv1d_and_linear_are_told_apart_by_type_and_report_the_same_shape(
    d_out: int, d_in: int
) -> None:
    model = nn.ModuleDict({"conv": Conv1D(d_out, d_in), "linear": nn.Linear(d_in, d_out, False)})
    assert linear_modules(model) == (
        LinearModule("conv", "Conv1D", (d_out, d_in), bias=True),
        LinearModule("linear", "Linear", (d_out, d_in), bias=False),
    )


def test_a_module_that_uses_anothers_weight_says_whose() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "other", "third")})
    model["third"].weight = model["one"].weight
    assert [(module.name, module.tied_to) for module in linear_modules(model)] == [
        ("one", None),
        ("other", None),
        ("third", "one"),
    ]


def test_a_module_under_two_names_is_there_twice() -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": linear, "other": linear})
    found = [(module.name, module.tied_to) for module in linear_modules(model)]
    assert found == [("one", None), ("other", "one")]


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return super().forward(input).topk(2)


class Picky(nn.Linear):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(one + other)


class Renamed(nn.Linear):
    """Does what a Linear does by a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        flat = input.reshape(-1, input.shape[-1]) @ self.weight.T
        flat = flat if self.bias is None else flat + self.bias
        return flat.view(*input.shape[:-1], -1)


class RenamedConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("module_type", "expected"),
    [(nn.Linear, True), (Renamed, True), (Twice, False), (Router, False), (Picky, False)],
)
def test_what_inherits_from_linear_is_one_if_it_computes_like_one(
    module_type: type[nn.Linear], expected: bool, bias: bool, device: str
) -> None:
    module = module_type(5, 3, bias, device=device)
    before = dict(module.named_parameters())
    assert is_linear(module) == expected
    assert len(linear_modules(nn.ModuleDict({"one": module}))) == expected
    assert all(after is before[name] for name, after in module.named_parameters())


def test_what_inherits_from_conv1d_is_one_if_it_computes_like_one() -> None:
    assert is_linear(RenamedConv1D(3, 5))
    assert is_linear(Conv1D(3, 5))
    assert not is_linear(nn.Embedding(3, 5))
