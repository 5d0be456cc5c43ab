"""The scripts of the stages, one after the other, as DVC runs them."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CORPUS, REPOSITORY, with_changes


def test_the_stages_one_after_the_other_make_and_measure_a_smaller_model(
    llama_directory: Path,
    params: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("text.txt", "other.txt"):
        (tmp_path / name).write_text(CORPUS)
    changes = {
        "model.source": str(llama_directory),
        "data.source": "files",
        "data.window": 16,
        "data.calibration.path": "text.txt",
        "data.calibration.windows": 8,
        "data.evaluation.path": "other.txt",
        "data.evaluation.windows": 3,
        "device": "cpu",
        "split.strategy": "heads",
        "verify.new_tokens": 3,
        "curve.windows": 3,
        "curve.removed": [0.4, 0.2],
        "attribute.windows": 3,
        "attribute.window": 16,
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(with_changes(params, changes)))
    monkeypatch.chdir(tmp_path)
    before_fit = ("extract", "classify", "calibrate", "decompose", "sensitivity")
    for stage in (*before_fit, "fit", "verify", "curve", "attribute"):
        runpy.run_path(str(REPOSITORY / "stages" / f"{stage}.py"), run_name="__main__")
    metrics = {path.stem: json.loads(path.read_text()) for path in Path("metrics").iterdir()}
    assert metrics["classify"]["n_selected"] == metrics["verify"]["lossless"]["n_modules"] == 21
    assert 0.2 <= metrics["fit"]["removed_fraction"] < 0.3
    assert metrics["verify"]["lossless"]["max_abs_logit_diff"] <= 2e-5
    assert metrics["verify"]["n_predictions"] == 3 * 15
    assert 0 < metrics["verify"]["compressed"]["kl_mean"] < 5
    assert metrics["attribute"]["model"] == "compressed"
    # The same text and windows: two roads to one number.
    split = metrics["attribute"]["kl"]
    assert split["total"] == pytest.approx(metrics["verify"]["compressed"]["kl_mean"], rel=1e-4)
    assert sum(value for part, value in split.items() if part != "total") == pytest.approx(
        split["total"], rel=1e-4
    )
    low, high = metrics["curve"]["points"]["0.2"], metrics["curve"]["points"]["0.4"]
    assert low["removed_fraction"] == metrics["fit"]["removed_fraction"]
    for key in ("perplexity", "kl_mean", "top1_agreement"):  # the same budget, text and windows
        assert low[key] == metrics["verify"]["compressed"][key]
    assert 0.4 <= high["removed_fraction"] < 0.5
    assert low["kl_mean"] < high["kl_mean"]
    with Path("plots/curve.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows[0]["perplexity"] == metrics["verify"]["dense"]["perplexity"]
    assert rows[1:] == [low, high]
    assert not Path("artifacts/curve").exists()
    assert not Path("artifacts/checkpoints/calibrate").exists()
    assert "The state of the Union is" in " ".join(capsys.readouterr().out.split())
    monkeypatch.delitem(sys.modules, "sharebasis.summary", raising=False)  # runpy warns of it
    runpy.run_module("sharebasis.summary", run_name="__main__")
    assert "lossless wrap of 21 modules" in capsys.readouterr().out
    # Where there is a recovered model, it is the one to be explained.
    shutil.copytree("artifacts/compressed", "artifacts/recovered")
    runpy.run_path(str(REPOSITORY / "stages" / "attribute.py"), run_name="__main__")
    recovered = json.loads(Path("metrics/attribute.json").read_text())
    assert recovered == {**metrics["attribute"], "model": "recovered"}
