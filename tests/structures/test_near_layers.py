"""Layers that are near each other share, wherever they lie."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from gauges import layers_of, random_element
from sharing import (
    FOUR_LAYERS,
    WINDOWS,
    dense_logits,
    errors_of,
    loss_of_error,
    share_basis,
    sharing_settings,
    total_loss,
)
from small_pipeline import CPU, MakeSmallModel, SmallModel
from transformers import PreTrainedModel

from sharebasis import align
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.gauge.layers import Layers
from sharebasis.gauge.tensors import ModelTensors
from sharebasis.gauge.units import Layer
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.pipeline.compose import compose_settings
from sharebasis.stages.vary.tables import write_distances
from sharebasis.stages.vary.variation import measure_variation
from sharebasis.structures.layer_distances import read_table


def _plant_copies(model: PreTrainedModel) -> None:
    """Layers 0 and 2, and layers 1 and 3, are one and the same up to gauge; of low rank on the
    side of the stream are q and up."""
    for i in (0, 1):
        share_basis([model.get_submodule(f"model.layers.{i}.self_attn.q_proj")], 5, "input")
        share_basis([model.get_submodule(f"model.layers.{i}.mlp.up_proj")], 5, "input")
    layers = layers_of(model)
    for i in (0, 1):
        own = layers.read(i)
        units = {name: random_element(x, layers.freedom(i)) for name, x in own.units.items()}
        layers.write(model, i + 2, Layer(units, own.rest))


@pytest.fixture(scope="module")
def copies(small_model: MakeSmallModel) -> SmallModel:
    return small_model("llama", _plant_copies, **FOUR_LAYERS)


@pytest.fixture(scope="module")
def distances(copies: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage `vary` writes of the copies."""
    path = tmp_path_factory.mktemp("vary") / "variation.csv"
    model, config = load_model(copies.weights, "float32", CPU), load_config(copies.weights)
    found = classify_model(meta_model(config))
    settings = compose_settings(conf=REPOSITORY / "conf").vary

    def of_tensors(tensors: Any) -> Layers:
        return Layers(tensors, found, config)

    write_distances(path, measure_variation(ModelTensors(model), of_tensors, settings, 0))
    return path


def test_layers_that_are_near_are_found_wherever_they_lie(
    copies: SmallModel, distances: Path, tmp_path: Path
) -> None:
    by_family = read_table(distances)["aligned"]
    near = copies.fit(
        tmp_path / "near", _offering("by_distance:2", "[q,up]", 0.3), distances=by_family
    )
    pairs = {f"model.layers.{pair}.{name}" for pair in ("0+2", "1+3") for name in _LOW_RANK}
    assert {x.group.name for x in near.groups if x.group.structure == "by_distance:2"} == pairs
    assert all(x.rank >= 5 for x in near.groups if len(x.group.parts) == 2)
    adjacent = copies.fit(tmp_path / "adjacent", _offering("shared:2", "[q,up]", 0.3))
    assert total_loss(near) < 0.9 * total_loss(adjacent)
    fixed = copies.fit(tmp_path / "fixed", _by_distance(), distances=by_family)
    assert {x.group.name for x in fixed.groups if len(x.group.parts) > 1} == pairs
    for one in fixed.groups:
        if one.group.name in pairs:
            assert one.loss < 1e-5 * one.energy  # two weights of rank 5, and one basis


_LOW_RANK = ("self_attn.q_proj", "mlp.up_proj")


def _offering(structure: str, shared: str, removed: float) -> FitSettings:
    return sharing_settings(f"private,{structure}", removed, shared=shared)


def _by_distance() -> FitSettings:
    """What `fit=basis_sharing` makes of the distances."""
    overrides = ["fit=basis_sharing", "grouping=by_distance", "fit.shared=[q,up]"]
    return compose_settings(overrides, REPOSITORY / "conf").fit


def test_copies_share_on_the_inner_side_only_in_aligned_coordinates(
    copies: SmallModel,
    distances: Path,
    small_model: MakeSmallModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "aligned"
    paths = [str(copies.weights), str(target), "--distances", str(distances)]
    monkeypatch.setattr(sys, "argv", ["align", *paths])
    align.main()
    moved = load_model(target, "float32", CPU)
    with torch.no_grad():
        logits = moved(input_ids=WINDOWS[:4]).logits
    expected = dense_logits(copies)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())

    def plant(model: PreTrainedModel) -> None:
        model.load_state_dict(moved.state_dict())

    aligned = small_model("llama", plant, **FOUR_LAYERS)
    settings = _offering("by_distance:2:inner", "[gate,up,down]", 0.3)
    by_family = read_table(distances)["aligned"]
    fitted = {
        name: case.fit(tmp_path / name, settings, distances=by_family)
        for name, case in (("as they are", copies), ("in common", aligned))
    }
    of_pairs = {
        name: {x.group.name: x.group.side for x in own.groups if len(x.group.parts) == 2}
        for name, own in fitted.items()
    }
    assert of_pairs["in common"].items() >= {
        ("model.layers.0+2.mlp.gate_proj", "output"),
        ("model.layers.1+3.mlp.gate_proj", "output"),
        ("model.layers.0+2.mlp.down_proj", "input"),
        ("model.layers.1+3.mlp.down_proj", "input"),
    }
    assert not of_pairs["as they are"]
    assert total_loss(fitted["in common"]) < 0.8 * total_loss(fitted["as they are"])
    model = load_compressed(tmp_path / "in common/compressed")
    for one in fitted["in common"].groups:
        errors = errors_of(model, aligned)
        names = [part.sublayer.name for part in one.group.parts]
        loss = sum(loss_of_error(name, errors[name], aligned, settings) for name in names)
        assert one.loss == pytest.approx(loss, rel=1e-3, abs=1e-5 * one.energy)
