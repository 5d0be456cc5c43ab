"""What a sublayer does to the residual stream, seen by running the model.

Every storage is labelled with what reaches it without passing another linear sublayer: the
residual stream, and outputs of sublayers. A sublayer reads the stream if the stream alone
reaches its input; it writes to the stream if its output reaches a sum with it. What only
scales that which another sublayer writes, as a gate or a router, does not write. What does
both, as a square path beside an MLP, is ambiguous_unknown here: its shape and name decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharebasis.sublayer import Role

STREAM = "<the residual stream>"
"""The label of the stream; no module has such a name."""

_SUMS = {torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.sub, torch.ops.aten.sub_}
_SIDE_BY_SIDE = _SUMS | {
    torch.ops.aten.cat,
    torch.ops.aten.stack,
    torch.ops.aten.where,
    torch.ops.aten.copy_,
    torch.ops.aten.index_add,
    torch.ops.aten.index_add_,
    torch.ops.aten.index_put,
    torch.ops.aten.index_put_,
    torch.ops.aten.scatter_add,
    torch.ops.aten.scatter_add_,
}
"""Operators that put numbers beside or on top of each other; any other may multiply them."""


@dataclass(frozen=True, slots=True)
class Label:
    """What reaches a storage, by name."""

    names: frozenset[str] = frozenset()
    terms: frozenset[str] = frozenset()
    """Those of `names` that reach it otherwise than as a factor of what another one writes."""

    def __or__(self, other: Label) -> Label:
        return Label(self.names | other.names, self.terms | other.terms)


def trace_roles(
    blocks: Mapping[str, nn.Module],
    sublayers: Mapping[str, nn.Module],
    d_model: int,
    run: Callable[[], object],
) -> Mapping[str, Role]:
    """Run a model once and say what each of its sublayers does.

    Shapes are all that is looked at, so a model without memory (meta) will do.

    Args:
        blocks: module names -> modules whose first input is the residual stream.
        sublayers: HF names -> the linear sublayers within them.
        d_model: width of the stream.
        run: called without arguments, runs a few tokens through the model.

    Returns:
        HF name -> role, for the sublayers that ran.
    """
    labels = _Labels(d_model)
    with ExitStack() as hooks, torch.no_grad():
        for block in blocks.values():
            handle = block.register_forward_pre_hook(labels.enter_block, with_kwargs=True)
            hooks.callback(handle.remove)
        for name, module in sublayers.items():
            for handle in (
                module.register_forward_pre_hook(labels.before(name)),
                module.register_forward_hook(labels.after(name)),
            ):
                hooks.callback(handle.remove)
        with labels:
            run()
    return {name: labels.role(name) for name in sublayers if name in labels.inputs}


class _Labels(TorchDispatchMode):
    """Labels of storages while operators run."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.inputs: dict[str, Label] = {}
        """Sublayer -> the label of what it was given."""
        self.sums: set[Label] = set()
        """What was added to the stream, each time."""
        self._labels: dict[int, Label] = {}
        self._alive: list[Any] = []  # storages, so that no address is used twice
        self._busy = False

    def role(self, name: str) -> Role:
        reads, writes = self.reads(name), any(name in one.names for one in self.sums)
        if not reads:
            return "write" if writes else "neither"
        return "ambiguous_unknown" if any(name in one.terms for one in self.sums) else "read"

    def reads(self, name: str) -> bool:
        return self.inputs[name].names == {STREAM}

    # Hooks

    def enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = next(x for x in (*args, *kwargs.values()) if _is_float(x))
        self._put(stream, _alone(STREAM))

    def before(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs[name] = self.inputs.get(name, Label()) | self._get(args[0])

        return hook

    def after(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._put(output, _alone(name))

        return hook

    # Operators

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [x for x in tree_leaves((args, kwargs)) if _is_float(x)]
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0
        label = self._result(func, operands)
        outputs = func(*args, **kwargs)
        for output in tree_leaves(outputs):
            if _is_float(output):
                self._put(output, label)
        return outputs

    def _result(self, func: Any, operands: list[Tensor]) -> Label:
        labels = [self._get(x) for x in operands]
        if func.overloadpacket in _SUMS and len(operands) == 2 and self._is_stream_sum(operands):
            self.sums.update(label for label in labels if label.names != {STREAM})
            return _alone(STREAM)
        if func.overloadpacket not in _SIDE_BY_SIDE:
            labels = [self._scaled(label, labels) for label in labels]
        return reduce(or_, labels, Label())

    def _scaled(self, label: Label, labels: Iterable[Label]) -> Label:
        """What becomes of one factor: of what another one writes, it is no term."""
        others = frozenset().union(*(other.names for other in labels)) - label.names - {STREAM}
        return label if all(map(self.reads, others)) else Label(label.names)

    def _is_stream_sum(self, operands: list[Tensor]) -> bool:
        a, b = operands
        same = a.shape == b.shape and a.shape[-1:] == (self.d_model,)
        return same and {STREAM} in (self._get(a).names, self._get(b).names)

    def _get(self, x: Tensor) -> Label:
        return self._labels.get(x.untyped_storage()._cdata, Label())

    def _put(self, x: Tensor, label: Label) -> None:
        storage = x.untyped_storage()
        self._alive.append(storage)
        self._labels[storage._cdata] = label


def _alone(name: str) -> Label:
    return Label(frozenset({name}), frozenset({name}))


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
