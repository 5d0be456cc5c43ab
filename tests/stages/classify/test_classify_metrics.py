"""What the stage `classify` tells and counts."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, small_config
from transformers import PretrainedConfig


@pytest.fixture
def classify_metrics(
    params: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[PretrainedConfig], Any]:
    """Runs the stage in an empty directory, which needs a config and no weights."""

    def run(config: PretrainedConfig) -> Any:
        monkeypatch.chdir(tmp_path)
        config.save_pretrained(tmp_path / "artifacts" / "weights")
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(dict(params)))
        runpy.run_path(str(REPOSITORY / "stages" / "classify.py"), run_name="__main__")
        return json.loads((tmp_path / "metrics" / "classify.json").read_text())

    return run


def test_a_name_that_what_was_seen_contradicts_is_told_and_counted(
    classify_metrics: Callable[[PretrainedConfig], Any], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    metrics = classify_metrics(small_config("rwkv", **sizes))
    told = [record.getMessage() for record in caplog.records if record.name == "__main__"]
    assert told == [
        f"rwkv.blocks.{layer}.feed_forward.value: trace: write, shape: write, name: read; it is "
        "write."
        for layer in (0, 1)
    ]
    assert metrics["n_disagreements"] == 2
    assert metrics["evidence"] == {"trace": 14}
    assert metrics["role"] == {"read": 10, "write": 4}


def test_the_metrics_of_classify_count_every_sublayer(
    classify_metrics: Callable[[PretrainedConfig], Any], caplog: pytest.LogCaptureFixture
) -> None:
    metrics = classify_metrics(small_config("qwen2_moe"))
    assert not [record for record in caplog.records if record.name == "__main__"]
    assert metrics.pop("provenance")
    n_layer = {"attention": 4, "experts": 2 * 4, "shared expert": 3}
    gates = 3
    assert metrics == {
        "n_sublayers": 3 * sum(n_layer.values()) + gates,
        "n_selected": 3 * sum(n_layer.values()),
        "role": {"read": 3 * (3 + 4 + 2) + gates, "write": 3 * (1 + 4 + 1)},
        "evidence": {"trace": 3 * 15 + gates},
        "category": {
            "ambiguous_read": 3,
            "read": 3 * (2 + 4 + 2) + gates,
            "ambiguous_write": 3,
            "write": 3 * (4 + 1),
        },
        "n_disagreements": 0,
        "n_tied": 0,
        "family": {"q": 3, "k": 3, "v": 3, "o": 3, "fused": 12, "down": 15, "gate": 3, "up": 3}
        | {"other": gates},
    }
