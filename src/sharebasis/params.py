"""Compose `conf/` into params.yaml again and say what changed.

`dvc repro` goes by params.yaml and does not see edits in `conf/`; this is the bridge:

    python -m sharebasis.params [split=heads fit.removed=0.3 ...]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import yaml

from sharebasis.config import PARAMS, compose_params, parse_settings
from sharebasis.stage import report_errors
from sharebasis.store import disk_errors


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def changes(before: Any, after: Any) -> list[str]:
    """One line for every key that differs."""
    old, new = flatten(before or {}), flatten(after)
    return [
        f"{key}: {old.get(key, '(absent)')!r} -> {new.get(key, '(absent)')!r}"
        for key in sorted(old.keys() | new.keys())
        if key and (key in old, old.get(key)) != (key in new, new.get(key))
    ]


@report_errors
def main() -> None:
    text = compose_params(overrides=sys.argv[1:])
    after = yaml.safe_load(text)
    parse_settings(after, "The composition of conf/")
    before = yaml.safe_load(PARAMS.read_text(encoding="utf-8")) if PARAMS.exists() else {}
    lines = changes(before, after)
    if lines:
        with disk_errors(PARAMS):
            PARAMS.write_text(text, encoding="utf-8")
    print("\n".join(lines) if lines else f"{PARAMS} is up to date.")


if __name__ == "__main__":
    main()
