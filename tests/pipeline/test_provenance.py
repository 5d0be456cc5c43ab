"""What a metrics file says of itself, checked against git, files and tensors by another road."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, MakeSettings, run_command, with_changes
from dvc.repo import Repo

from sharebasis.errors import GitError
from sharebasis.io.git import git, known_to_git
from sharebasis.pipeline import provenance
from sharebasis.pipeline.provenance import code_version, parameters_digest, write_metrics

STAGE = "fit"
PIPELINE = "stages: {fit: {cmd: 'true', params: [fit.removed, model], metrics: [metrics/fit.json]}}"


def _git(directory: Path, *arguments: str) -> str:
    return run_command(directory, "git", *arguments).strip()


def test_git_refuses_with_its_words_or_knows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = f"^git rev-parse HEAD failed in {tmp_path}: fatal: not a git repository"
    with pytest.raises(GitError, match=refused):
        git(tmp_path, "rev-parse", "HEAD")
    assert known_to_git(tmp_path, "rev-parse", "HEAD") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GitError, match=f"^git rev-parse HEAD cannot run in {tmp_path}: .*'git'"):
        git(tmp_path, "rev-parse", "HEAD")
    assert known_to_git(tmp_path, "rev-parse", "HEAD") is None


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a package in it, its metrics and its parameters."""
    for name in ("src/package/code.py", "metrics/fit.json", "params.yaml", "dvc.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "--message=one")
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [
        (None, False),
        ("src/package/code.py", True),
        ("src/package/new.py", False),
        ("metrics/fit.json", False),
        ("params.yaml", False),
        ("dvc.lock", False),
    ],
)
def test_a_checkout_is_dirty_when_tracked_code_has_changed(
    checkout: Path, changed: str | None, dirty: bool
) -> None:
    if changed:
        (checkout / changed).write_text("2\n")
    head = _git(checkout, "rev-parse", "HEAD")
    assert code_version(checkout / "src/package") == (head, dirty)


def test_a_package_that_git_does_not_track_has_no_commit(checkout: Path) -> None:
    installed = checkout / "lib/package"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("1\n")
    assert code_version(installed) == (None, None)


def test_without_a_repository_or_without_git_there_is_no_commit(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_version(tmp_path.parent) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(checkout / "src/package") == (None, None)


@pytest.fixture
def written(
    make_settings: MakeSettings,
    params: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """A metrics file, read back; its directory is the working one."""
    monkeypatch.chdir(tmp_path)
    Path("dvc.yaml").write_text(PIPELINE)
    Path("params.yaml").write_text(yaml.safe_dump(dict(params)))
    tensors = [{"name": "b", "sha256": "2", "file": "x"}, {"name": "a", "sha256": "1", "file": "y"}]
    Path("weights").mkdir()
    Path("weights/manifest.json").write_text(json.dumps({"tensors": tensors}))
    read = {"weights": Path("weights"), "text": torch.arange(6).view(2, 3), "gone": Path("gone")}
    write_metrics(STAGE, {"loss": 0.5, "method": "svd"}, make_settings({"seed": 7}), **read)
    content: dict[str, Any] = json.loads(Path("metrics/fit.json").read_text())
    return content


def test_a_metrics_file_says_what_its_numbers_came_from(written: dict[str, Any]) -> None:
    (own,) = written.pop("provenance")
    assert written == {"loss": 0.5, "method": "svd"}
    tokens = torch.arange(6).numpy().tobytes()
    assert own["data"] == {
        "weights": hashlib.sha256(b'{"a": "1", "b": "2"}').hexdigest(),
        "text": hashlib.sha256(b"(2, 3)" + tokens).hexdigest(),
        "gone": None,
    }
    assert own["versions"]["torch"] == metadata.version("torch")
    assert own["versions"]["python"] == platform.python_version()
    assert (own["dtype"], own["seed"], own["threads"]) == ("float32", 7, torch.get_num_threads())
    assert own["device"].startswith("cpu (")
    if (REPOSITORY / ".git").exists():
        assert own["commit"] == _git(REPOSITORY, "rev-parse", "HEAD")


def test_the_parameters_hash_is_of_those_of_the_stage(
    written: dict[str, Any], params: Mapping[str, Any]
) -> None:
    (own,) = written["provenance"]
    assert own["parameters"] == parameters_digest(STAGE)
    for key, value, same in (("fit.removed", 0.3, False), ("vary.pairs", "consecutive", True)):
        Path("params.yaml").write_text(yaml.safe_dump(with_changes(params, {key: value})))
        assert (parameters_digest(STAGE) == own["parameters"]) == same
    Path("dvc.yaml").unlink()  # then every parameter counts
    assert parameters_digest(STAGE) != own["parameters"]


def test_dvc_shows_the_numbers_and_passes_over_the_provenance(written: dict[str, Any]) -> None:
    repo = Repo.init(no_scm=True)
    try:
        shown = repo.metrics.show()
    finally:
        repo.close()
    assert shown[""]["data"]["metrics/fit.json"]["data"] == {"loss": 0.5, "method": "svd"}


def test_every_stage_writes_its_metrics_with_their_provenance() -> None:
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        if "metrics" in stage:
            script = (REPOSITORY / "stages" / f"{name}.py").read_text()
            assert "write_metrics(" in script, name
            assert "write_json" not in script, name


def test_unknown_packages_and_processors_are_none_or_a_kind_of_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-at-all",))
    assert provenance._versions() == {"no-such-package-at-all": None}
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "flags: none\n")
    assert provenance._device_name(torch.device("cpu")) == f"cpu ({platform.machine()})"
