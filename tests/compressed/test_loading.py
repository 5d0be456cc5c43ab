"""A compressed model in memory is what its directory says, and no more than that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_pipeline import MakeSmallPipeline

from sharebasis.compressed.index import INDEX_FILE
from sharebasis.compressed.loader import load_compressed
from sharebasis.errors import StoreError

AUTO = {"fit.method": "auto", "fit.shared": [], "fit.group_size": 1, "fit.structures": ["private"]}


def test_a_model_that_could_not_be_loaded_again_is_not_saved(
    small_pipeline: MakeSmallPipeline, tmp_path: Path
) -> None:
    compressed = small_pipeline("llama", AUTO).compressed
    model = load_compressed(compressed)
    with pytest.raises(StoreError, match=r"copy .*compressed, and load the copy by sharebasis"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    tokens = torch.arange(1, 6)[None]
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_an_edit_of_a_later_version_is_told(
    small_pipeline: MakeSmallPipeline, tmp_path: Path
) -> None:
    compressed = small_pipeline("llama", AUTO).copy(tmp_path).compressed
    index = json.loads((compressed / INDEX_FILE).read_text())
    (compressed / INDEX_FILE).write_text(json.dumps(index | {"edits": [{"kind": "fewer_heads"}]}))
    with pytest.raises(StoreError, match=r"'fewer_heads'.*knows pruned_neurons, value_gauge"):
        load_compressed(compressed)
