"""Damaged artefacts are refused, and what goes wrong leaves the earlier result."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import RunPython, contents
from safetensors.torch import load_file, save_file
from small_pipeline import CPU, MakeSmallPipeline, SmallPipeline

from sharebasis import load_compressed
from sharebasis.compressed.index import INDEX_FILE
from sharebasis.errors import ShareBasisError, SourceError, StoreError, WeightsError
from sharebasis.io.records import save_record
from sharebasis.stages.fit.fit import fit


@pytest.fixture
def llama_run(small_pipeline: MakeSmallPipeline, tmp_path: Path) -> SmallPipeline:
    """A llama of its own, to be damaged."""
    changes = {"fit.method": "basis_sharing", "fit.group_size": 2, "fit.shard_bytes": 20_000}
    return small_pipeline("llama", changes).copy(tmp_path)


def _shard_of(run: SmallPipeline, ending: str) -> Path:
    name = next(name for name in run.index.files if name.endswith(ending))
    return run.compressed / run.index.files[name]


def _forget_a_tensor(run: SmallPipeline) -> None:
    path = run.compressed / INDEX_FILE
    content = json.loads(path.read_text())
    del content["files"]["model.layers.1.input_layernorm.weight"]
    path.write_text(json.dumps(content))


def _forget_a_basis(run: SmallPipeline) -> None:
    path = run.compressed / INDEX_FILE
    content = json.loads(path.read_text())
    del content["files"][content["groups"][0]["tensors"]["basis"]]
    path.write_text(json.dumps(content))


DAMAGES: Mapping[str, tuple[Callable[[SmallPipeline], object], type[ShareBasisError], str]] = {
    "missing shard": (
        lambda run: _shard_of(run, ".basis").unlink(),
        WeightsError,
        r"sharebasis-\d+\.safetensors is missing",
    ),
    "truncated shard": (
        lambda run: os.truncate(_shard_of(run, ".basis"), 3000),
        WeightsError,
        r"sharebasis-\d+\.safetensors \(3000 bytes\) is truncated",
    ),
    "missing index": (
        lambda run: (run.compressed / INDEX_FILE).unlink(),
        StoreError,
        r"sharebasis\.json is missing; run the stage",
    ),
    "damaged index": (
        lambda run: (run.compressed / INDEX_FILE).write_text('{"groups": []}'),
        StoreError,
        r"sharebasis\.json is no CompressedIndex .*files",
    ),
    "missing config": (
        lambda run: (run.compressed / "config.json").unlink(),
        SourceError,
        r"no usable config\.json",
    ),
    "forgotten tensor": (
        _forget_a_tensor,
        StoreError,
        r"lacks 1 tensors of the model, model\.layers\.1\.input_layernorm\.weight among",
    ),
    "forgotten basis": (_forget_a_basis, StoreError, r"layers\.0-1\.self_attn\.q_proj\.basis"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_compressed_directory_is_refused(llama_run: SmallPipeline, what: str) -> None:
    damage, error, text = DAMAGES[what]
    damage(llama_run)
    with pytest.raises(error, match=text):
        load_compressed(llama_run.compressed)


def test_weights_without_one_of_the_sublayers_leave_the_earlier_result(
    llama_run: SmallPipeline, tmp_path: Path
) -> None:
    earlier = contents(llama_run.compressed)
    damaged = Path(shutil.copytree(llama_run.weights, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"holds no tensor for model.*1\.mlp\.up_proj\.w"):
        replace(llama_run.model, weights=damaged).fit(tmp_path, llama_run.settings.fit)
    assert contents(llama_run.compressed) == earlier


FIT_AND_DIE = """
    import os, signal, sys, torch
    from pathlib import Path
    from sharebasis.config.fit import FitSettings
    from sharebasis.io.records import load_record
    from sharebasis.io.tensor_files import TensorWriter
    from sharebasis.stages.fit.fit import fit

    target = Path(sys.argv[1])
    settings = load_record(target / "fit.json", FitSettings)
    flush, left = TensorWriter.flush, 3

    def die(self):
        global left
        flush(self)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    TensorWriter.flush = die
    device = torch.device("cpu")
    fit(target / "weights", target / "spectra", settings, target / "compressed", device, None)
"""


def test_a_kill_in_the_middle_of_fit_leaves_the_earlier_result(
    llama_run: SmallPipeline, tmp_path: Path, run_python: RunPython
) -> None:
    earlier = contents(llama_run.compressed)
    save_record(tmp_path / "fit.json", llama_run.settings.fit)
    killed = run_python(FIT_AND_DIE, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / ".compressed.partial").iterdir())) == 3
    assert contents(llama_run.compressed) == earlier
    target = llama_run.compressed
    fit(llama_run.weights, llama_run.spectra, llama_run.settings.fit, target, CPU, None)
    assert contents(target) == earlier  # nothing in the fit is random
    assert not (tmp_path / ".compressed.partial").exists()
