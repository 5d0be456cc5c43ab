"""What it is worth to share a basis over two layers: which layers, on which side, how aligned?

    python benchmarks/aligned_sharing.py [--weights artifacts/weights --moments artifacts/moments
        --distances artifacts/variation.csv --removed 0.2 0.4 --pairs 6]

For every family: the loss of pairs of layers that share a basis, as a fraction of what the same
layers lose alone at as many stored numbers (interpolative form; the loss to second order, in the
metric of `fit=auto`). Pairs are adjacent layers, or those of the partition by distance. The basis
lies on the side of the residual stream, or on the inner one, of heads and neurons: there with the
second layer as it is, or moved to the first one's coordinates by the exact gauge, its moments with
it. Of as many pairs as asked for, spread over the depth; in brackets, in how many sharing wins.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sharebasis.allocation.lagrangian import allocate
from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part, split_selected
from sharebasis.architecture.roles import FAMILIES
from sharebasis.gauge.alignment import Aligned, act, align
from sharebasis.gauge.layers import Layers
from sharebasis.gauge.units import Layer, Unit
from sharebasis.linalg.exact_cover import Cover
from sharebasis.linalg.objective import Problem
from sharebasis.linalg.shared_basis import energies, pooled_basis
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, meta_model
from sharebasis.model.part_weights import read_part
from sharebasis.moments.problems import Problems
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compose import compose_settings
from sharebasis.pipeline.paths import MOMENTS, VARIATION, WEIGHTS
from sharebasis.pipeline.stage import report_errors
from sharebasis.structures.curve import Curve, curve_of
from sharebasis.structures.groups import nearest
from sharebasis.structures.layer_distances import LayerDistances, read_table
from sharebasis.structures.shared import side_of

CPU = torch.device("cpu")
WAYS = ("residual side", "inner side", "inner side, aligned")
Line = Sequence[Part]
"""The same part of all layers."""


def action(unit: Unit, aligned: Aligned, name: str, family: str) -> Tensor:
    """T of W -> T W, rows being heads or neurons: what the gauge makes of the identity."""
    width = max(x.flatten(0, -2).shape[0] for x in unit.families.values())
    eyes = {
        own: torch.eye(x.flatten(0, -2).shape[0], width).to(x).view(*x.shape[:-1], width)
        for own, x in unit.families.items()
    }
    turned = act(replace(unit, **eyes), aligned.gauges[name])
    rows = turned.families[family].flatten(0, -2)
    return rows[:, : len(rows)].double()


def moved(problem: Problem, turn: Tensor) -> Problem:
    """On the inner side: the weight's columns move by T, the moment there by its inverse."""
    back = torch.linalg.inv(turn)
    total = back.T @ problem.input_moment.total @ back
    inputs = replace(problem.input_moment, total=total, sum=problem.input_moment.sum @ back)
    return replace(problem, weight=problem.weight @ turn.T, inputs=inputs)


def curve(group: Group, problems: Sequence[Problem]) -> Curve:
    saved = energies(problems, pooled_basis(problems)).clamp_min(0)
    return curve_of(group, saved[: group.full_rank].numpy(), "interpolative")


@dataclass(frozen=True)
class Model:
    dense: DenseWeights
    problems: Problems
    layers: Layers

    def of(self, group: Group) -> Sequence[Problem]:
        found = self.problems.of(group, [read_part(self.dense, part) for part in group.parts])
        assert found is not None  # calibration has seen it
        return found

    def alone(self, part: Part) -> Curve:
        group = Group((part,), side_of(part, inner=False))  # either side gives the optimum
        return curve(group, self.of(group))

    def together(self, pair: Line) -> Iterator[Curve]:
        """In each of the ways."""
        for inner in (False, True):
            group = Group(tuple(pair), side_of(pair[0], inner))
            problems = self.of(group)
            yield curve(group, problems)
        first, second = problems
        yield curve(group, [first, moved(second, self.turn(pair))])

    def turn(self, pair: Line) -> Tensor:
        first, second = (part.sublayer.layer for part in pair)
        family, (layer, aligned) = pair[0].family, alignment(self.layers, first, second)
        name, unit = next((x, own) for x, own in layer.units.items() if family in own.families)
        return action(unit, aligned, name, family)


@cache
def alignment(layers: Layers, first: int, second: int) -> tuple[Layer, Aligned]:
    """What brings the second layer to the first one's coordinates."""
    layer = layers.read(second)
    return layer, align(layer, layers.read(first), layers.freedom(second), "exact")


def pairs_of(line: Line, distances: LayerDistances) -> Mapping[str, Sequence[Line]]:
    adjacent = [line[i : i + 2] for i in range(0, len(line) - 1, 2)]
    by_distance = [pair for pair in nearest(line, 2, distances) if len(pair) == 2]
    return {"adjacent": adjacent, "by distance": by_distance}


def mean_distance(pairs: Sequence[Line], distances: Mapping[tuple[int, int], float]) -> float:
    """Of all pairs, as `vary` measures it: 0 to 2, √2 for random weights."""
    layers = ((first.sublayer.layer, second.sublayer.layer) for first, second in pairs)
    return sum(distances[pair] for pair in layers) / len(pairs)


def spread(pairs: Sequence[Line], n: int) -> Sequence[Line]:
    places = torch.linspace(0, len(pairs) - 1, min(n, len(pairs))).round().long()
    return [pairs[i] for i in places.tolist()]


def least(curves: Sequence[Curve], removed: float) -> float:
    cover = Cover([frozenset([i]) for i in range(len(curves))])
    entries = allocate(curves, cover, len(curves), removed)
    return sum(float(curves[i].loss[entry]) for i, entry in entries.items())


def measured(
    model: Model, pairs: Sequence[Line], removed: Sequence[float]
) -> Mapping[float, Sequence[str]]:
    """For every budget the cells of a row."""
    alone = {part.name: model.alone(part) for pair in pairs for part in pair}
    together = [list(model.together(pair)) for pair in pairs]
    cells: dict[float, list[str]] = {}
    for own in removed:
        private = [least([alone[part.name] for part in pair], own) for pair in pairs]
        for way in range(len(WAYS)):
            shared = [least([curves[way]], own) for curves in together]
            wins = sum(x < y for x, y in zip(shared, private, strict=True))
            cells.setdefault(own, []).append(f"{sum(shared) / sum(private):.2f} ({wins})")
    return cells


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--moments", type=Path, default=MOMENTS)
    parser.add_argument("--distances", type=Path, default=VARIATION)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.2, 0.4])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    arguments = parser.parse_args()
    config = load_config(arguments.weights)
    found = classify_model(meta_model(config))
    fit = compose_settings().fit
    lines: dict[str, list[Part]] = {}
    for part in split_selected(found, "none"):
        lines.setdefault(part.family, []).append(part)
    twins = {part.sublayer.name: () for line in lines.values() for part in line}
    dense = DenseWeights(arguments.weights)
    problems = Problems(MomentStore(arguments.moments), twins, fit, CPU)
    model = Model(dense, problems, Layers(dense, found, config))
    distances = read_table(arguments.distances)["aligned"]
    header = ("removed", "family", "layers", "distance", "pairs", *WAYS)
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}", flush=True)
    for family in arguments.families:
        for layers, pairs in pairs_of(lines[family], distances).items():
            own, apart = spread(pairs, arguments.pairs), mean_distance(pairs, distances[family])
            for removed, cells in measured(model, own, arguments.removed).items():
                row = (removed, family, layers, f"{apart:.3f}", len(own), *cells)
                print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
