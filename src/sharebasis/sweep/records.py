"""What stages have made, by their keys, so that no workspace makes it again.

DVC's own run cache would do, but it leaves out every output that persists, and ours do. A record
is the stage's entry of dvc.lock, beside a copy of those outputs that are in git and not in DVC's
cache; what is in the cache is found there by the entry.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.utils.serialize import YAMLFileCorruptedError, dump_yaml, load_yaml

from sharebasis.pipeline.dvc_file import outputs
from sharebasis.sweep.pipeline import Pipeline

LOCK = "dvc.lock"


@dataclass(frozen=True)
class Records:
    """A directory with a subdirectory for every key.

    Args:
        directory: of the records.
        cache: DVC's; a record whose outputs were collected as garbage is none.
    """

    directory: Path
    cache: Path

    def __contains__(self, key: str) -> bool:
        try:
            entry = load_yaml(self.directory / key / LOCK)
        except FileNotFoundError:
            return False
        return self._cached(entry, _files(self.directory / key))

    def _cached(self, entry: Mapping[str, Any], in_git: Collection[str]) -> bool:
        """Whether the outputs of an entry are in the cache, but for those that are in git."""
        hashes = [out["md5"] for out in entry.get("outs", ()) if out["path"] not in in_git]
        return all((self.cache / md5[:2] / md5[2:]).exists() for md5 in hashes)

    def keep(self, pipeline: Pipeline, stages: Mapping[str, str], workspace: Path) -> None:
        """Record what stages (name -> key) have made in a workspace, by its dvc.lock."""
        entries = read_lock(workspace)
        for stage, key in stages.items():
            if key in self or stage not in entries:
                continue
            self.directory.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=self.directory, prefix=".partial-"))
            _copy(_in_git(pipeline, stage), workspace, partial)
            dump_yaml(partial / LOCK, entries[stage])
            shutil.rmtree(self.directory / key, ignore_errors=True)
            try:
                partial.rename(self.directory / key)
            except OSError:  # somebody else was faster, with the same
                shutil.rmtree(partial)

    def lay_out(self, pipeline: Pipeline, stages: Mapping[str, str], workspace: Path) -> None:
        """Have a workspace's dvc.lock and git files say what is known of stages (name -> key).

        Whatever else dvc.lock says, DVC has to judge; it fails where outputs are not in the cache.
        """
        entries = {
            stage: entry
            for stage, entry in read_lock(workspace).items()
            if stage in pipeline.stages and self._cached(entry, _in_git(pipeline, stage))
        }
        for stage, key in stages.items():
            if key in self:
                entries[stage] = load_yaml(self.directory / key / LOCK)
                _copy(_in_git(pipeline, stage), self.directory / key, workspace)
        write_lock(workspace, entries)


def read_lock(workspace: Path) -> dict[str, Any]:
    """Stage -> its entry of dvc.lock."""
    try:
        return load_yaml(workspace / LOCK).get("stages", {})
    except (FileNotFoundError, YAMLFileCorruptedError):
        return {}


def write_lock(workspace: Path, entries: Mapping[str, Any]) -> None:
    dump_yaml(workspace / LOCK, {"schema": "2.0", "stages": dict(entries)})


def _files(directory: Path) -> list[str]:
    """Every path below a directory, directories included, relative to it."""
    return [str(path.relative_to(directory)) for path in directory.rglob("*")]


def _in_git(pipeline: Pipeline, stage: str) -> list[str]:
    return [path for path, cached in outputs(pipeline.stages[stage]).items() if not cached]


def _copy(paths: Iterable[str], source: Path, target: Path) -> None:
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if (source / path).is_dir():
            shutil.copytree(source / path, target / path, dirs_exist_ok=True)
        elif (source / path).exists():
            partial = (target / path).with_name(f".{os.getpid()}.partial")
            shutil.copyfile(source / path, partial)
            partial.replace(target / path)
