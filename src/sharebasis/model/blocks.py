"""The blocks of a model one after the other, on hidden states that are kept between them.

A whole model need not run to see what goes into one block: what a block is called with beside
its hidden states (positions, masks) is the same for every text of one shape, so it is recorded
once and used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Classification
from sharebasis.errors import PropagationError
from sharebasis.model.hooks import first_call

HIDDEN = "hidden_states"
"""The argument's name, for blocks that are given it by name."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block; what it puts out beside hidden states is dropped."""
        # Of a copy: a block may change its hidden states in place.
        output = block(hidden.clone(), *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]


class Blocks:
    """Blocks as functions of hidden states alone.

    Args:
        model: in eval mode; the original or the compressed one, whose calls are the same.
        names: HF names of its blocks, in the order in which they run.
        windows: token ids to record the calls with, one sequence a row.
        batch: windows a call; `windows` may leave a smaller batch at the end.

    Raises:
        PropagationError: a block is given what another block did not put out, or something
            that depends on the text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        names: Sequence[str],
        windows: Int64[Tensor, "windows window"],
        batch: int,
    ) -> None:
        self.names = tuple(names)
        self._calls: dict[int, Sequence[Call]] = {}
        for chunk in windows.split(batch):
            if len(chunk) not in self._calls:
                calls = _record(model, self.names, chunk)
                other = _record(model, self.names, chunk.flip(1))
                _require_same(self.names, calls, other)
                self._calls[len(chunk)] = calls

    def run(
        self, i: int, block: nn.Module, hidden: Float[Tensor, "batch window d_model"]
    ) -> Float[Tensor, "batch window d_model"]:
        """Run block `i`, or another one in its place."""
        return self._calls[len(hidden)][i](block, hidden)


@torch.no_grad()
def embed(
    model: PreTrainedModel, first: str, windows: Int64[Tensor, "batch window"]
) -> Float[Tensor, "batch window d_model"]:
    """The hidden states that the first block is given.

    Args:
        model: only what lies before its blocks runs.
        first: HF name of the first block.
        windows: token ids.
    """
    run = partial(model.base_model, input_ids=windows, use_cache=False)
    return _hidden_of(*first_call(model.get_submodule(first), run))[0]


@torch.no_grad()
def _record(
    model: PreTrainedModel, names: Sequence[str], windows: Int64[Tensor, "batch window"]
) -> Sequence[Call]:
    """What every block is called with, in a run of the whole model."""
    calls: list[Call] = []
    outputs: list[Tensor] = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = _hidden_of(args, kwargs)
        i = len(calls)
        in_turn = i < len(names) and block is model.get_submodule(names[i])
        if not in_turn or (outputs and not torch.equal(hidden, outputs.pop())):
            raise PropagationError(
                f"{names[min(i, len(names) - 1)]} cannot be run by itself: it is not given, once, "
                "what the block before it puts out. Set propagate=none."
            )
        calls.append(call)

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    hooks = []
    for name in names:
        block = model.get_submodule(name)
        hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(block.register_forward_hook(after))
    try:
        model.base_model(input_ids=windows, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) < len(names):
        raise PropagationError(f"{names[len(calls)]} does not run. Set propagate=none.")
    return calls


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], dict(kwargs))
    return kwargs[HIDDEN], Call((), {key: own for key, own in kwargs.items() if key != HIDDEN})


def _require_same(names: Sequence[str], calls: Sequence[Call], other: Sequence[Call]) -> None:
    for name, one, two in zip(names, calls, other, strict=True):
        pairs = zip(_tensors((one.args, one.kwargs)), _tensors((two.args, two.kwargs)), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            raise PropagationError(
                f"{name} cannot be run by itself: beside its hidden states it is given something "
                "that depends on the text. Set propagate=none."
            )


def _tensors(content: Any) -> Iterator[Tensor]:
    """Those in nested sequences and mappings."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for own in content.values():
            yield from _tensors(own)
    elif isinstance(content, list | tuple):
        for own in content:
            yield from _tensors(own)


def block_names(model: PreTrainedModel, classification: Classification) -> Sequence[str]:
    """The HF names of all blocks, those of no sublayer too, in the order of their numbers.

    Raises:
        PropagationError: they are not the children of one module.
    """
    parents = {sublayer.block.rpartition(".")[0] for sublayer in classification.selected}
    if len(parents) != 1:
        raise PropagationError(
            f"The blocks lie in several modules, {', '.join(sorted(parents))}, and cannot be run "
            "one after the other. Set propagate=none."
        )
    (parent,) = parents
    return [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]
