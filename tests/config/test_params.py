"""`python -m sharebasis.params` says what changed and writes it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from composing import CONF

from sharebasis import params as params_script
from sharebasis.pipeline.compose import compose_params
from sharebasis.pipeline.settings import load_settings


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ and its composition, as the working directory."""
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "params.yaml").write_text(compose_params(CONF))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run_params(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["params", *overrides])
    params_script.main()


def test_params_says_what_changed_and_writes_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _run_params(monkeypatch, "fit.removed=0.3", "split=heads")
    assert capsys.readouterr().out.splitlines() == [
        "fit.removed: 0.2 -> 0.3",
        "sensitivity.removed: 0.2 -> 0.3",
        "split.strategy: 'none' -> 'heads'",
    ]
    settings = load_settings(checkout / "params.yaml")
    assert (settings.fit.removed, settings.split.strategy) == (0.3, "heads")
    _run_params(monkeypatch)
    assert "fit.removed: 0.3 -> 0.2" in capsys.readouterr().out
    _run_params(monkeypatch)
    assert capsys.readouterr().out == "params.yaml is up to date.\n"


def test_params_follows_an_edit_of_conf(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkout / "conf" / "verify" / "default.yaml"
    path.write_text(path.read_text().replace("new_tokens: 40", "new_tokens: 7"))
    _run_params(monkeypatch)
    assert capsys.readouterr().out == "verify.new_tokens: 40 -> 7\n"
    assert load_settings(checkout / "params.yaml").verify.new_tokens == 7


def test_params_writes_the_file_where_there_is_none(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "params.yaml").unlink()
    _run_params(monkeypatch)
    assert "seed: '(absent)' -> 0" in capsys.readouterr().out
    assert load_settings(checkout / "params.yaml")


@pytest.mark.parametrize("content", ["<<<<<<< HEAD\nseed: 1\n=======\n", "a: [1"])
def test_params_replaces_a_file_that_is_not_yaml(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (checkout / "params.yaml").write_text(content)
    _run_params(monkeypatch)
    assert load_settings(checkout / "params.yaml")


@pytest.mark.parametrize(
    ("override", "text"),
    [("fit.removed=3", "fit.removed"), ("fit=magic", "magic"), ("+fit.typo=1", "fit.typo")],
)
def test_params_refuses_what_is_not_valid_and_leaves_the_file(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, override: str, text: str
) -> None:
    before = (checkout / "params.yaml").read_bytes()
    with pytest.raises(SystemExit, match=f"^SettingsError: .*{re.escape(text)}"):
        _run_params(monkeypatch, override)
    assert (checkout / "params.yaml").read_bytes() == before
