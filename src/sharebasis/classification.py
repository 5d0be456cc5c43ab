"""A model's modules -> a record of every linear sublayer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture import architecture_of, dims
from sharebasis.settings import WeightTypeSettings
from sharebasis.sublayer import Classification, LinearModule, classify


def classify_model(
    model: PreTrainedModel,
    block_pattern: str | None = None,
    weight_types: Mapping[str, WeightTypeSettings] | None = None,
) -> Classification:
    """Find the linear sublayers of a model, which need not have any memory.

    Args:
        model: on any device, meta too.
        block_pattern: None takes the table of known families.
        weight_types: None as above.

    Raises:
        SelectionError: the family is not known, or a pattern does not fit the model.
    """
    config = model.config
    architecture = architecture_of(config.model_type, block_pattern, weight_types)
    sizes = dims(config)
    sublayers = classify(linear_modules(model), architecture, sizes.d_model)
    return Classification(config.model_type, sizes, architecture, sublayers)


def linear_modules(model: nn.Module) -> tuple[LinearModule, ...]:
    """Every Linear and Conv1D of a model, in the model's order."""
    return tuple(
        _describe(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    )


def _describe(name: str, module: nn.Linear | Conv1D) -> LinearModule:
    rows, columns = module.weight.shape
    bias = module.bias is not None
    if isinstance(module, Conv1D):  # stores (d_in, d_out)
        return LinearModule(name, "Conv1D", (columns, rows), bias)
    return LinearModule(name, "Linear", (rows, columns), bias)
