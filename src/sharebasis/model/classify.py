"""A model's modules -> a record of every linear sublayer."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.architecture.dims import dims
from sharebasis.architecture.families import architecture_of, within
from sharebasis.architecture.model_family import Architecture
from sharebasis.architecture.selection import classify, compiled
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.model import WeightTypeSettings
from sharebasis.model.blocks import PROBE_TOKENS, run_blocks
from sharebasis.model.explore import explore, find_blocks, linear_modules
from sharebasis.model.surgery import unstacked
from sharebasis.model.trace import Trace, trace

log = logging.getLogger(__name__)


def classify_model(
    model: PreTrainedModel,
    block_pattern: str | None = None,
    weight_types: Mapping[str, WeightTypeSettings] | None = None,
) -> Classification:
    """Find the linear sublayers of a model, which need not have any memory.

    A few tokens are run through a copy without memory to see which sublayers read the
    residual stream and which write to it.

    Args:
        model: on any device, meta too.
        block_pattern: None takes the table of known families; for a family that is not
            there, the list of blocks is looked for. Layers that it does not find stay as they
            are.
        weight_types: None as above; for an unknown family, every linear sublayer of a block
            that touches the residual stream, and those between them.

    Raises:
        SelectionError: a pattern does not fit the model, or an unknown family's blocks
            cannot be found.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)
        >>> classification = classify_model(AutoModelForCausalLM.from_config(config))
        >>> classification.dims.n_heads, classification.dims.d_head
        (4, 8)
        >>> for sublayer in classification.selected[:2]:
        ...     print(sublayer.name, sublayer.shape, sublayer.role, sublayer.evidence)
        transformer.h.0.attn.c_attn (96, 32) read trace
        transformer.h.0.attn.c_proj (32, 32) write trace
    """
    config, sizes = model.config, dims(model.config)
    if block_pattern is not None:
        compiled(block_pattern, "block_pattern")
    with unstacked(model):
        modules = linear_modules(model)
        names = [module.name for module in modules]
        architecture = architecture_of(config.model_type, names, block_pattern, weight_types)
        blocks = architecture.block_pattern if architecture else block_pattern
        blocks = find_blocks(model, sizes.n_layers) if blocks is None else blocks
        traced = _trace(model, names, blocks, sizes.d_model)
    if architecture is None:
        running = [module for module in modules if module.name in traced.roles or not traced.roles]
        if weight_types is None:
            weight_types = within(
                explore(model, running, blocks, sizes, traced), block_pattern, names
            )
        architecture = Architecture(blocks, weight_types)
    sublayers = classify(modules, architecture, sizes.d_model, traced.roles)
    return Classification(config.model_type, sizes, architecture, sublayers)


def _trace(model: PreTrainedModel, names: Iterable[str], block_pattern: str, d_model: int) -> Trace:
    """What running shows; nothing, with a warning, where the model cannot be run."""
    places = {name: re.search(block_pattern, name) for name in names}
    inside = {name: place for name, place in places.items() if place and place.re.groups == 1}
    blocks = {place.string[: place.end(1)] for place in inside.values()}
    model = _without_memory(model)
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    try:
        return trace(
            {name: model.get_submodule(name) for name in blocks},
            {name: model.get_submodule(name) for name in inside},
            d_model,
            lambda: run_blocks(model, tokens),
        )
    except Exception as error:  # of the model's own code, of any kind
        log.warning(
            "Nothing could be run through this %s model (%s: %s); the roles of its sublayers are "
            "decided by shape and name alone.",
            model.config.model_type,
            type(error).__name__,
            error,
        )
        return Trace({}, frozenset())


def _without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the meta device. There, every expert is seen to run, whoever is chosen."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, memo={id(x): _shape_of(x) for x in tensors})


def _shape_of(x: Tensor) -> Tensor:
    shape = x.detach().to("meta")
    return nn.Parameter(shape, requires_grad=False) if isinstance(x, nn.Parameter) else shape
