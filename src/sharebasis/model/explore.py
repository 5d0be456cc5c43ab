"""What of a model computes a linear product, and which blocks there are."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.model_family import layout_of, slot_pattern, weight_type_name
from sharebasis.architecture.roles import expert_slot
from sharebasis.architecture.selection import LinearModule
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError
from sharebasis.model.hub import repeated
from sharebasis.model.surgery import unstacked
from sharebasis.model.trace import Trace

log = logging.getLogger(__name__)

MIN_WIDTH = 1 / 16
"""Of d_model: what is narrower is no projection but a router or a gate, unless it has been seen
to be none and makes at least one head."""


def linear_modules(model: nn.Module) -> tuple[LinearModule, ...]:
    """Every Linear and Conv1D of a model, in the model's order."""
    tied = repeated(model)
    return tuple(
        _describe(name, module, tied.get(f"{name}.weight"))
        for name, module in model.named_modules(remove_duplicate=False)
        if is_linear(module)
    )


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether a module is a Linear or Conv1D, and does what these do.

    Routers and the like inherit the parameters only; a class with a forward pass of its own
    is tried on small numbers.
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    plain = nn.Linear.forward, Conv1D.forward
    return type(module).forward in plain or _computes_a_product(module)


def _computes_a_product(module: nn.Linear | Conv1D) -> bool:
    small = copy.copy(module)
    x, weight, bias = torch.arange(6.0).view(3, 2), torch.arange(8.0).view(4, 2), torch.arange(4.0)
    stored = weight.T if isinstance(module, Conv1D) else weight
    small._parameters = {"weight": nn.Parameter(stored), "bias": None}
    if module.bias is not None:
        small._parameters["bias"] = nn.Parameter(bias)
    try:
        y = small(x)
    except Exception:  # it wants other inputs, or parameters that are not there
        return False
    expected = nn.functional.linear(x, weight, None if module.bias is None else bias)
    return isinstance(y, Tensor) and y.shape == expected.shape and bool((y == expected).all())


def _describe(name: str, module: nn.Linear | Conv1D, tied_to: str | None) -> LinearModule:
    rows, columns = module.weight.shape
    return LinearModule(
        name=name,
        type="Conv1D" if isinstance(module, Conv1D) else "Linear",
        shape=(columns, rows) if isinstance(module, Conv1D) else (rows, columns),
        bias=module.bias is not None,
        tied_to=tied_to and tied_to.removesuffix(".weight"),
    )


def explore(
    model: PreTrainedModel,
    modules: Iterable[LinearModule],
    block_pattern: str,
    sizes: Dims,
    traced: Trace,
) -> Mapping[str, WeightTypeSettings]:
    """Take every sublayer of the blocks that is a projection."""
    min_width, head_width = MIN_WIDTH * sizes.d_model, sizes.d_head
    wide = [
        module.name
        for module in modules
        if min(module.shape) >= min_width
        or (min(module.shape) >= head_width and module.name in traced.passed_on)
    ]
    weight_types = _weight_types(wide, re.compile(block_pattern))
    if not weight_types:
        raise SelectionError(_advice(model, f"has no linear sublayers in blocks {block_pattern}"))
    log.warning(
        "Model family %r is not known; compressing %s in blocks %r. If one of them is a fused "
        "weight, a row in sharebasis/architecture/families.py says how it is laid out.",
        model.config.model_type,
        ", ".join(weight_types),
        block_pattern,
    )
    if others := _other_matrices(model, block_pattern, sizes.d_model):
        log.warning(
            "%s in these blocks are the weights of no Linear and stay as they are.",
            ", ".join(others),
        )
    return weight_types


def _other_matrices(model: PreTrainedModel, block_pattern: str, d_model: int) -> Iterable[str]:
    """Parameters of the blocks, by place, that are as large as a projection and none's weight."""
    with unstacked(model):
        known = {f"{module.name}.weight" for module in linear_modules(model)}
        large = [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and sorted(parameter.shape)[-2] >= d_model / 2
        ]
    places = (re.search(block_pattern, name) for name in large if name not in known)
    return dict.fromkeys(place.string[place.end() :] for place in places if place)


def _weight_types(names: Iterable[str], blocks: re.Pattern[str]) -> dict[str, WeightTypeSettings]:
    """A weight type for every place in a block."""
    weight_types = {}
    for name in names:
        if place := blocks.search(name):
            slot = expert_slot(name[: place.start(1)] + "*" + name[place.end(1) :])
            path = expert_slot(name[place.end() :])
            weight_types[weight_type_name(path)] = WeightTypeSettings(
                slot_pattern(slot), **layout_of(path)
            )
    return weight_types


def find_blocks(model: PreTrainedModel, n_layers: int) -> str:
    """The pattern of the list of blocks: of those with one for every layer, that which holds
    the most linear sublayers."""
    n_linear = {
        name: sum(is_linear(inner) for inner in module.modules())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    if not n_linear:
        raise SelectionError(_advice(model, f"has no list of {n_layers} blocks"))
    return rf"^{re.escape(max(n_linear, key=lambda name: n_linear[name]))}\.(\d+)\."


def _advice(model: PreTrainedModel, problem: str) -> str:
    return (
        f"Model family {model.config.model_type!r} is not known, and this model {problem}. Say "
        "where its sublayers are with model.weight_types and model.block_pattern, or add a row "
        "to ARCHITECTURES in sharebasis/architecture/families.py (docs/families.md)."
    )
