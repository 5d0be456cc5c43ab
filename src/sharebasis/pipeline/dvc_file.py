"""What dvc.yaml says of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PIPELINE = Path("dvc.yaml")

Stage = Mapping[str, Any]


def read_stages(path: Path = PIPELINE) -> Mapping[str, Stage]:
    """Name -> stage, in the order of the file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]


def outputs(stage: Stage) -> dict[str, bool]:
    """Path of every output of a stage -> whether it is kept in DVC's cache, not in git."""
    paths = {}
    for kind in ("outs", "metrics", "plots"):
        for out in stage.get(kind, ()):
            ((path, flags),) = out.items() if isinstance(out, Mapping) else [(out, {})]
            paths[path] = flags.get("cache", True)
    return paths


def data_of(stage: Stage) -> list[str]:
    """What a stage reads beside its code."""
    code = ("src/", "stages/", "requirements/pipeline.txt")
    return [dep for dep in stage["deps"] if not dep.startswith(code)]
