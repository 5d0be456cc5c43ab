"""Indexes that earlier versions wrote (formats 1 to 5) -> the one of today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CURRENT_FORMAT = 6
"""The first that `upgraded` leaves as it is."""


def upgraded(content: Any) -> Any:
    """The content of an index as today's version would have written it; anything else as it is."""
    if not isinstance(content, dict) or content.get("format", 1) >= CURRENT_FORMAT:
        return content
    if not {"groups", "files"} <= content.keys():
        return content
    edits = [{"kind": "pruned_neurons", **mlp} for mlp in content.get("mlps", ())]
    groups = [_group(group) for group in content["groups"]]
    edits += [{"kind": "value_gauge", **values} for values in content.get("values", ())]
    return {
        "groups": groups,
        "files": content["files"],
        "edits": edits,
        "format": CURRENT_FORMAT,
    }


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    parts = group["parts"]
    side, basis = group.get("side", "input"), group["basis"]
    pivots = [part.get("pivots") for part in parts]
    if basis is None:
        form = "masked" if parts[0].get("mask") else "fixed_columns" if pivots[0] else "dense"
    else:
        form = "interpolative" if pivots[0] else "low_rank"
    shared = {} if basis is None else {"basis": basis}
    if form == "interpolative" and side == "output":
        shared["pivots"] = pivots[0]
    return {
        "name": group["name"],
        "family": group["family"],
        "form": form,
        "parts": _parts(parts, form, side),
        "tensors": shared,
        "rank": None if basis is None else group["rank"],
        "side": side,
    }


def _parts(parts: Sequence[Mapping[str, Any]], form: str, side: str) -> list[dict[str, Any]]:
    """A part for each tensor, under all names of its sublayer."""
    by_stem: dict[str, dict[str, Any]] = {}
    for part in parts:
        if (stem := part["coefficient"]) in by_stem:
            by_stem[stem]["sublayers"].append(part["sublayer"])
            continue
        role = "coefficient" if form in ("low_rank", "interpolative") else "dense"
        tensors = {role: stem}
        if form == "fixed_columns" or (form == "interpolative" and side == "input"):
            tensors["pivots"] = part["pivots"]
        if form == "masked":
            tensors["mask"] = part["mask"]
        by_stem[stem] = {"sublayers": [part["sublayer"]], "rows": part["rows"], "tensors": tensors}
    return list(by_stem.values())
