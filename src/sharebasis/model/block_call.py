"""How a block is called: its hidden states, and what it is given beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class BlockCall:
    """What a block is called with beside its hidden states: positions, masks."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str
    """Of the hidden states among the arguments; None lies there instead of them."""

    def arguments(self, hidden: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Args and kwargs of the same call on other hidden states."""
        if isinstance(self.place, int):
            return (*self.args[: self.place], hidden, *self.args[self.place + 1 :]), {**self.kwargs}
        return self.args, {**self.kwargs, self.place: hidden}

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden states that a block makes of others."""
        args, kwargs = self.arguments(hidden.clone())  # which it may change in place
        return hidden_output(block(*args, **kwargs))


def block_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, BlockCall]:
    """The hidden states that a block is called with, and the rest of the call.

    They are the first tensor of floats, by place or by name.
    """
    arguments: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    place = next(place for place, x in arguments.items() if is_float(x))
    hidden: Tensor = arguments[place]
    return hidden, BlockCall(*BlockCall(args, kwargs, place).arguments(None), place)


def hidden_output(output: Any) -> Tensor:
    """The hidden states in what a block or sublayer returns; what lies beside them is dropped."""
    return output if isinstance(output, Tensor) else output[0]


def is_float(x: object) -> TypeGuard[Tensor]:
    """Whether this is a tensor that hidden states may be made of."""
    return isinstance(x, Tensor) and x.is_floating_point()
