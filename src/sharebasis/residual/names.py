"""What TransformerLens calls an activation: `blocks.3.attn.hook_z`, `("z", 3)` or `"z3"`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sharebasis.errors import StreamError
from sharebasis.residual.capture import FINAL

Name = str | tuple[Any, ...]
Names = str | Iterable[str] | Callable[[str], bool] | None

_ATTENTION = ("q", "k", "v", "z", "result")
_MLP = ("pre", "pre_linear", "post")
_NORM = ("scale", "normalized", "out")
_STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_HEAD_INPUTS = ("q_input", "k_input", "v_input")
_FACTORS = ("attn_factor", "mlp_factor")
_GLOBAL = ("embed", "pos_embed", "raw_logits")
_ALIASES = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_SUBLAYERS = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}

NEEDS: Mapping[str, tuple[str, ...]] = {
    "attn.hook_z": ("hook_attn_factor",),
    "attn.hook_result": ("attn.hook_z", "hook_attn_factor"),
    "mlp.hook_post": ("hook_mlp_factor",),
    **{f"hook_{name}": ("hook_resid_pre",) for name in _HEAD_INPUTS},
}
"""What else has to be kept for an activation, or for what is computed of it."""


def act_name(name: str, layer: int | str | None = None, sublayer: str | None = None) -> str:
    """`("z", 3)` or `"z3"` -> `blocks.3.attn.hook_z`; a whole name stays as it is.

    As TransformerLens's `get_act_name`, but that a norm of a block is `ln1` if nothing is said.
    """
    if _is_whole(name):
        return name
    if short := re.match(r"([a-z]+)(\d+)([a-z]?.*)", name):
        name, layer, sublayer = short[1], short[2], short[3]
    name = _ALIASES.get(name, name)
    if name in (*_ATTENTION, "pattern", "attn_scores", "rot_q", "rot_k"):
        sublayer = "attn"
    elif name in (*_MLP, "mid"):
        sublayer = "mlp"
    elif name in _NORM:
        sublayer = (sublayer or "ln1") if layer is not None else FINAL
    else:
        sublayer = _SUBLAYERS.get(sublayer or "", sublayer)
    block = "" if layer is None else f"blocks.{layer}."
    return f"{block}{sublayer + '.' if sublayer else ''}hook_{name}"


def wanted(names: Names, n_layers: int) -> Callable[[str], bool]:
    """Whether an activation of a whole name is to be kept; `names` as of `Observer`.

    Raises:
        StreamError: a name is of no activation.
    """
    if names is None:
        return lambda key: key != "hook_raw_logits"
    if callable(names):
        return names
    keys: set[str] = set()
    for name in {names} if isinstance(names, str) else set(names):
        keys |= _keys_of(name, n_layers)
    # A result is made of z, and both need to know what their layer's output is multiplied by.
    for key in tuple(keys):
        for suffix, needs in NEEDS.items():
            if key.endswith(suffix):
                keys.update(key.removesuffix(suffix) + need for need in needs)
    return keys.__contains__


def _keys_of(name: str, n_layers: int) -> set[str]:
    """Whole names of what is called so, in every layer unless the name says which one."""
    known = _known_keys(n_layers)
    keys = {act_name(name), *(act_name(name, i) for i in range(n_layers))} & known
    if not keys:
        raise StreamError(
            f"No activation of {n_layers} layers is called {name!r}. There are, in a layer: "
            f"{', '.join((*_STREAM, *_ATTENTION, *_MLP, *_NORM, *_HEAD_INPUTS, *_FACTORS))}; "
            f"beside the layers: {', '.join((*_GLOBAL, *_NORM))}."
        )
    return keys


def _known_keys(n_layers: int) -> set[str]:
    in_block = [
        *(f"hook_{name}" for name in (*_STREAM, *_HEAD_INPUTS, *_FACTORS)),
        *(f"attn.hook_{name}" for name in _ATTENTION),
        *(f"mlp.hook_{name}" for name in _MLP),
        *(f"{norm}.hook_{name}" for norm in ("ln1", "ln2") for name in _NORM),
    ]
    beside = [*(f"hook_{name}" for name in _GLOBAL), *(f"{FINAL}.hook_{name}" for name in _NORM)]
    return {*(f"blocks.{i}.{key}" for i in range(n_layers) for key in in_block), *beside}


def _is_whole(name: str) -> bool:
    return "." in name or name.startswith("hook_")
