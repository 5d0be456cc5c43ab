"""Moments are those of what the sublayers read, however often the run was killed."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from calibrating import (
    WINDOWS,
    assert_identical,
    count_windows,
    load,
    moments_of,
    never_saved,
    selected_of,
)
from conftest import MakeDirectory, RunPython, contents
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.errors import CalibrationError
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import save_record
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate, run_identity
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source

FAMILIES = ("llama", "gpt2", "phi", "opt")


@pytest.fixture(scope="module")
def llama(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/weights of the llama."""
    weights = tmp_path_factory.mktemp("artifacts") / "weights"
    extract(find_source(str(llama_directory)), weights)
    return weights


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, make_directory: MakeDirectory) -> Path:
    """A model of each of some families."""
    return make_directory(request.param)


# Moments


@torch.no_grad()
def _inputs(model: PreTrainedModel, names: list[str], batch: int) -> dict[str, Tensor]:
    """What every sublayer is given, seen by hooks on the dense model, in float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, own=seen[name]: own.append(args[0].flatten(0, -2).double())
        )
    for chunk in WINDOWS.split(batch):
        model(input_ids=chunk)
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def test_moments_are_those_that_hooks_on_the_dense_model_see(
    directory: Path, tmp_path: Path
) -> None:
    selected = selected_of(directory)
    sites, sums = calibrate(load(directory), selected, WINDOWS, 4, never_saved(tmp_path))
    moments = moments_of(sums)
    site_of = {reader: site.name for site in sites for reader in site.readers}
    assert site_of.keys() == {sublayer.name for sublayer in selected}
    for name, x in _inputs(load(directory), list(site_of), batch=4).items():
        moment = moments[site_of[name]]
        assert moment.n_tokens == len(x) == WINDOWS.numel()
        torch.testing.assert_close(moment.total, x.T @ x, rtol=1e-12, atol=1e-12 * len(x))
        torch.testing.assert_close(moment.sum, x.sum(0), rtol=1e-12, atol=1e-12 * len(x))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_batch_size_changes_moments_by_float32_rounding_at_most(
    directory: Path, tmp_path: Path, batch: int
) -> None:
    selected = selected_of(directory)
    runs = (
        moments_of(calibrate(load(directory), selected, WINDOWS, size, never_saved(tmp_path))[1])
        for size in (4, batch)
    )
    expected, found = runs
    for name, moment in expected.items():
        difference = (found[name].total - moment.total).norm() / moment.total.norm()
        assert difference < 1e-5, name
        assert found[name].n_tokens == moment.n_tokens


def test_written_moments_are_read_back_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    sites, sums = calibrate(load(llama), selected_of(llama), WINDOWS, 4, never_saved(tmp_path))
    write_moments(tmp_path / "moments", sites, sums)
    stored = MomentStore(tmp_path / "moments")
    assert_identical({site.name: stored.read(site.name) for site in sites}, moments_of(sums))
    for site in sites:
        assert {stored.site(reader) for reader in site.readers} == {site.name}
    with pytest.raises(CalibrationError, match=r"no moment for lm_head; run calibrate again"):
        stored.site("lm_head")


# Kills

CALIBRATE_AND_DIE = """
    import json, os, signal, sys, torch
    from pathlib import Path
    from sharebasis.architecture.sublayers import Classification
    from sharebasis.io.checkpoint import Checkpoint
    from sharebasis.io.records import load_record
    from sharebasis.model.hub import load_model
    from sharebasis.stages.calibrate.calibrate import calibrate

    torch.set_num_threads(1)
    weights, directory, record, windows, passes = sys.argv[1:]
    model = load_model(Path(weights), "float32", torch.device("cpu"))
    windows = torch.tensor(json.loads(windows))
    left = int(passes) + 1  # the probe is a pass, too

    def die(*_):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    model.base_model.register_forward_pre_hook(die)
    selected = load_record(Path(record), Classification).selected
    calibrate(model, selected, windows, 2, Checkpoint(Path(directory), {"run": 1}, 1e-9))
"""


@pytest.fixture(scope="module")
def killed(llama: Path, tmp_path_factory: pytest.TempPathFactory, run_python: RunPython) -> Path:
    """The checkpoint of a run with batch 2 that was killed after three of five batches."""
    directory = tmp_path_factory.mktemp("killed")
    record = classify_model(meta_model(load_config(llama)))
    save_record(directory / "sublayers.json", record)
    run = run_python(
        CALIBRATE_AND_DIE,
        llama,
        directory / "checkpoint",
        directory / "sublayers.json",
        json.dumps(WINDOWS.tolist()),
        3,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    return directory / "checkpoint"


def test_a_killed_run_goes_on_and_ends_bit_identical(
    llama: Path, killed: Path, tmp_path: Path
) -> None:
    selected = selected_of(llama)
    whole = calibrate(load(llama), selected, WINDOWS, 2, never_saved(tmp_path))[1]
    model = load(llama)
    batches = count_windows(model)
    before = contents(killed)
    resumed = calibrate(model, selected, WINDOWS, 2, Checkpoint(killed, {"run": 1}, math.inf))[1]
    assert batches == [1, 2, 2]  # the probe, and the four windows that were left
    assert contents(killed) == before
    assert_identical(moments_of(resumed), moments_of(whole))


def test_a_checkpoint_of_another_run_is_not_used(llama: Path, killed: Path, tmp_path: Path) -> None:
    selected = selected_of(llama)
    model = load(llama)
    batches = count_windows(model)
    found = calibrate(model, selected, WINDOWS, 2, Checkpoint(killed, {"run": 2}, math.inf))[1]
    assert batches == [1, 2, 2, 2, 2, 2]
    whole = calibrate(load(llama), selected, WINDOWS, 2, never_saved(tmp_path))[1]
    assert_identical(moments_of(found), moments_of(whole))


def test_a_complete_run_takes_its_checkpoint_away(llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "parent" / "checkpoint", {"run": 1}, 1e-9)
    calibrate(load(llama), selected_of(llama), WINDOWS, 4, checkpoint)
    assert checkpoint.directory.exists()
    checkpoint.remove()
    assert not any(checkpoint.directory.parent.iterdir())


def test_no_checkpoint_is_written_before_its_time(llama: Path, tmp_path: Path) -> None:
    calibrate(load(llama), selected_of(llama), WINDOWS, 4, never_saved(tmp_path))
    assert not any(tmp_path.iterdir())


def test_the_identity_of_a_run_holds_all_that_the_moments_depend_on(
    llama: Path, make_directory: MakeDirectory, tmp_path: Path
) -> None:
    extract(find_source(str(make_directory("llama", seed=1))), tmp_path / "weights")
    selected = selected_of(llama)
    swapped = WINDOWS.clone()
    swapped[0, 0] += 1
    settings = {"dtype": "float32", "batch": 4}
    identities = [
        run_identity(llama, selected, WINDOWS, **settings),
        run_identity(tmp_path / "weights", selected, WINDOWS, **settings),
        run_identity(llama, selected[1:], WINDOWS, **settings),
        run_identity(llama, selected, swapped, **settings),
        run_identity(llama, selected, WINDOWS.reshape(20, 8), **settings),
        run_identity(llama, selected, WINDOWS, **{**settings, "dtype": "bfloat16"}),
        run_identity(llama, selected, WINDOWS, **{**settings, "batch": 2}),
    ]
    keys = [Checkpoint(tmp_path, identity, 1.0).key for identity in identities]
    assert len(set(keys)) == len(keys)
    again = run_identity(llama, selected, WINDOWS.clone(), **settings)
    assert Checkpoint(tmp_path, again, 1.0).key == keys[0]


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_told_with_their_site(
    llama: Path, tmp_path: Path, value: float
) -> None:
    selected = selected_of(llama)
    good = calibrate(load(llama), selected, WINDOWS, 4, never_saved(tmp_path))
    write_moments(tmp_path / "artifacts" / "moments", *good)
    before = contents(tmp_path / "artifacts")
    model = load(llama)
    with torch.no_grad():
        model.get_submodule("model.layers.1.post_attention_layernorm").weight[3] = value
    sites, sums = calibrate(model, selected, WINDOWS, 4, never_saved(tmp_path))
    with pytest.raises(CalibrationError) as raised:
        write_moments(tmp_path / "artifacts" / "moments", sites, sums)
    assert "The inputs of model.layers.1.mlp.gate_proj hold NaN or inf" in str(raised.value)
    assert f"after {WINDOWS.numel()} tokens" in str(raised.value)
    assert contents(tmp_path / "artifacts") == before


def test_a_selected_sublayer_that_never_runs_is_named(llama: Path, tmp_path: Path) -> None:
    model = load(llama)
    model.get_submodule("model.layers.2.mlp").register_module("idle", nn.Linear(32, 32))
    selected = selected_of(llama)
    idle = dataclasses.replace(selected[0], name="model.layers.2.mlp.idle", shape=(32, 32))
    with pytest.raises(CalibrationError, match=r"1 selected .* model\.layers\.2\.mlp\.idle among"):
        calibrate(model, [*selected, idle], WINDOWS, 4, never_saved(tmp_path))
