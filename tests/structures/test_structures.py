"""Of what may share, what gains by it is picked, and what is picked is what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import n_numbers
from sharing import (
    EVERY,
    FOUR_LAYERS,
    READS,
    WINDOWS,
    WRITES,
    dense_logits,
    errors_of,
    loss_of_error,
    share_basis,
    sharing_settings,
    total_loss,
)
from small_pipeline import CPU, MakeSmallModel, SmallModel
from transformers import PreTrainedModel

from sharebasis.allocation.choose import Pick
from sharebasis.compressed.index import load_index
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.spectra.store import Spectra
from sharebasis.stages.fit import fit as fitting
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.recover.outcome import Recovery
from sharebasis.stages.recover.recover import write_recovered
from sharebasis.stages.recover.trainable import trainable
from sharebasis.structures.curve import DENSE, factor_numbers


@pytest.fixture(scope="module")
def llama(small_model: MakeSmallModel) -> SmallModel:
    return small_model("llama", **FOUR_LAYERS)


# What is stored


@pytest.mark.parametrize("storage", ["plain", "interpolative"])
def test_the_loss_told_is_that_of_what_is_stored_and_so_is_the_count(
    storage: str, llama: SmallModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = sharing_settings(EVERY, storage=storage)
    llama.decompose(tmp_path / "spectra", settings)
    taken = _take(monkeypatch, {"shared:2": READS, "shared:3": WRITES}, rank=7)
    out = tmp_path / "out"
    fitted = fit(llama.weights, tmp_path / "spectra", settings, out, CPU, llama.moments)
    assert len(taken) == 7
    model = load_compressed(out)
    errors = errors_of(model, llama)
    for one in fitted.groups:
        loss = sum(
            loss_of_error(part.sublayer.name, errors[part.sublayer.name], llama, settings)
            for part in one.group.parts
        )
        assert one.loss == pytest.approx(loss, rel=1e-3, abs=1e-5 * one.energy)
        if one.rank is not None:
            assert one.loss > 1e-2 * one.energy
            assert one.n_stored == factor_numbers(one.group, one.rank, settings.storage)


def _take(
    monkeypatch: pytest.MonkeyPatch, wanted: Mapping[str, Sequence[str]], rank: int | None = None
) -> list[str]:
    """Let `fit` take, of every family, the first group of a structure, and the rest dense."""
    names: list[str] = []

    def chosen(source: Spectra, *_: object) -> Sequence[Pick]:
        (_, baseline), (_, offered), *_ = source.by_structure
        picks: list[Pick] = []
        covered: set[str] = set()
        for structure, families in wanted.items():
            for family in families:
                cell = next(
                    cell
                    for cell in offered
                    if (cell.cell.structure, cell.cell.family) == (structure, family)
                )
                names.append(cell.cell.name)
                covered |= {part.name for part in cell.cell.parts}
                picks.append((cell, rank or cell.cell.full_rank))
        rest = [cell for cell in baseline if cell.cell.parts[0].name not in covered]
        return [*picks, *((cell, DENSE) for cell in rest)]

    monkeypatch.setattr(fitting, "choose", chosen)
    return names


TAKEN = {
    "layers": {"shared:2": READS, "shared:3": WRITES},
    "all layers": {"shared:all": READS + WRITES},
    "within a layer": {"joint": ["fused"]},
    "layers, on the inner side": {"shared:2:inner": READS + WRITES},
}


@pytest.mark.parametrize("storage", ["plain", "interpolative"])
@pytest.mark.parametrize("wanted", TAKEN.values(), ids=TAKEN)
def test_at_full_rank_no_logit_changes_and_training_starts_from_there(
    wanted: Mapping[str, Sequence[str]],
    storage: str,
    llama: SmallModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = sharing_settings(f"{EVERY},shared:2:inner", storage=storage)
    llama.decompose(tmp_path / "spectra", settings)
    _take(monkeypatch, wanted)
    out = tmp_path / "out"
    fit(llama.weights, tmp_path / "spectra", settings, out, CPU, llama.moments)
    index = load_index(out)
    sides = {group.side for group in index.groups if "basis" in group.tensors}
    assert sides == ({"input"} if wanted is TAKEN["within a layer"] else {"input", "output"})
    expected = dense_logits(llama)
    scale = expected.abs().max().item()
    loaded = open_compressed(out)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model(input_ids=WINDOWS[:4]).logits, expected, rtol=0, atol=1e-4 * scale
        )
        forms = trainable(loaded)
        torch.testing.assert_close(
            loaded.model(input_ids=WINDOWS[:4]).logits, expected, rtol=0, atol=1e-4 * scale
        )
    write_recovered(tmp_path / "again", out, index, forms, Recovery(0, 0, 0, ()), 10_000)
    with torch.no_grad():
        torch.testing.assert_close(
            load_compressed(tmp_path / "again")(input_ids=WINDOWS[:4]).logits,
            expected,
            rtol=0,
            atol=2e-4 * scale,
        )
    assert n_numbers(tmp_path / "again") == n_numbers(out)


# What is picked


def _plant_layers(model: PreTrainedModel) -> None:
    """Layers 0 and 1 have a basis in common, for their writes and for k; layers 2 and 3 have
    none, but weights of the same rank."""
    for name, side in (
        ("self_attn.o_proj", "output"),
        ("mlp.down_proj", "output"),
        ("self_attn.k_proj", "input"),
    ):
        modules = [model.get_submodule(f"model.layers.{i}.{name}") for i in range(4)]
        share_basis(modules[:2], 5, side)
        share_basis(modules[2:3], 5, side)
        share_basis(modules[3:], 5, side)


def test_layers_that_share_are_found_and_unrelated_ones_stay_private(
    small_model: MakeSmallModel, tmp_path: Path
) -> None:
    case = small_model("llama", _plant_layers, **FOUR_LAYERS)
    settings = sharing_settings("private,shared:2,shared:3", 0.3, shared="[k,o,down]")
    fitted = case.fit(tmp_path / "both", settings)
    shared = {one.group.name for one in fitted.groups if one.group.structure == "shared:2"}
    planted = ("self_attn.o_proj", "mlp.down_proj", "self_attn.k_proj")
    assert shared == {f"model.layers.0-1.{name}" for name in planted}
    assert {one.group.structure for one in fitted.groups} == {"shared:2", "private"}
    alone = case.fit(tmp_path / "alone", sharing_settings("private", 0.3))
    assert total_loss(fitted) < 0.95 * total_loss(alone)
    assert 0.3 <= fit_metrics(fitted, settings)["removed_fraction"] < 0.31
    metrics = fit_metrics(fitted, settings)
    assert metrics["structures"]["shared:2"] == 3
    assert metrics["families"]["k"]["structures"] == {"private": 2, "shared:2": 1}
    assert {one["group"] for one in metrics["shared"]} == shared


def _plant_experts(model: PreTrainedModel) -> None:
    """The experts of layer 0 have a basis in common, on the side of the stream."""
    for layer in range(3):
        experts: Any = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for stack, side in ((experts.gate_up_proj, "input"), (experts.down_proj, "output")):
            wrapped = [torch.nn.Linear(*own.shape[::-1]) for own in stack]
            for run in [wrapped] if layer == 0 else [[own] for own in wrapped]:
                share_basis(run, 6, side)
            stack.copy_(torch.stack([own.weight for own in wrapped]))


def test_experts_that_share_are_found(small_model: MakeSmallModel, tmp_path: Path) -> None:
    case = small_model("mixtral", _plant_experts, WINDOWS, 6, num_local_experts=4)
    fitted = case.fit(tmp_path / "both", sharing_settings("private,experts", 0.75))
    shared = {one.group.name for one in fitted.groups if one.group.structure == "experts"}
    assert shared == {
        f"model.layers.0.mlp.experts.{name}.0-3" for name in ("gate_up_proj", "down_proj")
    }
    assert total_loss(fitted) < 0.9 * total_loss(
        case.fit(tmp_path / "alone", sharing_settings("private", 0.75))
    )


def test_more_structures_never_lose_more(llama: SmallModel, tmp_path: Path) -> None:
    every = (
        total_loss(llama.fit(tmp_path / str(n), sharing_settings(structures, 0.5)))
        for n, structures in enumerate(("private", "private,shared:2", EVERY))
    )
    alone, *others = every
    assert max(others) <= alone * (1 + 1e-12)


def test_without_moments_the_given_groups_are_taken(llama: SmallModel, tmp_path: Path) -> None:
    settings = sharing_settings(EVERY)
    llama.decompose(tmp_path / "spectra", settings)
    fitted = fit(llama.weights, tmp_path / "spectra", settings, tmp_path / "out", CPU, None)
    assert {one.group.structure for one in fitted.groups} == {"private"}


def test_private_alone_is_what_groups_of_one_are_to_the_last_bit(
    llama: SmallModel, tmp_path: Path
) -> None:
    settings = [sharing_settings("private"), sharing_settings("fixed", shared="[]")]
    fitted = [llama.fit(tmp_path / str(i), own) for i, own in enumerate(settings)]
    private, fixed = (tmp_path / str(i) for i in range(2))
    files = sorted(path.relative_to(private) for path in private.rglob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        assert (private / file).read_bytes() == (fixed / file).read_bytes()
    assert [one.loss for one in fitted[0].groups] == [one.loss for one in fitted[1].groups]


def test_a_limit_of_some_parts_keeps_them_from_sharing_with_others(
    small_model: MakeSmallModel, tmp_path: Path
) -> None:
    case = small_model("llama", _plant_layers, **FOUR_LAYERS)
    only = "[k,o,down]"
    settings = sharing_settings(
        "private,shared:2", 0.3, shared=only, exclude="['.*layers.0.mlp.down_proj']"
    )
    fitted = case.fit(tmp_path / "out", settings)
    shared = {one.group.name for one in fitted.groups if one.group.structure == "shared:2"}
    names = ("self_attn.o_proj", "self_attn.k_proj")
    assert shared == {f"model.layers.0-1.{name}" for name in names}
    (dense,) = (one for one in fitted.groups if one.group.name == "model.layers.0.mlp.down_proj")
    assert dense.form == "dense"
