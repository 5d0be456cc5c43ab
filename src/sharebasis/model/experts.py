"""Stacks of experts, as transformers keeps them, -> one Linear for each matrix of each expert.

transformers keeps the experts of a layer as 3-D parameters in one module. Everything here
works on Linears, so such a module is replaced by one of the same class but for its forward
pass, whose Linears are views of the stacks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the stacks; the first two exclude each other."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Where the tensor of an unstacked model lies in the stacked one."""

    stack: str
    """Name of the stack in the state of the stacked model."""
    expert: int
    transposed: bool
    """Whether the stack keeps (d_in, d_out)."""

    def of(self, stack: Tensor) -> Tensor:
        return _expert(stack, self.expert, self.transposed)


def unstack(model: nn.Module) -> Mapping[str, nn.Module]:
    """Give every expert Linears of its own; no weight is copied.

    Args:
        model: changed in place; may be on the meta device.

    Returns:
        The replaced modules by HF name.
    """
    stacked = {name: module for name, module in model.named_modules() if is_stacked(module)}
    for name, module in stacked.items():
        model.set_submodule(name, _unstacked(module))
    return stacked


def is_stacked(module: nn.Module) -> bool:
    """Whether a module keeps experts as stacks, in the layout that transformers has for all."""
    marked = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    return marked and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def slices(model: nn.Module) -> Mapping[str, Slice]:
    """Name of a tensor that `unstack` would make -> where it lies.

    Args:
        model: stacked.
    """
    places = {}
    for prefix, module in model.named_modules():
        if is_stacked(module):
            for name in _stacks(module):
                transposed = cast(bool, module.is_transposed)
                for i in range(len(getattr(module, name))):
                    linear = f"{prefix}.{name}.{i}"
                    places[f"{linear}.weight"] = Slice(f"{prefix}.{name}", i, transposed)
                    if module.has_bias:
                        places[f"{linear}.bias"] = Slice(f"{prefix}.{name}_bias", i, False)
    return places


def _stacks(module: nn.Module) -> Iterator[str]:
    return (name for name in STACKS if isinstance(getattr(module, name, None), nn.Parameter))


def _unstacked(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    # A shallow copy of a module shares the registries that are about to differ.
    copied._parameters, copied._modules = dict(module._parameters), dict(module._modules)
    for name in tuple(_stacks(module)):
        stack, biases = copied._parameters.pop(name), copied._parameters.pop(f"{name}_bias", None)
        assert stack is not None
        linears = [
            _linear(
                _expert(stack, i, cast(bool, module.is_transposed)),
                None if biases is None else biases[i],
            )
            for i in range(len(stack))
        ]
        copied.add_module(name, nn.ModuleList(linears))
    copied.__class__ = type(f"Unstacked{type(module).__name__}", (_Unstacked, type(module)), {})
    return copied


def _expert(stack: Tensor, expert: int, transposed: bool) -> Tensor:
    return stack[expert].T if transposed else stack[expert]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


class _Unstacked(nn.Module):
    """The forward pass of experts that are Linears; everything else is of the stacked class."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up what every token's experts say, weighted.

        Args:
            hidden_states: (tokens, d_model).
            top_k_index: (tokens, k), the experts of a token.
            top_k_weights: (tokens, k).
        """
        experts: Any = self
        first = experts.gate_up_proj if experts.has_gate else experts.up_proj
        activate = experts._apply_gate if experts.has_gate else experts.act_fn
        # Sums of a narrow type are kept in float32, as transformers' own kernels keep them.
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        total = torch.zeros_like(hidden_states, dtype=wide)
        for i, (up, down) in enumerate(zip(first, experts.down_proj, strict=True)):
            tokens, places = _routed(top_k_index, i)
            if len(tokens) == 0:
                continue
            y = down(activate(up(hidden_states[tokens])))
            if getattr(experts, "has_post_expert_norm", False):
                y = experts.post_expert_norm(y)
            weighted = y * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, weighted.to(wide))
        return total.to(hidden_states.dtype)


def _routed(top_k_index: Tensor, expert: int) -> Sequence[Tensor]:
    """The tokens that go to an expert and which of their choices it is."""
    if top_k_index.is_meta:  # nobody knows; all of them, so that every expert is seen to run
        tokens = torch.arange(len(top_k_index), device="meta")
        return tokens, torch.zeros_like(tokens)
    return torch.where(top_k_index == expert)
