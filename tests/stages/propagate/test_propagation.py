"""Blocks are refitted to their inputs: what that undoes, what it leaves, and after a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeSettings
from propagating import (
    NARROWED,
    SHARED,
    WINDOWS,
    Case,
    Killed,
    MakeCase,
    divergence,
    maker,
    n_stored,
    products,
)
from small_pipeline import MakeSmallPipeline, pruned
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sharebasis.compressed.index import StoredGroup, load_index
from sharebasis.compressed.loader import LoadedModel, load_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.config.refine import PropagateSettings
from sharebasis.data.windows import read_windows
from sharebasis.forms.form import Form
from sharebasis.forms.low_rank import LowRank
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.linalg.drift_regression import PairedMoment
from sharebasis.model.hooks import watched
from sharebasis.stages.propagate import block_regression
from sharebasis.stages.propagate.outcome import Propagation, write_unpropagated
from sharebasis.stages.propagate.propagate import propagation_identity, propagation_windows
from sharebasis.stages.propagate.refit import Refitter
from sharebasis.stages.propagate.refitted import Refitted


@pytest.fixture(scope="module")
def make(small_pipeline: MakeSmallPipeline) -> MakeCase:
    return maker(small_pipeline)


@pytest.fixture(scope="module")
def case(make: MakeCase) -> Case:
    return make()


@torch.no_grad()
def _drift(case: Case, directory: Path, blocks: int = 3) -> float:
    """The squared distance of the hidden states behind some blocks."""
    models = case.model.load(), load_compressed(directory)
    one, other = (
        model.model(input_ids=WINDOWS, output_hidden_states=True).hidden_states[blocks]
        for model in models
    )
    return ((one - other).square().sum() / one.square().sum()).item()


def test_what_the_first_block_reads_has_not_drifted(case: Case, tmp_path: Path) -> None:
    """Its regression is the weight itself, so the same fit comes out; later blocks change."""
    case.propagate(tmp_path / "out", amount=1.0)
    before, after = products(case.compressed), products(tmp_path / "out")
    changed = {name for name in before if (before[name] - after[name]).norm() > 1e-3}
    reads = [f"model.layers.0.self_attn.{own}_proj.0" for own in "qkv"]
    assert not changed & set(reads)
    for name in reads:
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-4)
    assert changed == {name for name in before if name not in reads}


def test_as_many_numbers_and_ranks_as_before(case: Case, tmp_path: Path) -> None:
    found = case.propagate(tmp_path / "out")
    index = load_index(tmp_path / "out")
    assert n_stored(tmp_path / "out") == n_stored(case.compressed)
    ranks = {group.name: (group.rank, group.tensors) for group in case.index.groups}
    assert {group.name: (group.rank, group.tensors) for group in index.groups} == ranks
    assert (found.refitted, found.left, len(found.distances)) == (21, 0, 3)


def test_the_stream_comes_closer_and_more_so_with_the_regression(
    case: Case, tmp_path: Path
) -> None:
    """By what the stage reports and by what a run of the models shows."""
    drift = {"before": _drift(case, case.compressed)}
    for name, amount in (("refit", 1e-9), ("half", 0.5)):
        found = case.propagate(tmp_path / name, amount=amount)
        drift[name] = _drift(case, tmp_path / name)
        assert 0 < found.distances[0] < found.distances[-1]
    assert drift["half"] < 0.97 * drift["refit"]
    assert drift["half"] < 0.97 * drift["before"]


def test_a_write_makes_up_for_what_the_stream_lacks(make: MakeCase, tmp_path: Path) -> None:
    """Without a metric of outputs, what is minimised is the squared error of the block's output."""
    case, drift = make("llama", {"fit.method": "svd_llm", "fit.two_sided": False}), []
    for stream in (0.0, 1.0):
        case.propagate(tmp_path / f"{stream}", amount=1.0, stream=stream)
        drift.append(_drift(case, tmp_path / f"{stream}", blocks=1))
    assert drift[1] < 0.98 * drift[0]


STREAMS = {"o": ("self_attn.o_proj", ""), "down": ("mlp.down_proj", ".post_attention_layernorm")}


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("write", STREAMS)
@torch.no_grad()
def test_what_the_stream_lacks_before_a_write(
    family: str, write: str, make: MakeCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the inputs of what reads the stream just there; granite adds half of what is written."""
    name, reader = STREAMS[write]
    case, pairs = make(family), {}
    problems = Refitter.problems

    def note(self: Refitter, group: StoredGroup, pair: PairedMoment) -> object:
        pairs[group.name] = pair
        return problems(self, group, pair)

    monkeypatch.setattr(Refitter, "problems", note)
    case.propagate(tmp_path / "out", stream=0.5)
    models = case.model.load(), load_compressed(tmp_path / "out")
    seen: list[dict[str, Tensor]] = []
    for model in models:
        wanted = {"stream": f"model.layers.1{reader}", "input": f"model.layers.1.{name}"}
        with watched({key: model.get_submodule(own) for key, own in wanted.items()}) as own:
            model.model(input_ids=WINDOWS)
        seen.append({key: tensor.flatten(0, 1).double() for key, tensor in own.items()})
    drift = (seen[0]["stream"] - seen[1]["stream"]) / (0.5 if family == "granite" else 1)
    expected = drift.T @ seen[1]["input"]
    found = pairs[f"model.layers.1.{name}"].drift
    assert (found - expected).norm() < 2e-3 * expected.norm()
    assert all(
        (pair.drift is None) == (not name.endswith(("o_proj", "down_proj")))
        for name, pair in pairs.items()
    )


LONG = torch.randint(0, 256, (64, 64), generator=torch.Generator().manual_seed(1))
"""So much text that the squares of a batch's stream add up to more than float16 holds."""


@pytest.mark.parametrize(
    ("family", "dtype", "text", "n_found"),
    [
        ("llama", "float16", LONG, 3 * 2),
        ("opt", "float32", WINDOWS, 3 * 2),  # its down puts out batch and window flat
        ("qwen2_moe", "float32", WINDOWS, 0),  # and so does a shared expert, which is weighed
    ],
)
def test_at_which_writes_the_drift_is_found(
    family: str,
    dtype: str,
    text: Tensor,
    n_found: int,
    make: MakeCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, look = [], block_regression.Propagator._drift_of

    def note(self: block_regression.Propagator, *others: Any) -> object:
        found.append(look(self, *others))
        return found[-1]

    monkeypatch.setattr(block_regression.Propagator, "_drift_of", note)
    own = {"windows": len(text), "window": text.shape[1], "batch": len(text)}
    make(family).propagate(tmp_path / "out", text=text, stream=0.5, dtype=dtype, **own)
    assert sum(drift is not None for drift in found) == n_found


def test_what_is_excluded_stays(make: MakeCase, tmp_path: Path) -> None:
    case = make("llama", {"fit.exclude": [r".*layers\.1\..*"]})
    for by, checkpoint in (("regression", "one"), ("update", "two")):
        never = Checkpoint(tmp_path / checkpoint, {}, math.inf)
        case.propagate(tmp_path / by, never, by=by, stream=0.5)
        before, after = products(case.compressed), products(tmp_path / by)
        same = {name for name in before if torch.equal(before[name], after[name])}
        assert same == {name for name in before if "layers.1." in name}
        assert len(same) == 7


def test_a_block_that_norms_what_it_writes_is_only_regressed(
    make: MakeCase, tmp_path: Path
) -> None:
    case = make("gemma2")
    for name, stream in (("plain", 0.0), ("stream", 0.5)):
        case.propagate(tmp_path / name, stream=stream)
    plain, stream = products(tmp_path / "plain"), products(tmp_path / "stream")
    for name, product in plain.items():
        torch.testing.assert_close(stream[name], product, rtol=0, atol=0)


def test_a_killed_run_goes_on_to_the_same_end(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = case.propagate(tmp_path / "whole")
    passed: list[int] = []
    pass_block = block_regression.Propagator.pass_block

    def count(self: block_regression.Propagator, i: int, *others: Any) -> object:
        if passed == [0, 1]:
            raise Killed
        passed.append(i)
        return pass_block(self, i, *others)

    monkeypatch.setattr(block_regression.Propagator, "pass_block", count)
    weights, compressed = case.weights, case.compressed
    settings = case.settings
    own = propagation_identity(weights, compressed, WINDOWS, settings.propagate, settings.fit)
    with pytest.raises(Killed):
        case.propagate(tmp_path / "killed", Checkpoint(tmp_path / "c", own, 0.0))
    assert not (tmp_path / "killed").exists()
    passed.clear()
    assert case.propagate(tmp_path / "killed", Checkpoint(tmp_path / "c", own, 0.0)) == wanted
    assert passed == [2]
    assert not (tmp_path / "c").exists()
    whole, killed = products(tmp_path / "whole"), products(tmp_path / "killed")
    for name, product in whole.items():
        torch.testing.assert_close(killed[name], product, rtol=0, atol=0)


@pytest.mark.parametrize("better", [True, False])
@torch.no_grad()
def test_what_held_out_windows_do_not_like_is_not_kept(
    better: bool, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refit that damages the last layer is worse than none; both divergences are the models'."""
    add = Refitted.add

    def damage(self: Refitted, model: LoadedModel, group: StoredGroup, form: Form) -> None:
        if group.name == "model.layers.2.mlp.down_proj":
            assert isinstance(form, LowRank)
            form = replace(form, coefficients=tuple(-3.0 * own for own in form.coefficients))
        add(self, model, group, form)

    if not better:
        monkeypatch.setattr(Refitted, "add", damage)
    found = case.propagate(tmp_path / "out", windows=16, held_out=4)
    assert found.before == pytest.approx(divergence(case, case.compressed), rel=1e-4)
    assert found.before is not None
    assert found.after is not None
    before, after = products(case.compressed), products(tmp_path / "out")
    if better:
        assert found.after < found.before
        assert found.after == pytest.approx(divergence(case, tmp_path / "out"), rel=1e-4)
        assert found.refitted == 21
    else:
        assert found.after > found.before
        assert (found.refitted, found.left) == (0, 21)
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_amount_is_another_run(case: Case) -> None:
    weights, compressed = case.weights, case.compressed
    own = case.settings.propagate

    def identity(settings: PropagateSettings, fit: FitSettings = case.settings.fit) -> object:
        return propagation_identity(weights, compressed, WINDOWS, settings, fit)

    assert identity(own) != identity(replace(own, amount=0.5))
    assert identity(own) == identity(replace(own, checkpoint_seconds=9.0))
    assert identity(own) != identity(own, replace(case.settings.fit, exclude=("lm_head",)))


@pytest.mark.parametrize(
    ("family", "changes", "left"),
    [
        ("gpt2", {"split.strategy": "qkv"}, 0),
        ("gpt2", {"split.strategy": "heads", "fit.storage": "plain"}, 0),
        ("falcon", {}, 0),
        ("gemma2", {"fit.method": "svd", "fit.two_sided": False}, 0),
        # q, k, v, gate and up of two of the three layers share.
        ("llama", SHARED, 5),
        ("mixtral", {}, 3 * 4 * 2),  # experts
        ("llama", NARROWED, 0),
        ("opt", NARROWED, 0),
    ],
)
def test_families_and_what_is_left(
    family: str, changes: Mapping[str, object], left: int, make: MakeCase, tmp_path: Path
) -> None:
    case = make(family, changes)
    found = case.propagate(tmp_path / "out")
    assert found.left == left
    assert found.refitted > 0
    before, after = products(case.compressed), products(tmp_path / "out")
    assert any((before[name] - after[name]).norm() > 1e-3 for name in before)
    assert n_stored(tmp_path / "out") == n_stored(case.compressed)
    index = load_index(tmp_path / "out")
    assert index.edits == case.index.edits
    assert bool(pruned(index)) == (changes is NARROWED)


def test_the_windows_are_the_first_of_the_calibration_text(
    make_settings: MakeSettings, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("a basis shared by many layers " * 60)
    settings = make_settings(
        {
            "data.source": "files",
            "data.calibration.path": str(tmp_path / "text"),
            "data.evaluation.path": "nowhere.txt",  # never read
            "data.calibration.windows": 4,
            "data.window": 16,
            "propagate.windows": 2,
            "propagate.held_out": 1,
            "propagate.window": 16,
        }
    )
    own = propagation_windows(tokenizer, settings.data, settings.propagate, 0)
    whole = read_windows(tokenizer, settings.data, "calibration", 0)
    assert torch.equal(own, whole[:3])


def test_left_out_it_says_so(tmp_path: Path) -> None:
    write_unpropagated(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["propagation.json"]
    assert load_record(tmp_path / "out" / "propagation.json", Propagation) == Propagation(0, 0, ())
