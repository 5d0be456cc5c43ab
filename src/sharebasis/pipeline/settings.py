"""params.yaml -> settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from sharebasis.config.schema import Settings
from sharebasis.errors import SettingsError
from sharebasis.pipeline.checks import check_together

PARAMS = Path("params.yaml")


# An unknown key is an error in every section. Said here, so that config/ stays plain.
setattr(Settings, "__pydantic_config__", {"extra": "forbid"})  # noqa: B010

_SETTINGS = TypeAdapter(Settings)


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
        settings = _SETTINGS.validate_python(_with_none(content))
    except ValidationError as error:
        raise SettingsError(f"{where} is not valid: {_explain(error)}") from None
    check_together(settings, where)
    return settings


def _with_none(tree: Any) -> Any:
    """The same with `none` for a split of false, which YAML makes of `no` and `off`, too."""
    if not isinstance(tree, Mapping):
        return tree
    return {
        key: "none" if key in ("split", "strategy") and value is False else _with_none(value)
        for key, value in tree.items()
    }


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


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_detail(detail) for detail in error.errors())


def _explain_detail(detail: ErrorDetails) -> str:
    key = ".".join(str(step) for step in detail["loc"]) or "the file"
    has_value = detail["type"] not in ("missing", "unexpected_keyword_argument")
    return f"{key}: {detail['msg']}" + (f" (it is {detail['input']!r})" if has_value else "")
