"""What is added to the residual stream, seen when it is added.

Families differ in what lies between a sublayer that writes and the stream (a multiplier, a
norm, a dropout, another branch's output), and in how many sums there are. So nothing of that is
looked up: functions are watched while a block runs. What comes out of a writer is followed by
its storage through whatever is done to it; where it meets the stream in a sum, the other operand
is the component, multiplied and normed as it then is. Two branches that are added up before they
are added to the stream are two components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sharebasis.model.block_call import is_float

Kind = Literal["embed", "pos_embed", "attn", "mlp", "other"]
"""What a component is a component of."""

_SUMS = {
    torch.add,
    torch.Tensor.add,
    torch.Tensor.add_,
    torch.Tensor.__add__,
    torch.Tensor.__radd__,
    torch.Tensor.__iadd__,
}
_KEEPS_VALUES = {
    torch.Tensor.to,
    torch.Tensor.float,
    torch.Tensor.double,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.type_as,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.reshape,
    torch.clone,
    torch.reshape,
}


@dataclass(slots=True)
class Component:
    """Something that was added to the stream."""

    kinds: frozenset[Kind]
    """Of the writers that it came from; more than one if they cannot be told apart."""
    value: Tensor


@dataclass(slots=True)
class BlockSums:
    """What one block did to the stream; every tensor (*batch, d_model)."""

    before: Tensor
    mid: Tensor | None = None
    """The stream between attention and an MLP that reads it there; None side by side."""
    after: Tensor | None = None
    components: list[Component] = field(default_factory=list)

    def of(self, kind: Kind) -> Tensor | None:
        """All that attention, or the MLP, added; None: nothing."""
        values = [x.value.view(self.before.shape) for x in self.components if kind in x.kinds]
        return total_of(values) if values else None

    def error(self) -> float:
        """How far the components are from what was added, in units of rounding."""
        assert self.after is not None
        total, size = self.before.double(), self.before.abs().double()
        for component in self.components:
            value = component.value.view(self.before.shape).double()
            total, size = total + value, size + value.abs()
        rounding = torch.finfo(self.after.dtype).eps * size.max().clamp_min(1e-300)
        return ((self.after.view(self.before.shape) - total).abs().max() / rounding).item()


class StreamSums(TorchFunctionMode):
    """Follows what writers put out, through one block at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.block: BlockSums | None = None
        self.forced_mid: Tensor | None = None
        """What the stream is to be once attention was added to it, in this block."""
        self._forget()

    # What the hooks of a capture call

    def written(self, x: Tensor, kind: Kind) -> None:
        """A writer of this kind puts out `x`."""
        self._written.add(kind)
        self._put(x, frozenset({kind}))

    def embedded(self, x: Tensor) -> Sequence[Component]:
        """The components of what goes into the first block."""
        undivided = [Component(frozenset({"embed"}), x)]
        parts = self._parts.get(storage_key(x), undivided)
        return [Component(part.kinds or frozenset({"pos_embed"}), part.value) for part in parts]

    def enter(self, x: Tensor, forced_mid: Tensor | None) -> None:
        """A block begins with the stream `x`."""
        self._forget()
        self.block, self.forced_mid = BlockSums(x), forced_mid
        self._streams[storage_key(x)] = x

    def leave(self, x: Tensor) -> BlockSums:
        """The block ends with `x`."""
        assert self.block is not None
        block, self.block = self.block, None
        block.after = x
        self._forget()
        self._streams[storage_key(x)] = x
        return block

    def is_stream(self, x: Tensor) -> bool:
        return storage_key(x) in self._streams

    def _forget(self) -> None:
        self._streams: dict[int, Tensor] = {}
        self._kinds: dict[int, frozenset[Kind]] = {}
        self._parts: dict[int, Sequence[Component]] = {}
        self._written: set[Kind] = set()
        self._alive: list[Any] = []  # storages, so that no address is used twice

    # Functions

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SUMS and not kwargs and _all_float(args):
            return self._sum(func, *args)
        output = func(*args, **kwargs)
        if self._streams or self._kinds:
            self._follow(func, args, kwargs, output)
        return output

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        operands = [x for x in tree_leaves((args, kwargs)) if is_float(x)]
        kinds = frozenset[Kind]().union(*(self._of(x) for x in operands))
        outputs = [x for x in tree_leaves(output) if is_float(x)]
        if func is torch.Tensor.__setitem__:
            outputs = [args[0]]
        same = set() if _in_place(func) else {storage_key(x) for x in operands}
        for x in outputs:
            if func in _KEEPS_VALUES:
                self._same(args[0], x)
            elif kinds and storage_key(x) not in same:  # else it is a view, or x itself
                self._put(x, kinds | self._of(x))

    def _same(self, x: Tensor, copy: Tensor) -> None:
        """`copy` holds the numbers of `x`."""
        if storage_key(x) == storage_key(copy):
            return
        if self.is_stream(x):
            self._streams[storage_key(copy)] = copy
        if kinds := self._of(x):
            self._put(copy, kinds)
        if parts := self._parts.get(storage_key(x)):
            self._parts[storage_key(copy)] = parts

    def _sum(self, func: Any, a: Tensor, b: Tensor) -> Tensor:
        streams = self.is_stream(a), self.is_stream(b)
        if self.block is not None and streams in ((True, False), (False, True)):
            return self._sum_with_stream(func, a, b, addend=b if streams[0] else a)
        if a.shape[-1:] == b.shape[-1:] and self._is_sum_of_branches(a, b):
            shape = torch.broadcast_shapes(a.shape, b.shape)
            changes = _in_place(func)
            parts = [*self._components(a, shape, changes), *self._components(b, shape, False)]
            output: Tensor = func(a, b)
            self._put(output, self._of(a) | self._of(b))
            self._parts[storage_key(output)] = parts
            return output
        output = func(a, b)
        self._follow(func, (a, b), {}, output)
        return output

    def _is_sum_of_branches(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors are to be told apart once they are added up."""
        kinds = self._of(a), self._of(b)
        if self.block is None:  # embeddings, and what tells positions
            return any(kinds)
        return all(kinds) and kinds[0] != kinds[1]

    def _sum_with_stream(self, func: Any, a: Tensor, b: Tensor, addend: Tensor) -> Tensor:
        assert self.block is not None
        parts = self._components(addend, addend.shape, _in_place(func) and addend is a)
        output: Tensor = func(a, b)
        self._kinds.pop(storage_key(output), None)
        self._parts.pop(storage_key(output), None)
        self._streams[storage_key(output)] = output
        self.block.components += parts
        kinds = frozenset[Kind]().union(*(part.kinds for part in parts))
        if kinds == {"attn"} and "mlp" not in self._written:
            return self._between(output)
        return output

    def _between(self, stream: Tensor) -> Tensor:
        """Note, or replace, the stream between attention and MLP."""
        assert self.block is not None
        if self.forced_mid is not None:
            stream.copy_(self.forced_mid.view(stream.shape))
        self.block.mid = stream
        return stream

    def _components(self, x: Tensor, shape: torch.Size, changes: bool) -> Sequence[Component]:
        """What `x` is a sum of; copied if `x` is about to change."""
        parts = self._parts.get(storage_key(x))
        if parts is not None:
            return parts
        value = x.expand(shape)
        return [Component(self._of(x), value.clone() if changes else value)]

    def _of(self, x: Tensor) -> frozenset[Kind]:
        return self._kinds.get(storage_key(x), frozenset())

    def _put(self, x: Tensor, kinds: frozenset[Kind]) -> None:
        self._alive.append(x.untyped_storage())
        self._kinds[storage_key(x)] = kinds
        self._parts.pop(storage_key(x), None)


def total_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum; itself where there is one."""
    return torch.stack(list(tensors)).sum(0) if tensors[1:] else tensors[0]


def storage_key(x: Tensor) -> int:
    """The same for tensors in the same memory."""
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()._cdata


def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.startswith(("__i", "__set")) or (name.endswith("_") and not name.endswith("__"))


def _all_float(args: Any) -> bool:
    return len(args) == 2 and all(is_float(x) for x in args)
