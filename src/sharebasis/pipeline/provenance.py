"""Metrics files, each with what its numbers came from."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sharebasis.config.schema import Settings
from sharebasis.io.git import known_to_git
from sharebasis.io.hashing import json_digest
from sharebasis.io.identity import digest_of
from sharebasis.io.manifest import MANIFEST
from sharebasis.io.records import read_json, write_json
from sharebasis.pipeline.dvc_file import PIPELINE, read_stages
from sharebasis.pipeline.paths import METRICS, PROVENANCE
from sharebasis.pipeline.settings import PARAMS, value_at

SOURCE = Path(__file__).parents[1]
CODE = ("src", "stages", "requirements")
"""What of a checkout can change a number, beside the parameters and the data."""
PACKAGES = ("sharebasis", "torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors")
"""Those whose code makes numbers."""


def write_metrics(
    stage: str,
    metrics: Mapping[str, Any],
    settings: Settings,
    device: torch.device | None = None,
    **data: Tensor | Path,
) -> None:
    """Write metrics/STAGE.json with its provenance.

    The provenance is in a list of one: `dvc metrics show` and `diff` pass over lists, and a
    commit or a version is no number to compare.

    Args:
        stage: as in dvc.yaml.
        metrics: what the stage measured.
        settings: that it ran with.
        device: that it computed on; None is the CPU.
        data: what it read, by name: token ids, a tensor, or a directory that `extract` wrote.
    """
    origin = provenance(stage, settings, data, device or torch.device("cpu"))
    write_json(METRICS / f"{stage}.json", {**metrics, PROVENANCE: [origin]})


def provenance(
    stage: str, settings: Settings, data: Mapping[str, Tensor | Path], device: torch.device
) -> dict[str, Any]:
    """All that a number can depend on; None for what this machine cannot tell.

    Hashes are SHA-256. Weights are known by those of their manifest and not read again.
    """
    commit, dirty = code_version(SOURCE)
    return {
        "commit": commit,
        "dirty": dirty,
        "parameters": parameters_digest(stage),
        "data": {name: _data_digest(content) for name, content in data.items()},
        "versions": {"python": platform.python_version(), **_versions()},
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": settings.model.dtype,
        "seed": settings.seed,
    }


def code_version(source: Path) -> tuple[str | None, bool | None]:
    """The commit that `source` was checked out from, and whether code has changed since.

    Metrics, dvc.lock and params.yaml change during every run and do not count.

    Args:
        source: a directory of tracked files; one that merely lies inside some checkout, as an
            installed package may, has no commit.
    """
    if not known_to_git(source, "ls-files", "."):
        return None, None
    top = Path(known_to_git(source, "rev-parse", "--show-toplevel") or source)
    changed = known_to_git(top, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return known_to_git(source, "rev-parse", "HEAD"), None if changed is None else bool(changed)


def parameters_digest(stage: str) -> str:
    """Of the parameters that dvc.yaml lists for a stage; of all, where there is no dvc.yaml."""
    parameters = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    if PIPELINE.exists():
        keys = read_stages()[stage].get("params", ())
        parameters = {key: value_at(parameters, key) for key in keys}
    return json_digest(parameters)


def _data_digest(content: Tensor | Path) -> str | None:
    if isinstance(content, Tensor):
        return digest_of(content)
    manifest = content / MANIFEST
    if not manifest.exists():
        return None
    tensors = read_json(manifest)["tensors"]
    return json_digest({tensor["name"]: tensor["sha256"] for tensor in tensors})


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in PACKAGES}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"cpu ({next(names, platform.machine())})"
