"""What settings have to be together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

from sharebasis.config.data import DataSettings
from sharebasis.config.fit import FitSettings
from sharebasis.config.methods import METHODS
from sharebasis.config.model import WeightTypeSettings
from sharebasis.config.schema import Settings
from sharebasis.config.structures import STRUCTURES, structure_name
from sharebasis.errors import SettingsError


def check_together(settings: Settings, where: str) -> None:
    """What no single field can tell.

    Raises:
        SettingsError: says the first thing that is wrong, of the settings that `where` names.
    """
    problems = chain(
        _of_weight_types(settings.model.weight_types or {}),
        _of_method(settings),
        _of_limits(settings.fit),
        _of_structures(settings),
        _of_sensitivity(settings),
        _of_groups(settings.fit),
        _of_data(settings.data),
    )
    for problem in problems:
        raise SettingsError(f"{where} is not valid: {problem}")


def _of_weight_types(weight_types: Mapping[str, WeightTypeSettings]) -> Iterator[str]:
    for name, weight_type in weight_types.items():
        order = weight_type.qkv_order
        if order is not None and "".join(sorted(order)) not in ("kqv", "kv"):
            yield (
                f"model.weight_types.{name}.qkv_order: it has to be a permutation of qkv, or of kv "
                f"(it is {order!r})"
            )


def _of_method(settings: Settings) -> Iterator[str]:
    """Whether there is such a method, and gradients where it weighs by them."""
    fit = settings.fit
    if fit.method not in METHODS:
        yield f"fit.method: it has to be one of {', '.join(METHODS)} (it is {fit.method!r})"
    metric = METHODS[fit.method]
    if not metric.either and fit.two_sided != (metric.gradients != "none"):
        said, does, other = "false", "weighs by", "fit=svd_llm does without them"
        if fit.two_sided:
            said, does, other = "true", "does not look at", "fit=kfac does"
        yield (f"fit.two_sided={said}, but {fit.method} {does} the gradients of outputs; {other}.")
    if fit.two_sided and settings.calibrate.gradients is None:
        yield (
            f"fit={fit.method} weighs by the gradients of outputs, which calibrate.gradients=null "
            "does not gather. Set calibrate.gradients=model (or text), or a fit without them "
            "(fit=auto fit.two_sided=false, say)."
        )


def _of_limits(fit: FitSettings) -> Iterator[str]:
    """Whether limits can hold at all, before anyone knows the sublayers."""
    if fit.limits and fit.allocation != "global":
        yield (
            "fit.limits needs fit.allocation=global; uniform takes the same fraction of every "
            "sublayer (fit.exclude and fit.rank_multiple go with both)."
        )
    for limit in fit.limits:
        if limit.floor > limit.cap:
            yield (
                f"fit.limits keeps at least {limit.floor:.4g} and at most {limit.cap:.4g} of "
                f"{limit.sublayers}."
            )
    patterns = [("exclude", pattern) for pattern in fit.exclude]
    for key, pattern in [*patterns, *(("limits", limit.sublayers) for limit in fit.limits)]:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"fit.{key}: {pattern!r} is not a regular expression: {error}."


def _of_structures(settings: Settings) -> Iterator[str]:
    """Whether there are such structures, and a choice between them."""
    fit, specs = settings.fit, settings.fit.structures
    try:
        entries = {spec: STRUCTURES[structure_name(spec)] for spec in specs}
    except SettingsError as error:
        yield str(error)
        return
    baselines = [spec for spec, entry in entries.items() if spec == entry.baseline]
    if len(specs) == len(baselines) == 1 and baselines != ["private"]:
        return
    for spec, entry in entries.items():
        if entry.reads_correlations and METHODS[fit.method].inputs != "full":
            yield (
                f"fit.structures offers {spec}, but {fit.method} does not look at how what is read "
                "is correlated."
            )
    if baselines != ["private"]:
        yield (
            f"fit.structures={list(specs)} has to be [fixed], or to have private among what the "
            "allocation may choose."
        )
    if len(specs) > 1 and fit.allocation != "global":
        yield (
            f"fit.structures={list(specs)} is a choice by least loss, which fit.allocation=global "
            "makes."
        )
    if fit.group_size != 1 or fit.share_experts:
        yield (
            "fit.group_size and fit.share_experts go with fit.structures=[fixed]; offer shared:N, "
            "by_distance:N and experts instead."
        )
    over_layers = (
        spec for spec, entry in entries.items() if re.fullmatch(entry.over_layers or "", spec)
    )
    if not fit.shared and any(over_layers):
        yield "fit.structures offers layers to share, but fit.shared names no family that may."
    by_distance = [spec for spec in specs if spec.startswith("by_distance:")]
    if by_distance and settings.grouping.by != "by_distance":
        yield f"fit.structures offers {by_distance[0]}, which needs grouping=by_distance."


def _of_sensitivity(settings: Settings) -> Iterator[str]:
    by, removed = settings.sensitivity.by, settings.sensitivity.removed
    if not 0 < removed < 1:  # here, as it would be named for every wrong fit.removed, too
        yield f"sensitivity.removed: it has to be in (0, 1) (it is {removed:g})"
    if by != "none" and settings.fit.allocation != "global":
        yield (
            f"sensitivity.by={by} needs fit.allocation=global; uniform takes the same fraction of "
            "every sublayer, whatever its loss counts."
        )


def _of_groups(fit: FitSettings) -> Iterator[str]:
    if fit.method != "basis_sharing" and fit.group_size != 1:
        yield (
            f"fit.group_size={fit.group_size}, but {fit.method} keeps a basis for every part "
            "(group_size 1); fit=basis_sharing shares."
        )


def _of_data(data: DataSettings) -> Iterator[str]:
    """Whether there are two texts."""
    if data.source == "sotu":
        return
    for use, text in (("calibration", data.calibration), ("evaluation", data.evaluation)):
        if not text.path:
            yield f"data.{use}.path is missing."
    calibration, evaluation = (
        Path(text.path or "").expanduser() for text in (data.calibration, data.evaluation)
    )
    if calibration == evaluation:
        yield (
            "data.calibration.path and data.evaluation.path are the same text, "
            f"{data.evaluation.path}: what was calibrated on would measure what was lost."
        )
    if data.source == "hub" and not data.hub_id:
        yield "data.hub_id is missing."
