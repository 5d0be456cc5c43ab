"""What TransformerLens calls an activation: `blocks.3.attn.hook_z`, or `("z", 3)` for short."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sharebasis.residual.capture import FINAL

Name = str | tuple[Any, ...]
Names = str | Iterable[str] | Callable[[str], bool] | None

_IN_ATTENTION = ("q", "k", "v", "z", "result")
_IN_MLP = ("pre", "pre_linear", "post")
_IN_NORM = ("scale", "normalized", "out")
_ALIASES = {"key": "k", "query": "q", "value": "v", "mlp_pre": "pre", "mlp_post": "post"}


def act_name(name: str, layer: int | str | None = None, sublayer: str | None = None) -> str:
    """`("z", 3)` -> `blocks.3.attn.hook_z`; a whole name stays as it is."""
    if "." in name or name.startswith("hook_"):
        return name
    name = _ALIASES.get(name, name)
    if name in _IN_ATTENTION:
        sublayer = "attn"
    elif name in _IN_MLP:
        sublayer = "mlp"
    elif name in _IN_NORM:
        sublayer = (sublayer or "ln1") if layer is not None else FINAL
    else:
        sublayer = None
    block = "" if layer is None else f"blocks.{layer}."
    return f"{block}{sublayer + '.' if sublayer else ''}hook_{name}"


def wanted(names: Names) -> Callable[[str], bool]:
    """Whether an activation of a whole name is to be kept; `names` as of `Observer`."""
    if names is None:
        return lambda key: key != "hook_raw_logits"
    if callable(names):
        return names
    all_names = {names} if isinstance(names, str) else set(names)
    whole = {name for name in all_names if "." in name or name.startswith("hook_")}
    short = {act_name(name, "*") for name in all_names - whole} | {
        act_name(name) for name in all_names - whole
    }
    # A result is made of z, and both need to know what their layer's output is multiplied by.
    for name in (*whole, *short):
        for suffix, needs in _NEEDS.items():
            if name.endswith(suffix):
                prefix = name.removesuffix(suffix)
                (short if "*" in name else whole).update(prefix + need for need in needs)
    return lambda key: key in whole or re.sub(r"(?<=blocks\.)\d+", "*", key) in short


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "attn.hook_z": ("hook_attn_factor",),
    "attn.hook_result": ("attn.hook_z", "hook_attn_factor"),
    "mlp.hook_post": ("hook_mlp_factor",),
}
