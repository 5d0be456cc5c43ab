"""The variation of a whole model: pairs, statistics, the random model beside it, figures."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, SIZES, MakeDirectory, random_model, with_changes
from gauges import layers_of, random_element
from transformers import PreTrainedModel

from sharebasis.config.analyse import Alignment, VarySettings
from sharebasis.errors import SelectionError, StoreError
from sharebasis.gauge.alignment import distances
from sharebasis.gauge.layers import Layers
from sharebasis.gauge.tensors import ModelTensors
from sharebasis.gauge.units import Layer
from sharebasis.io.records import save_record
from sharebasis.linalg.rows import Rows
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, meta_model
from sharebasis.runtime import threads
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.vary import variation as over_a_model
from sharebasis.stages.vary.figures import matrices, over_depth
from sharebasis.stages.vary.tables import variation_metrics, write_distances
from sharebasis.stages.vary.variation import Shuffled, Variation, measure_variation
from sharebasis.structures.layer_distances import read_table

ALL = VarySettings("exact", "all", None)
LLAMA = {"q", "k", "v", "o", "gate", "up", "down", "input_layernorm", "post_attention_layernorm"}


def measured(model: PreTrainedModel, settings: VarySettings = ALL, seed: int = 0) -> Variation:
    found = classify_model(meta_model(model.config))
    of_tensors = partial(Layers, classification=found, config=model.config)
    return measure_variation(ModelTensors(model), of_tensors, settings, seed)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """Four layers; the third is the second in other coordinates. Not to be changed."""
    model = random_model("llama", 288, num_hidden_layers=4)
    layers = layers_of(model)
    torch.manual_seed(1)
    second = layers.read(1)
    units = {name: random_element(x, layers.freedom(1)) for name, x in second.units.items()}
    layers.write(model, 2, Layer(units, second.rest))
    for name in ("input_layernorm", "post_attention_layernorm"):
        norms = [layer.get_submodule(name).weight for layer in model.model.layers]
        norms[2].data.copy_(norms[1].data)
    return model


@pytest.fixture(scope="module")
def of_llama(llama: PreTrainedModel) -> Variation:
    return measured(llama)


def test_every_two_layers_are_measured_and_the_copy_is_found(of_llama: Variation) -> None:
    assert list(of_llama.measured) == list(combinations(range(4), 2))
    assert list(of_llama.random) == of_llama.consecutive == list(pairwise(range(4)))
    assert set(of_llama.families) == LLAMA
    for family in LLAMA:
        matrix = of_llama.matrix(family)
        assert np.array_equal(matrix, matrix.T)
        assert np.diag(matrix).tolist() == [0.0] * 4
        assert matrix[1, 2] < 1e-6  # float32
        assert matrix[np.triu_indices(4, 1)].argmin() == 3  # of (1, 2)
    for family in LLAMA - {"input_layernorm", "post_attention_layernorm"}:
        assert of_llama.measured[1, 2].unaligned[family] > 1
        assert of_llama.over_depth(family)["random"][1] > 0.8


def test_a_pair_is_measured_as_by_itself(llama: PreTrainedModel, of_llama: Variation) -> None:
    layers = layers_of(llama)
    alone = distances(layers.read(3), layers.read(0), layers.freedom(3), "exact")
    assert of_llama.measured[0, 3].aligned == pytest.approx(alone.aligned, abs=1e-6)


def test_random_weights_are_far_from_each_other_and_change_with_the_seed(
    llama: PreTrainedModel, of_llama: Variation
) -> None:
    again, other = measured(llama), measured(llama, seed=1)
    assert again == of_llama
    assert other.measured == of_llama.measured
    assert other.random != of_llama.random


@pytest.mark.parametrize("rows", [None, Rows(2, 3), Rows(1, 1, 3, 2)])
def test_shuffled_tensors_have_the_same_numbers(llama: PreTrainedModel, rows: Rows | None) -> None:
    tensors = ModelTensors(llama)
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (of.read(name, rows) for of in (tensors, Shuffled(tensors, 0)))
    assert before.shape == after.shape
    assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    assert not torch.equal(before, after)
    assert not torch.equal(after, Shuffled(tensors, 1).read(name, rows))
    assert Shuffled(tensors, 0).names == tensors.names


@pytest.mark.parametrize("alignment", get_args(Alignment))
def test_an_alignment_is_what_the_settings_say(
    llama: PreTrainedModel, alignment: Alignment
) -> None:
    found = measured(llama, replace(ALL, alignment=alignment, pairs="consecutive"))
    assert list(found.measured) == list(pairwise(range(4)))
    copy = found.measured[1, 2]
    assert {
        "none": copy.aligned == copy.unaligned,
        "exact": copy.aligned["q"] < 1e-6,
        "tied": 1e-3 < copy.aligned["q"] < copy.unaligned["q"],
    }[alignment]
    assert np.isnan(found.matrix("q")[0, 2])


def test_a_range_of_layers_is_measured_alone(llama: PreTrainedModel, of_llama: Variation) -> None:
    found = measured(llama, replace(ALL, layers=(1, 3)))
    assert found.layers == [1, 2, 3]
    for pair in combinations((1, 2, 3), 2):
        assert found.measured[pair] == of_llama.measured[pair]
    with pytest.raises(SelectionError, match=r"vary.layers=\[3, 7\] leaves 1 of the layers 0 to 3"):
        measured(llama, replace(ALL, layers=(3, 7)))
    beyond = r"vary.layers=\[1, 7\] goes beyond the layers, which are 0 to 3"
    with pytest.raises(SelectionError, match=beyond):
        measured(llama, replace(ALL, layers=(1, 7)))


def test_large_layers_go_one_pair_after_the_other_with_the_same_result(
    llama: PreTrainedModel, of_llama: Variation, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    executor = threads.ThreadPoolExecutor
    monkeypatch.setattr(threads, "ThreadPoolExecutor", lambda n: (used.append(n), executor(n))[1])
    torch.set_num_threads(2)
    try:
        assert measured(llama).measured == of_llama.measured
        assert used == [2]
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(over_a_model, "SMALL", 0)
        assert measured(llama).measured[0, 1].aligned == pytest.approx(
            of_llama.measured[0, 1].aligned, rel=1e-5
        )
        assert used == [2]
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("name", SIZES)
def test_every_family_is_measured(name: str) -> None:
    found = measured(random_model(name, 288))
    assert {"down", "up", "o"} <= set(found.families)
    has_gains = any("norm" in family or "ln" in family for family in found.families)
    assert has_gains == (name != "olmo")
    assert found.layers == [0, 1, 2, 3][: len(found.layers)]
    for pair in found.measured.values():
        for family, aligned in pair.aligned.items():
            assert 0 <= aligned <= pair.unaligned[family] <= 2
    closer = found.measured[0, 1]
    if name not in ("deepseek_v2", "deepseek_v3"):  # whose first MLP is unlike the others
        assert closer.aligned["up"] < closer.unaligned["up"]
        assert closer.aligned["v"] < closer.unaligned["v"]
        assert found.families == list(closer.aligned)
    else:
        assert "up" not in closer.aligned
        assert found.measured[1, 2].aligned["up"] < found.measured[1, 2].unaligned["up"]


# What is written


def test_distances_are_read_as_they_were_written(of_llama: Variation, tmp_path: Path) -> None:
    write_distances(tmp_path / "vary.csv", of_llama)
    columns = read_table(tmp_path / "vary.csv")
    for family in of_llama.families:
        for pair, apart in of_llama.measured.items():
            assert columns["unaligned"][family][pair] == apart.unaligned[family]
            assert columns["aligned"][family][pair] == apart.aligned[family]
        random = {pair: apart.aligned[family] for pair, apart in of_llama.random.items()}
        assert columns["random"][family] == random


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; run the stage that writes it"),
        ("first,second\n1,2\n", "is no table of distances"),
        ("first,second,family,unaligned,aligned,random\n1,x,q,1,1,1\n", "is no table of distances"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "vary.csv").write_text(content)
    with pytest.raises(StoreError, match=rf"vary.csv {message}"):
        read_table(tmp_path / "vary.csv")


def test_metrics_are_the_statistics_of_consecutive_layers(of_llama: Variation) -> None:
    metrics = variation_metrics(of_llama, ALL)
    means = {}
    for family, found in metrics["families"].items():
        values = np.array([of_llama.measured[i, i + 1].aligned[family] for i in range(3)])
        others = {
            "unaligned_mean": [of_llama.measured[i, i + 1].unaligned[family] for i in range(3)],
            "random_mean": [of_llama.random[i, i + 1].aligned[family] for i in range(3)],
        }
        assert found == pytest.approx(
            {
                "mean": values.mean(),
                "min": values.min(),
                "max": values.max(),
                "std": values.std(),
                "count": 3,
                **{name: np.mean(own) for name, own in others.items()},
            }
        )
        means[family] = values.mean()
    assert metrics["ranking"] == sorted(means, key=lambda family: means[family])
    assert metrics["n_units_left"] == 0
    assert metrics["n_pairs"] == 6


# Figures


@pytest.mark.parametrize("draw", [matrices, over_depth])
def test_a_figure_says_what_it_shows(of_llama: Variation, draw: Callable[..., Any]) -> None:
    figure = draw(of_llama, "exact")
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert set(panels) == LLAMA
    assert "alignment: exact" in figure.get_suptitle()
    for family, axes in panels.items():
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        if draw is over_depth:
            shown = {str(line.get_label()): line.get_ydata() for line in axes.lines}
            assert shown["after alignment"].tolist() == of_llama.over_depth(family)["aligned"]
            assert len(shown) == 3
        else:
            (image,) = axes.images
            wanted = of_llama.matrix(family)
            assert image.colorbar.ax.get_ylabel() == "distance"
            assert np.array_equal(image.get_array().filled(np.nan)[0, 1:], wanted[0, 1:])
            assert image.get_array().mask.diagonal().all()  # a layer and itself


def test_the_stage_writes_metrics_table_and_figures(
    params: Mapping[str, Any],
    make_directory: MakeDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / "artifacts" / "weights"
    extract(find_source(str(make_directory("gpt2"))), weights)
    found = classify_model(meta_model(load_config(weights)))
    save_record(tmp_path / "artifacts" / "sublayers.json", found)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(with_changes(params, {})))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(REPOSITORY / "stages" / "vary.py"), run_name="__main__")
    metrics = json.loads(Path("metrics/vary.json").read_text())
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[1]: line[3] for line in table if len(line) > 3 and line[1] in metrics["families"]}
    assert list(rows) == metrics["ranking"]
    assert rows["q"] == f"{metrics['families']['q']['mean']:.3f}"
    assert set(metrics["ranking"]) == {"q", "k", "v", "o", "up", "down", "ln_1", "ln_2"}
    assert len(read_table(Path("artifacts/variation.csv"))["aligned"]["q"]) == 3
    figures = sorted(Path("plots/vary").iterdir())
    assert [path.name for path in figures] == ["depth.png", "matrices.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
