"""Every selected sublayer of a model as parts, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.types import SplitStrategy
from sharebasis.errors import StateError
from sharebasis.model import surgery
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack

_originals: WeakKeyDictionary[nn.Module, Mapping[str, nn.Module]] = WeakKeyDictionary()
"""Wrapped model -> the modules that it had, by HF name, in the order in which they go back."""


def wrap(
    model: PreTrainedModel,
    strategy: SplitStrategy = "none",
    classification: Classification | None = None,
) -> surgery.Modules:
    """Put a `SplitLinear` in the place of every selected linear sublayer of a model.

    What the model computes stays as it is until a part of one is calibrated or compressed. No
    weight is copied, but for the parts of one that is interleaved. Stacks of experts are
    unstacked. The model's own modules, and with them their weights, are kept for `unwrap`.

    Args:
        model: dense; changed in place.
        strategy: none: a sublayer is one part; qkv: a fused weight is as many parts as it holds
            (q, k and v; gate and up); heads: every head is a part.
        classification: of the model; None classifies it.

    Returns:
        The new modules by HF name; each has its `parts`, `ShareLinear`s.

    Raises:
        StateError: the model is wrapped.
        SelectionError: its sublayers cannot be found.
        SplitError: they cannot be cut so.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)
        >>> model = AutoModelForCausalLM.from_config(config).eval()
        >>> tokens = torch.arange(6)[None]
        >>> logits = model(tokens).logits
        >>> modules = wrap(model, "qkv")
        >>> [part.out_features for part in modules["transformer.h.0.attn.c_attn"].parts]
        [32, 32, 32]
        >>> torch.allclose(model(tokens).logits, logits, atol=1e-5)
        True
        >>> unwrap(model)
        >>> model.transformer.h[0].attn.c_attn
        Conv1D(nf=96, nx=32)
    """
    if model in _originals:
        raise StateError("The model is wrapped; unwrap it first.")
    if classification is None:
        classification = classify_model(model)
    rows = rows_by_sublayer(split_selected(classification, strategy))
    stacks = unstack(model)
    sublayers = {name: model.get_submodule(name) for name in rows}
    modules = surgery.wrap(model, rows)
    _originals[model] = {**sublayers, **stacks}
    return modules


def unwrap(model: PreTrainedModel) -> None:
    """Give a model the modules back that it had before `wrap`, with their weights.

    What parts were compressed to is dropped; see `wrap` for an example.

    Raises:
        StateError: the model is not wrapped.
    """
    if model not in _originals:
        raise StateError("The model is not wrapped.")
    surgery.restore(model, _originals.pop(model))
