"""Modules in and out of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sharebasis.forms.share_linear import ShareLinear
from sharebasis.forms.split_linear import SplitLinear
from sharebasis.linalg.rows import Rows, inverse_order
from sharebasis.model.experts import unstack

Modules = Mapping[str, SplitLinear]
"""Wrapped sublayers by HF name."""


@contextmanager
def unstacked(model: nn.Module) -> Iterator[None]:
    """`experts.unstack` for a while; the model has its own modules back afterwards."""
    originals = unstack(model)
    try:
        yield
    finally:
        restore(model, originals)


@contextmanager
def wrapped(model: nn.Module, rows: Mapping[str, Sequence[Rows]]) -> Iterator[Modules]:
    """`wrap` for a while; the model has its own modules back afterwards."""
    with unstacked(model):
        originals = {name: model.get_submodule(name) for name in rows}
        try:
            yield wrap(model, rows)
        finally:
            restore(model, originals)


def wrap(model: nn.Module, rows: Mapping[str, Sequence[Rows]]) -> Modules:
    """Put a SplitLinear in the place of each named sublayer.

    No weight is copied, but for the parts of one that is interleaved. Stacks of experts are
    unstacked.

    Args:
        model: changed in place.
        rows: HF name -> the rows of its parts, each row once.

    Returns:
        The new modules by HF name.
    """
    unstack(model)
    wrappers: dict[nn.Module, SplitLinear] = {}  # a module of several names is wrapped once
    for name, rows_of_parts in rows.items():
        module = model.get_submodule(name)
        if module not in wrappers:
            wrappers[module] = _split_linear(module, rows_of_parts)
    modules = {name: wrappers[model.get_submodule(name)] for name in rows}
    restore(model, modules)
    return modules


def narrow(model: nn.Module, reads: Sequence[str], down: str, n_rows: int, width: int) -> None:
    """Let an MLP have only so many neurons, the values of which do not matter; `wrap` comes after.

    Args:
        model: changed in place.
        reads: HF names of up, and of gate where there is one, or of the one that is both.
        down: HF name.
        n_rows: of each of `reads`.
        width: neurons.
    """
    for name in (*reads, down):
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear | Conv1D)
        outputs = int(isinstance(module, Conv1D))  # which stores (d_in, d_out)
        if name == down:
            module.weight = _first(module.weight, 1 - outputs, width)
            continue
        module.weight = _first(module.weight, outputs, n_rows)
        if module.bias is not None:
            module.bias = _first(module.bias, 0, n_rows)


def weight_of(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """The weight of a dense or wrapped sublayer; of a dense one, a view."""
    assert isinstance(module, nn.Linear | Conv1D | SplitLinear)
    # By type: the shape of a square one does not tell.
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _first(parameter: Tensor, dimension: int, width: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().narrow(dimension, 0, width), requires_grad=False)


def _split_linear(module: nn.Module, rows: Sequence[Rows]) -> SplitLinear:
    assert isinstance(module, nn.Linear | Conv1D)
    weight = weight_of(module).detach()
    bias = None if module.bias is None else module.bias.detach()
    order = inverse_order(rows)
    if order is not None and not weight.is_meta:
        order = order.to(weight.device)
    split = SplitLinear([ShareLinear(part.take(weight)) for part in rows], bias, order)
    split.train(module.training)
    return split


def restore(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the places that their names say, one after the other."""
    for name, module in modules.items():
        model.set_submodule(name, module)
