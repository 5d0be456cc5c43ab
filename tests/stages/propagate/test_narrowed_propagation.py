"""MLPs with fewer neurons are refitted to their inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from propagating import NARROWED, WINDOWS, Case, MakeCase, maker, n_stored, name_of, products
from small_pipeline import MakeSmallPipeline, pruned
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.compressed.loader import load_compressed
from sharebasis.model.hooks import watched


@pytest.fixture(scope="module")
def make(small_pipeline: MakeSmallPipeline) -> MakeCase:
    return maker(small_pipeline)


@pytest.fixture(scope="module")
def narrowed(make: MakeCase) -> Case:
    return make("gpt2", NARROWED)


@torch.no_grad()
def test_neurons_that_are_left_say_what_all_of_them_said(narrowed: Case, tmp_path: Path) -> None:
    """A down that is stored as it is: torch's own least squares, of what both models ran."""
    narrowed.propagate(tmp_path / "out", amount=1.0, damping=0.0, mean=False)
    dense = {group.parts[0].sublayer for group in narrowed.index.groups if group.form == "dense"}
    downs = [mlp.down for mlp in pruned(narrowed.index) if mlp.down in dense]
    assert downs
    models = (
        narrowed.model.load(),
        load_compressed(tmp_path / "out"),
    )
    for name in downs:
        seen = []
        for model in models:
            with watched({name: model.get_submodule(name)}) as own:
                model.base_model(input_ids=WINDOWS)
            seen.append(own[name].flatten(0, 1).double())
        said = seen[0] @ models[0].get_submodule(name).weight.double()
        best = torch.linalg.lstsq(seen[1], said).solution.T
        found = models[1].get_submodule(name).weight.double()
        assert found.shape[1] < seen[0].shape[1]
        assert (found - best).norm() < 1e-3 * best.norm()


@pytest.mark.parametrize(
    ("family", "split", "least"),
    [
        ("gpt2", "none", "c_proj.dense"),
        ("phi3", "none", "gate_up_proj.dense"),
        ("phi3", "qkv", "gate_up_proj.up.dense"),
    ],
)
def test_without_drift_neurons_that_are_left_stay_what_they_were(
    family: str, split: str, least: str, make: MakeCase, tmp_path: Path
) -> None:
    """At next to no amount, what is written is what `fit` took gate, up and down to be."""
    case = make(family, {**NARROWED, "fit.removed": 0.2, "split.strategy": split})
    case.propagate(tmp_path / "out", amount=1e-9, mean=False)
    before, after = products(case.compressed), products(tmp_path / "out")
    narrowed = {name for mlp in pruned(case.index) for name in (*mlp.reads, mlp.down)}
    parts = [part for group in case.index.groups if group.form == "dense" for part in group.parts]
    dense = {part.tensors["dense"]: name_of(part) for part in parts if part.sublayer in narrowed}
    assert any(tensor.endswith(least) for tensor in dense)
    for name in dense.values():
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", ["attn.c_attn", "mlp.c_fc", "mlp.c_proj"])
@torch.no_grad()
def test_a_bias_keeps_the_mean_of_what_is_put_out(
    last: str, narrowed: Case, make: MakeCase, tmp_path: Path
) -> None:
    case = narrowed
    if last == "attn.c_attn":
        case, name = make("gpt2", {"split.strategy": "qkv"}), f"transformer.h.2.{last}"
    else:
        (name, *_) = (
            one
            for mlp in pruned(case.index)
            for one in (*mlp.reads, mlp.down)
            if one.endswith(last)
        )
    kept = next((list(mlp.kept) for mlp in pruned(case.index) if name in mlp.reads), ...)
    model = case.model.load()

    def mean(one: PreTrainedModel) -> Tensor:
        with watched({name: one.get_submodule(name)}) as seen:
            one.base_model(input_ids=WINDOWS)
        found = one.get_submodule(name)(seen[name]).flatten(0, 1).mean(0)
        return found[kept] if one is model else found

    off = []
    for keeps in (False, True):
        case.propagate(tmp_path / f"{keeps}", mean=keeps)
        off.append((mean(load_compressed(tmp_path / f"{keeps}")) - mean(model)).norm())
    assert off[1] < 1e-3 * off[0]
    assert n_stored(tmp_path / "True") == n_stored(case.compressed)
