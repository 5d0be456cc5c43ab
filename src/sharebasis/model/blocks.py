"""The blocks of a model: their names, what they are called with, and runs of some of them.

A whole model need not run to see what goes into one block. `Blocks` runs one block after the
other on hidden states that are kept between them; `LateStart` runs a model behind the blocks
whose output is known already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Classification
from sharebasis.errors import PropagationError
from sharebasis.model.block_call import BlockCall, block_call, hidden_output
from sharebasis.model.hooks import attached, copied, first_call, forced

PROBE_TOKENS = 4
"""Enough to see what reads and writes the residual stream, and which sublayers read one tensor."""

Outputs = Mapping[int, Any]
"""Layer -> what the block before it returned."""


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


@torch.no_grad()
def run_blocks(model: PreTrainedModel, windows: Int64[Tensor, "windows window"]) -> None:
    """Run all but the head, whose logits nobody reads and which are the largest product."""
    model.base_model(input_ids=windows, use_cache=False)


def embed(
    model: PreTrainedModel, first: str, windows: Int64[Tensor, "batch window"]
) -> Float[Tensor, "batch window d_model"]:
    """The hidden states that the first block is given.

    Args:
        model: only what lies before its blocks runs.
        first: HF name of the first block.
        windows: token ids.
    """
    call = first_call(model.get_submodule(first), partial(run_blocks, model, windows))
    return block_call(*call)[0]


class Blocks:
    """Blocks as functions of hidden states alone.

    What a block is called with beside its hidden states is the same for every text of one shape,
    so it is recorded once and used again.

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
        self._calls: dict[int, Sequence[BlockCall]] = {}
        for chunk in windows.split(batch):
            if len(chunk) not in self._calls:
                calls = _record(model, self.names, chunk)
                _require_same(self.names, calls, _record(model, self.names, chunk.flip(1)))
                self._calls[len(chunk)] = calls

    def run(
        self, i: int, block: nn.Module, hidden: Float[Tensor, "batch window d_model"]
    ) -> Float[Tensor, "batch window d_model"]:
        """Run block `i`, or another one in its place."""
        return self._calls[len(hidden)][i].run(block, hidden)


def _record(
    model: PreTrainedModel, names: Sequence[str], windows: Int64[Tensor, "batch window"]
) -> Sequence[BlockCall]:
    """What every block is called with, in a run of the whole model."""
    calls: list[BlockCall] = []
    outputs: list[Tensor] = []
    blocks = [model.get_submodule(name) for name in names]

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, call = block_call(args, kwargs)
        i = len(calls)
        in_turn = i < len(names) and block is blocks[i]
        if not in_turn or (outputs and not torch.equal(hidden, outputs.pop())):
            raise PropagationError(
                f"{names[min(i, len(names) - 1)]} cannot be run by itself: it is not given, once, "
                "what the block before it puts out. Set propagate=none."
            )
        calls.append(call)

    def after(_block: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(hidden_output(output))

    def hooks() -> Iterator[RemovableHandle]:
        for block in blocks:
            yield block.register_forward_pre_hook(before, with_kwargs=True)
            yield block.register_forward_hook(after)

    with attached(hooks()):
        run_blocks(model, windows)
    if len(calls) < len(names):
        raise PropagationError(f"{names[len(calls)]} does not run. Set propagate=none.")
    return calls


def _require_same(
    names: Sequence[str], calls: Sequence[BlockCall], others: Sequence[BlockCall]
) -> None:
    for name, call, other in zip(names, calls, others, strict=True):
        pairs = zip(*(tree_leaves((x.args, dict(x.kwargs))) for x in (call, other)), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
            raise PropagationError(
                f"{name} cannot be run by itself: beside its hidden states it is given something "
                "that depends on the text. Set propagate=none."
            )


class LateStart:
    """Runs a model from a layer on, where that gives what the whole pass gives."""

    def __init__(self, model: nn.Module, blocks: Mapping[int, str]) -> None:
        """Args:
        model: on any device.
        blocks: HF names by layer, in the order in which they run.
        """
        self._blocks = {layer: model.get_submodule(name) for layer, name in blocks.items()}

    def record(self, layers: set[int], run: Callable[[], Tensor]) -> tuple[Tensor, Outputs]:
        """Run, and keep what the block before each of some layers returns.

        Returns:
            What `run` returned; outputs by the layer that comes next, none for the first.
        """
        outputs: dict[int, Any] = {}

        def keep(layer: int, _block: nn.Module, _args: Any, output: Any) -> None:
            outputs[layer] = copied(output)

        before = zip(list(self._blocks)[1:], self._blocks.values(), strict=False)
        with attached(
            block.register_forward_hook(partial(keep, layer))
            for layer, block in before
            if layer in layers
        ):
            return run(), outputs

    def start_at(self, layer: int, outputs: Outputs) -> AbstractContextManager[None]:
        """Let the blocks before a layer return what was recorded; nothing, where nothing was."""
        if layer not in outputs:
            return forced({})
        skipped = (block for number, block in self._blocks.items() if number < layer)
        return forced(dict.fromkeys(skipped, outputs[layer]))

    def exact(self, layers: set[int], run: Callable[[], Tensor]) -> set[int]:
        """Those of some layers that a pass can start at: it gives what a whole one does."""
        expected, outputs = self.record(layers, run)
        return {layer for layer in outputs if self._gives(expected, layer, outputs, run)}

    def _gives(
        self, expected: Tensor, layer: int, outputs: Outputs, run: Callable[[], Tensor]
    ) -> bool:
        with self.start_at(layer, outputs):
            try:
                return torch.equal(run(), expected)
            except Exception:  # of the model's own code, which misses what a block left behind
                return False
