"""A forward pass that starts behind the blocks whose output is known already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Outputs = Mapping[int, Any]
"""Layer -> what its block returned."""


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
        before = zip(list(self._blocks)[1:], self._blocks.values(), strict=False)
        with ExitStack() as hooks:
            for layer, block in before:
                if layer in layers:
                    handle = block.register_forward_hook(_keep(outputs, layer))
                    hooks.callback(handle.remove)
            return run(), outputs

    @contextmanager
    def start_at(self, layer: int, outputs: Outputs) -> Iterator[None]:
        """Let the blocks before a layer return what was recorded; nothing, where nothing was."""
        skipped: list[Any] = []
        if layer in outputs:
            skipped = [block for own, block in self._blocks.items() if own < layer]
        try:
            for block in skipped:
                block.forward = lambda *_args, **_kwargs: _copied(outputs[layer])
            yield
        finally:
            for block in skipped:
                del block.forward

    def exact(self, layers: set[int], run: Callable[[], Tensor]) -> set[int]:
        """Those of some layers that a pass can start at: it gives what a whole one does."""
        whole, outputs = self.record(layers, run)
        return {layer for layer in outputs if self._gives(whole, layer, outputs, run)}

    def _gives(
        self, whole: Tensor, layer: int, outputs: Outputs, run: Callable[[], Tensor]
    ) -> bool:
        with self.start_at(layer, outputs):
            try:
                return torch.equal(run(), whole)
            except Exception:  # of the model's own code, which misses what a block left behind
                return False


def _keep(outputs: dict[int, Any], layer: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs[layer] = _copied(output)

    return hook


def _copied(output: Any) -> Any:
    """A block may go on in the memory of its input."""
    if isinstance(output, Tensor):
        return output.clone()
    return tuple(map(_copied, output)) if isinstance(output, tuple) else output
