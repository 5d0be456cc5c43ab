"""Coefficients of a compressed model for its own inputs: what is best, what stays, after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
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
    name_of,
    products,
)
from small_pipeline import MakeSmallPipeline
from torch import Tensor

from sharebasis.compressed.index import StoredGroup
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.forms.low_rank import LowRank
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.model.hooks import watched
from sharebasis.stages.propagate.outcome import Propagation
from sharebasis.stages.propagate.propagate import propagation_identity

UPDATE = {"propagate.by": "update", "fit.storage": "plain"}
OWN = {"fit.method": "svd_llm", "fit.two_sided": False}


@pytest.fixture(scope="module")
def make(small_pipeline: MakeSmallPipeline) -> MakeCase:
    return maker(small_pipeline, UPDATE)


@pytest.fixture(scope="module")
def case(make: MakeCase) -> Case:
    return make("llama", SHARED)


def _factors(directory: Path) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Basis and coefficient of every part, by its name."""
    loaded = open_compressed(directory)
    factors = {}
    for group in loaded.index.groups:
        form = loaded.stored(group)
        if isinstance(form, LowRank):
            for part, coefficient in zip(group.parts, form.coefficients, strict=True):
                factors[name_of(part)] = form.basis, coefficient
    return factors


@torch.no_grad()
def _inputs(case: Case, group: StoredGroup) -> Tensor:
    """What the parts of a group are given in the compressed model, one below the other."""
    model = load_compressed(case.compressed)
    with watched({x.sublayer: model.get_submodule(x.sublayer) for x in group.parts}) as seen:
        model.base_model(input_ids=WINDOWS)
    return torch.cat([x.flatten(0, -2) for x in seen.values()]).double()


@pytest.mark.parametrize("changes", [SHARED, OWN], ids=["shared", "own"])
@torch.no_grad()
def test_coefficients_are_the_least_squares_of_the_groups_inputs(
    changes: Mapping[str, object], make: MakeCase, tmp_path: Path
) -> None:
    """By torch's own: (x Bᵀ) Aᵀ comes as near as can be to x Wᵀ, over all inputs of the group."""
    case = make("llama", changes)
    case.propagate(tmp_path / "out")
    after = _factors(tmp_path / "out")
    original = case.model.load()
    groups = [group for group in case.index.groups if group.rank is not None]
    assert any(len(group.parts) > 1 for group in groups) == (changes is SHARED)
    for group in groups:
        inputs = _inputs(case, group)
        for part in group.parts:
            basis, found = (factor.double() for factor in after[name_of(part)])
            weight = original.get_submodule(part.sublayer).weight.double()
            best = torch.linalg.lstsq(inputs @ basis.T, inputs @ weight.T).solution.T
            assert (found - best).norm() < 1e-4 * best.norm()


def test_bases_and_numbers_stay(case: Case, tmp_path: Path) -> None:
    case.propagate(tmp_path / "out")
    before, after = (_factors(directory) for directory in (case.compressed, tmp_path / "out"))
    for name, (basis, _) in before.items():
        torch.testing.assert_close(after[name][0], basis, rtol=1e-5, atol=1e-6)
    assert any((after[name][1] - own).norm() > 1e-3 for name, (_, own) in before.items())
    assert n_stored(tmp_path / "out") == n_stored(case.compressed)


def test_what_the_first_block_reads_is_already_the_best(make: MakeCase, tmp_path: Path) -> None:
    """Its inputs are the original's; those of what comes later are not."""
    case = make("llama", OWN)
    case.propagate(tmp_path / "out")
    before, after = products(case.compressed), products(tmp_path / "out")
    changed = {name for name in before if (before[name] - after[name]).norm() > 1e-3}
    reads = [f"model.layers.0.self_attn.{own}_proj.0" for own in "qkv"]
    for name in reads:
        torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=1e-4)
    assert changed == set(before) - set(reads)


def test_directions_without_input_stay_as_they_were(make: MakeCase, tmp_path: Path) -> None:
    """One token: whatever its inputs do not reach is not forgotten."""
    case = make("llama", OWN)
    name = "model.layers.1.mlp.up_proj"
    (group,) = (one for one in case.index.groups if one.name == name)
    case.propagate(tmp_path / "out", text=WINDOWS[:1, :1], windows=1)
    before, after = products(case.compressed), products(tmp_path / "out")
    moved = after[name_of(group.parts[0])] - before[name_of(group.parts[0])]
    assert moved.norm() > 1e-3
    assert torch.linalg.matrix_rank(moved, rtol=1e-3) == 1


def test_a_killed_run_goes_on(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = case.propagate(tmp_path / "whole")
    save, saved = Checkpoint.save, []

    def die(self: Checkpoint, *arguments: object) -> None:
        save(self, *arguments)  # type: ignore[arg-type]
        saved.append(self)
        raise Killed

    monkeypatch.setattr(Checkpoint, "save", die)
    weights, compressed, own = case.weights, case.compressed, case.settings
    identity = propagation_identity(weights, compressed, WINDOWS, own.propagate, own.fit)
    with pytest.raises(Killed):
        case.propagate(tmp_path / "killed", Checkpoint(tmp_path / "c", identity, 0.0))
    assert not (tmp_path / "killed").exists()
    monkeypatch.undo()
    assert case.propagate(tmp_path / "killed", Checkpoint(tmp_path / "c", identity, 99.0)) == wanted
    assert not (tmp_path / "c").exists()
    whole, killed = products(tmp_path / "whole"), products(tmp_path / "killed")
    for name, product in whole.items():
        torch.testing.assert_close(killed[name], product, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("better", [True, False])
def test_held_out_windows_decide_if_there_are_any(
    better: bool, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not better:
        monkeypatch.setattr("sharebasis.model.held_out.is_better", lambda *_: False)
    found = case.propagate(tmp_path / "out", windows=16, held_out=4)
    assert found.before == pytest.approx(divergence(case, case.compressed), rel=1e-4)
    before, after = products(case.compressed), products(tmp_path / "out")
    if found.refitted:
        assert found.after == pytest.approx(divergence(case, tmp_path / "out"), rel=1e-4)
    else:
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("family", "changes", "left"),
    [
        ("gpt2", {"split.strategy": "qkv", "fit.storage": "interpolative"}, 0),
        ("gpt2", {"split.strategy": "heads"}, 0),
        ("llama", SHARED, 0),
        ("mixtral", {}, 3 * 4 * 2),  # experts
        ("llama", {**NARROWED, "fit.storage": "interpolative"}, None),
    ],
)
def test_families_and_what_is_left(
    family: str, changes: Mapping[str, object], left: int | None, make: MakeCase, tmp_path: Path
) -> None:
    case = make(family, changes)
    found = case.propagate(tmp_path / "out")
    dense = sum(group.rank is None for group in case.index.groups)
    assert found.left == (dense if left is None else left)
    assert found.refitted > 0
    assert found.refitted + found.left == len(case.index.groups)
    assert n_stored(tmp_path / "out") == n_stored(case.compressed)
    record = load_record(tmp_path / "out" / "propagation.json", Propagation)
    assert record == found
