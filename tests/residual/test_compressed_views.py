"""A model that is wrapped or compressed has the views of its products."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, MakeDirectory, MakeSettings, fit_at_once
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from viewing import assert_same, everything, model_of

from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.loader import load_compressed
from sharebasis.forms.low_rank import LowRank
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_model
from sharebasis.model.surgery import wrap, wrapped
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source

LAYOUTS = ("gpt2", "gpt_neox", "falcon", "codegen", "phi3", "gpt_oss")
"""Of fused weights, one each."""
STRATEGIES = ("none", "qkv", "heads")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", [*LAYOUTS, "deepseek_v3"])
def test_a_wrapped_model_has_the_same_views(family: str, strategy: Any) -> None:
    model = model_of(family)
    found = classify_model(model)
    before = everything(model, found)
    with wrapped(model, rows_by_sublayer(split_selected(found, strategy))):
        assert_same(everything(model), before)


@torch.no_grad()
def compressed(
    model: PreTrainedModel, found: Classification, strategy: Any, rank: int = 3
) -> PreTrainedModel:
    """A model with factors of its own in the place of every part."""
    model = copy.deepcopy(model)
    for module in wrap(model, rows_by_sublayer(split_selected(found, strategy))).values():
        basis = torch.randn(rank, module.in_features)
        factors = LowRank(basis, tuple(torch.randn(p.out_features, rank) for p in module.parts))
        for part, form in zip(module.parts, factors.modules(), strict=True):
            part.compress(form)
    return model


@torch.no_grad()
def with_products(dense: PreTrainedModel, small: PreTrainedModel) -> PreTrainedModel:
    """The dense model with the weights of a compressed one, as its modules answer unit vectors."""
    unstack(dense)
    for name, module in list(dense.named_modules()):
        other = small.get_submodule(name)
        if isinstance(module, nn.Linear | Conv1D) and type(other) is not type(module):
            columns = other(torch.eye(other.in_features))
            columns = columns if other.bias is None else columns - other.bias
            assert other.state == "compressed"
            module.weight.copy_(columns if isinstance(module, Conv1D) else columns.T)
    return dense


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *((family, "heads") for family in SIZES),
        *((family, strategy) for family in LAYOUTS for strategy in ("none", "qkv")),
    ],
)
def test_a_compressed_model_has_the_views_of_its_products(family: str, strategy: Any) -> None:
    dense = model_of(family)
    found = classify_model(dense)
    before = {name: x.clone() for name, x in everything(dense, found).items()}
    small = compressed(dense, found, strategy)
    views = everything(small)
    assert_same(views, everything(with_products(dense, small), found), tolerance=2e-5)
    kept = {name for name, x in views.items() if torch.equal(x, before[name])}
    assert kept == {name for name in views if name.rpartition(".")[2].startswith("b_")}


def test_some_parts_may_be_compressed_and_others_not() -> None:
    model = model_of("gpt_neox")
    before = everything(model)
    fused = "gpt_neox.layers.1.attention.query_key_value"
    parts = split_selected(classify_model(model), "heads")
    module = wrap(model, rows_by_sublayer(parts))[fused]
    labels = [part.label for part in parts if part.sublayer.name == fused]
    basis, coefficient = torch.randn(2, 32), torch.randn(8, 2)
    part: ShareLinear = module.parts[labels.index("k.head3")]
    part.compress(LowRank(basis, (coefficient,)).modules()[0])
    after = everything(model)
    changed = [name for name, x in after.items() if not torch.equal(x, before[name])]
    assert changed == ["1.W_K"]
    assert torch.equal(after["1.W_K"][:3], before["1.W_K"][:3])
    torch.testing.assert_close(after["1.W_K"][3], (coefficient @ basis).T)


def test_a_compressed_model_from_disk_has_views(
    make_directory: MakeDirectory, make_settings: MakeSettings, tmp_path: Path
) -> None:
    extract(find_source(str(make_directory("gpt2"))), tmp_path / "weights")
    dense = load_model(tmp_path / "weights", "float32", torch.device("cpu"))
    parts = split_selected(classify_model(dense), "heads")
    settings = make_settings({"fit.method": "svd", "fit.group_size": 1, "fit.shared": []}).fit
    write_moments(tmp_path / "moments", (), {})
    moments = MomentStore(tmp_path / "moments")
    fit_at_once(tmp_path / "weights", parts, moments, settings, tmp_path / "small")
    small = load_compressed(tmp_path / "small")
    views = everything(small)
    assert_same(views, everything(with_products(dense, small)), tolerance=2e-5)
    assert views["2.W_Q"].shape == (4, 32, 8)
