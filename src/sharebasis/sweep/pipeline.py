"""dvc.yaml as a graph, and a key for every stage: a digest of all that its result depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sharebasis.io.hashing import json_digest, path_digest
from sharebasis.pipeline.dvc_file import PIPELINE, outputs, read_stages
from sharebasis.pipeline.settings import value_at

READ_BYTES = 16 * 2**20
"""Files up to this size are told apart by their content, others by size and time of change."""


@dataclass(frozen=True)
class Pipeline:
    """The stages of a repository."""

    root: Path

    @cached_property
    def stages(self) -> Mapping[str, Mapping[str, Any]]:
        return read_stages(self.root / PIPELINE)

    @cached_property
    def maker(self) -> Mapping[str, str]:
        """Path of an output -> the stage that writes it."""
        return {path: name for name in self.stages for path in outputs(self.stages[name])}

    def upstream(self, target: str, params: Mapping[str, Any]) -> list[str]:
        """The target and all that it depends on, what comes first first.

        Parameters may name what a stage makes as a dependency of another one.
        """
        names: list[str] = []

        def visit(name: str) -> None:
            for dep in self._deps(name, params):
                if dep in self.maker and self.maker[dep] not in names:
                    visit(self.maker[dep])
            names.append(name)

        visit(target)
        return names

    def keys(self, target: str, params: Mapping[str, Any]) -> dict[str, str]:
        """A key for every stage up to the target: command, parameters, and what it reads.

        Two runs in which a stage has the same key get the same from it.
        """
        keys: dict[str, str] = {}
        for name in self.upstream(target, params):
            stage = self.stages[name]
            reads = {}
            for path in self._deps(name, params):
                made = self.maker.get(path)
                reads[path] = keys[made] if made else _identity(self.root / path)
            goes_by = {key: value_at(params, key) for key in stage.get("params", ())}
            keys[name] = json_digest([stage["cmd"], reads, goes_by])
        return keys

    def outside(self, target: str, params: Mapping[str, Any]) -> list[str]:
        """Paths that the parameters name as dependencies: texts and models of the user's own."""
        named = (
            interpolated(dep, params)
            for name in self.upstream(target, params)
            for dep in self.stages[name]["deps"]
            if "${" in dep
        )
        return [path for path in named if path not in self.maker]

    def _deps(self, name: str, params: Mapping[str, Any]) -> list[str]:
        return [interpolated(dep, params) for dep in self.stages[name]["deps"]]


def interpolated(path: str, params: Mapping[str, Any]) -> str:
    """A path of dvc.yaml with its ${parameters} filled in."""
    return re.sub(r"\$\{([^}]+)\}", lambda match: str(value_at(params, match[1])), path)


def _identity(path: Path) -> Any:
    """What tells one content of a file or directory from another."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if _counts(file))
        return [[str(file.relative_to(path)), _identity(file)] for file in files]
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    if stat.st_size > READ_BYTES:
        return [stat.st_size, stat.st_mtime_ns]
    return path_digest(path)


def _counts(path: Path) -> bool:
    """Whether it is a file whose content matters; bytecode does not (.dvcignore says the same)."""
    return path.is_file() and path.suffix not in (".pyc", ".pyo")
