"""A model in coordinates that its layers have in common, as far as the exact gauge goes:

    python -m sharebasis.align artifacts/weights TARGET [--distances artifacts/variation.csv]

TARGET is the same model: heads and neurons of every layer are permuted, turned and scaled so that
they lie near those of another one, which no logit notices beyond rounding. It is a source
like any other, whose layers can share bases on the side of heads and neurons, too:

    dvc exp run -S model=local -S model.source=TARGET \
        -S 'fit.structures=[private,shared:2:inner]' -S 'fit.shared=[gate,up,down]'
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import networkx as nx
import torch
from transformers import PreTrainedModel

from sharebasis.errors import SelectionError
from sharebasis.gauge.alignment import Aligned, align
from sharebasis.gauge.layers import Layers
from sharebasis.gauge.tensors import ModelTensors
from sharebasis.io.atomic import writing
from sharebasis.io.manifest import MANIFEST
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_model, meta_model
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.progress import progress
from sharebasis.structures.layer_distances import LayerDistances, read_table


@torch.no_grad()
def align_layers(model: PreTrainedModel, distances: LayerDistances | None = None) -> None:
    """Bring every layer of a model to the coordinates of another one, in place.

    Attention and MLPs go their own ways. With distances those are along the tree of least
    distance that spans all layers, from the first one on: so layers that are each other's nearest
    are brought to each other directly. Without, each layer follows the one before it.

    Args:
        model: dense. Its logits stay as they are, to rounding.
        distances: of every two layers, by the families of a unit.

    Raises:
        SelectionError: a distance is missing.
    """
    classification = classify_model(meta_model(model.config))
    layers = Layers(ModelTensors(model), classification, model.config)
    steps = [
        (name, *pair)
        for name, numbers in _layers_of_units(layers).items()
        for pair in _steps(numbers, _families(layers, numbers[0], name), distances)
    ]
    with progress("align", len(steps), "layers") as advance:
        for name, first, second in steps:
            layer = layers.read(second)
            alignment = align(layer, layers.read(first), layers.freedom(second), "exact")
            gauges = {unit: gauge for unit, gauge in alignment.gauges.items() if unit == name}
            layers.write(model, second, Aligned(gauges)(layer))
            advance()


def _layers_of_units(layers: Layers) -> dict[str, list[int]]:
    """Unit (attention, MLP) -> the numbers of the layers that have it."""
    numbers: dict[str, list[int]] = {}
    for number in layers.numbers:
        for name in layers.read(number).units:
            numbers.setdefault(name, []).append(number)
    return numbers


def _families(layers: Layers, number: int, unit: str) -> list[str]:
    return list(layers.read(number).units[unit].families)


def _steps(
    numbers: Sequence[int], families: Sequence[str], distances: LayerDistances | None
) -> Iterator[tuple[int, int]]:
    """Pairs of layers, the second to be brought to the first, which is where it will be by then."""
    if distances is None:
        yield from pairwise(numbers)
        return
    graph = nx.Graph()
    graph.add_nodes_from(numbers)
    for pair in combinations(numbers, 2):
        try:
            length = sum(distances[family][pair] for family in families if family in distances)
        except KeyError:
            raise SelectionError(
                f"There is no distance between layers {pair[0]} and {pair[1]}. To align along the "
                "nearest ones, every two have to be measured: set vary.pairs=all and "
                "vary.layers=null."
            ) from None
        graph.add_edge(*pair, weight=length)
    yield from nx.bfs_edges(nx.minimum_spanning_tree(graph), numbers[0])


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a model in hub format")
    parser.add_argument("target", type=Path, help="where the aligned one goes, in float32")
    parser.add_argument("--distances", type=Path, help="what the stage vary wrote")
    arguments = parser.parse_args()
    distances = read_table(arguments.distances)["aligned"] if arguments.distances else None
    model = load_model(arguments.source, "float32", torch.device("cpu"))
    align_layers(model, distances)
    with writing(arguments.target) as out:
        for path in arguments.source.iterdir():
            if ".safetensors" not in path.name and path.name != MANIFEST:
                shutil.copyfile(path, out / path.name)
        model.save_pretrained(out)


if __name__ == "__main__":
    main()
