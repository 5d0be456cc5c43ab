"""Modules in and out of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sharebasis.share_linear import ShareLinear, SplitLinear
from sharebasis.sublayer import LinearModule

Rows = tuple[int, int]
"""First row of a part, and the one after its last."""
Modules = Mapping[str, SplitLinear]
"""Wrapped sublayers by HF name."""


def linear_modules(model: nn.Module) -> tuple[LinearModule, ...]:
    """Every Linear and Conv1D of a model, in the model's order; meta tensors will do."""
    return tuple(
        LinearModule(
            name=name,
            type="Conv1D" if isinstance(module, Conv1D) else "Linear",
            shape=(int(weight.shape[0]), int(weight.shape[1])),
            bias=module.bias is not None,
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        for weight in [row_major(module.weight, isinstance(module, Conv1D))]
    )


def row_major(weight: Tensor, conv1d: bool) -> Tensor:
    """The (d_out, d_in) view of a stored weight; Conv1D stores (d_in, d_out)."""
    return weight.T if conv1d else weight


@contextmanager
def wrapped(model: nn.Module, rows: Mapping[str, Sequence[Rows]]) -> Iterator[Modules]:
    """`wrap` for a while; the model has its own modules back afterwards."""
    originals = {name: model.get_submodule(name) for name in rows}
    try:
        yield wrap(model, rows)
    finally:
        for name, module in originals.items():
            model.set_submodule(name, module)


def wrap(model: nn.Module, rows: Mapping[str, Sequence[Rows]]) -> Modules:
    """Put a SplitLinear in the place of each named sublayer; no weight is copied.

    Args:
        model: changed in place.
        rows: HF name -> the (start, stop) rows of its parts, in order and without a gap.

    Returns:
        The new modules by HF name.
    """
    return {name: _wrap_one(model, name, own) for name, own in rows.items()}


def _wrap_one(model: nn.Module, name: str, rows: Sequence[Rows]) -> SplitLinear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | Conv1D)
    weight = row_major(module.weight.detach(), isinstance(module, Conv1D))
    bias = None if module.bias is None else module.bias.detach()
    split = SplitLinear([ShareLinear(weight[start:stop]) for start, stop in rows], bias)
    split.train(module.training)
    model.set_submodule(name, split)
    return split
