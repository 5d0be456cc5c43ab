"""Modules in and out of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from sharebasis.share_linear import ShareLinear, SplitLinear

Rows = tuple[int, int]
"""First row of a part, and the one after its last."""
Modules = Mapping[str, SplitLinear]
"""Wrapped sublayers by HF name."""


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
    weight = module.weight.detach()
    if isinstance(module, Conv1D):  # stores (d_in, d_out)
        weight = weight.T
    bias = None if module.bias is None else module.bias.detach()
    split = SplitLinear([ShareLinear(weight[start:stop]) for start, stop in rows], bias)
    split.train(module.training)
    model.set_submodule(name, split)
    return split
