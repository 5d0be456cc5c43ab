"""Compose `conf/` into params.yaml again and say what changed.

`dvc repro` goes by params.yaml and does not see edits in `conf/`; this is the bridge:

    python -m sharebasis.params [split=heads fit.removed=0.3 ...]
"""

from __future__ import annotations

import sys
from typing import Any

import yaml

from sharebasis.io.atomic import write_text
from sharebasis.pipeline.compose import compose_params
from sharebasis.pipeline.settings import PARAMS, flatten, parse_settings
from sharebasis.pipeline.stage import report_errors


def changes(before: Any, after: Any) -> list[str]:
    """One line for every key that differs."""
    old, new = flatten(before or {}), flatten(after)
    return [
        f"{key}: {old.get(key, '(absent)')!r} -> {new.get(key, '(absent)')!r}"
        for key in sorted(old.keys() | new.keys())
        if key and (key in old, old.get(key)) != (key in new, new.get(key))
    ]


def _present() -> Any:
    """What params.yaml says now; nothing, if it is missing or no YAML."""
    try:
        return yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None


@report_errors
def main() -> None:
    text = compose_params(overrides=sys.argv[1:])
    after = yaml.safe_load(text)
    parse_settings(after, "The composition of conf/")
    before = _present()
    lines = changes(before, after)
    if lines:
        write_text(PARAMS, text)
    print("\n".join(lines) if lines else f"{PARAMS} is up to date.")


if __name__ == "__main__":
    main()
