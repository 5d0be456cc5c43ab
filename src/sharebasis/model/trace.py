"""What a sublayer does to the residual stream, seen by running the model.

Every storage is labelled with what reaches it without passing another linear sublayer: the
residual stream, and outputs of sublayers. A sublayer reads the stream if the stream alone
reaches its input; it writes to the stream if its output reaches a sum with it, or what a block
returns. What only scales the stream or that which another sublayer writes, as a gate or a
router, neither hides the stream nor writes to it. What does both, as a square path beside an
MLP, is ambiguous_unknown here: its shape and name decide.

Several streams (hyper-connections) are one to the trace, whether they lie beside each other in
the last dimension or in one of their own. So are earlier states of the stream that a block is
given again, and what one sublayer of a block has written when the next one reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from sharebasis.architecture.roles import Role
from sharebasis.model.block_call import block_call, is_float
from sharebasis.model.hooks import attached

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
    """Those of `names` that reach it otherwise than as a factor of the stream, or of what a
    sublayer gives that does not read it."""

    @property
    def written(self) -> frozenset[str]:
        """Whose numbers they are if they are added to the stream."""
        return self.terms - {STREAM} or self.names

    def __or__(self, other: Label) -> Label:
        return Label(self.names | other.names, self.terms | other.terms)


@dataclass(frozen=True, slots=True)
class Trace:
    """What was seen of the sublayers that ran."""

    roles: Mapping[str, Role]
    """By HF name."""
    passed_on: frozenset[str]
    """Those that give more than a factor, as gates and routers do."""


def trace(
    blocks: Mapping[str, nn.Module],
    sublayers: Mapping[str, nn.Module],
    d_model: int,
    run: Callable[[], object],
) -> Trace:
    """Run a model once and say what each of its sublayers does.

    Shapes are all that is looked at, so a model without memory (meta) will do.

    Args:
        blocks: module names -> modules whose first input is the residual stream.
        sublayers: HF names -> the linear sublayers within them.
        d_model: width of the stream.
        run: called without arguments, runs a few tokens through the model.
    """
    labels = _Labels(d_model)
    with attached(labels.hooks(blocks, sublayers)), labels, torch.no_grad():
        run()
    roles = {name: labels.role(name) for name in sublayers if name in labels.inputs}
    return Trace(roles, labels.passed_on())


class _Labels(TorchDispatchMode):
    """Labels of storages while operators run."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.inputs: dict[str, set[Label]] = {}
        """Sublayer -> the labels of what it was given."""
        self.written: set[Label] = set()
        """What was added to the stream or became it, each time."""
        self._labels: dict[int, Label] = {}
        self._alive: list[Any] = []  # storages, so that no address is used twice
        self._busy = False

    def role(self, name: str) -> Role:
        writers = frozenset().union(*(label.written for label in self.written))
        reads = self.reads(name, writers)
        if name in writers:
            return "ambiguous_unknown" if reads else "write"
        return "read" if reads else "neither"

    def passed_on(self) -> frozenset[str]:
        labels = chain(self.written, *self.inputs.values())
        return frozenset().union(*(label.terms for label in labels)) - {STREAM}

    def reads(self, name: str, writers: frozenset[str] = frozenset()) -> bool:
        """Whether it is given the stream, with what `writers` are about to add to it."""
        return all(
            STREAM in label.terms and label.terms - {STREAM} <= writers
            for label in self.inputs[name]
        )

    # Hooks

    def hooks(
        self, blocks: Mapping[str, nn.Module], sublayers: Mapping[str, nn.Module]
    ) -> Iterator[RemovableHandle]:
        """Put the hooks in; each is yielded."""
        for block in blocks.values():
            yield block.register_forward_pre_hook(self._enter_block, with_kwargs=True)
            yield block.register_forward_hook(self._leave_block)
        for name, module in sublayers.items():
            yield module.register_forward_pre_hook(partial(self._before, name))
            yield module.register_forward_hook(partial(self._after, name))

    def _enter_block(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        stream, _ = block_call(args, kwargs)
        self._put(stream, _alone(STREAM))

    def _leave_block(self, _block: nn.Module, _args: tuple[Any, ...], outputs: Any) -> None:
        stream = next((x for x in tree_leaves(outputs) if is_float(x)), None)
        if stream is not None and self._has_its_width(stream):
            self.written.add(self._get(stream))
            self._put(stream, _alone(STREAM))

    def _before(self, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs.setdefault(name, set()).add(self._get(args[0]))

    def _after(self, name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self._put(output, _alone(name))

    # Operators

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [x for x in tree_leaves((args, kwargs)) if is_float(x)]
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0
        if func is torch.ops.aten.nonzero.default and args[0].is_meta:  # nobody knows; all of them
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)
        label = self._result(func, operands)
        outputs = func(*args, **kwargs)
        for output in tree_leaves(outputs):
            if is_float(output):
                self._put(output, label)
        return outputs

    def _result(self, func: Any, operands: list[Tensor]) -> Label:
        if func.overloadpacket in _SUMS and len(operands) == 2:
            for stream, other in (operands, operands[::-1]):
                if self._is_stream(stream):
                    if other.shape[-1:] == stream.shape[-1:]:
                        self.written.add(self._get(other))
                    return _alone(STREAM)
        additive = func.overloadpacket in _SIDE_BY_SIDE
        labels = [self._get(x) if additive else self._factor(x, operands) for x in operands]
        return reduce(or_, labels, Label())

    def _factor(self, x: Tensor, operands: Iterable[Tensor]) -> Label:
        """What of one factor of a product is a term of it: the stream goes before all else, and
        what does not read the stream before what does."""
        label, heavy = self._get(x), self._heavy(x)
        others = frozenset().union(*map(self._heavy, operands)) - label.names
        if STREAM in others:
            heavy &= {STREAM}
        return Label(label.names, label.terms & heavy) if others else label

    def _heavy(self, x: Tensor) -> frozenset[str]:
        """The stream in its width (else it is a router's), and sublayers that do not read it."""
        names = self._get(x).names
        stream = names & {STREAM} if self._has_its_width(x) else frozenset()
        return stream | {name for name in names - {STREAM} if not self.reads(name)}

    def _is_stream(self, x: Tensor) -> bool:
        return self._get(x).names == {STREAM} and self._has_its_width(x)

    def _has_its_width(self, x: Tensor) -> bool:
        """Of one stream or of several side by side."""
        return x.ndim > 0 and x.shape[-1] % self.d_model == 0

    def _get(self, x: Tensor) -> Label:
        return self._labels.get(x.untyped_storage()._cdata, Label())

    def _put(self, x: Tensor, label: Label) -> None:
        storage = x.untyped_storage()
        self._alive.append(storage)
        self._labels[storage._cdata] = label


def _alone(name: str) -> Label:
    return Label(frozenset({name}), frozenset({name}))
