"""What may share is offered, what gains by it is picked, and what is picked is what is stored."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, MakeDirectory, n_numbers
from gauges import layers_of, random_element
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sharebasis import align
from sharebasis.allocation.choose import Chosen
from sharebasis.architecture.parts import Part, split_selected
from sharebasis.compressed.index import INDEX_FILE, CompressedIndex
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.errors import SettingsError
from sharebasis.forms.share_linear import SplitLinear
from sharebasis.gauge.layers import Layers
from sharebasis.gauge.tensors import ModelTensors
from sharebasis.gauge.units import Layer
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.pipeline.compose import compose_settings
from sharebasis.spectra.store import Spectra
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.fit import fit as fitting
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel, fit_metrics
from sharebasis.stages.recover.outcome import Recovery
from sharebasis.stages.recover.recover import write_recovered
from sharebasis.stages.recover.trainable import trainable
from sharebasis.stages.vary.tables import write_distances
from sharebasis.stages.vary.variation import measure_variation
from sharebasis.structures.curve import DENSE
from sharebasis.structures.layer_distances import LayerDistances, read_table
from sharebasis.structures.shared import offered_groups

CPU = torch.device("cpu")
WINDOWS = torch.randint(1, 280, (24, 24), generator=torch.Generator().manual_seed(0))
EVERY = "private,joint,experts,shared:2,shared:3,shared:all"
READS, WRITES = ["q", "k", "v", "gate", "up"], ["o", "down"]


def _settings(structures: str, removed: float = 0.4, **changes: object) -> FitSettings:
    overrides = [
        "fit=auto",
        f"fit.structures=[{structures}]",
        f"fit.shared=[{','.join(READS + WRITES)}]",
        f"fit.removed={removed}",
        *(f"fit.{key}={value}" for key, value in changes.items()),
    ]
    overrides += ["grouping=by_distance"] * ("by_distance" in structures)
    return compose_settings(overrides, REPOSITORY / "conf").fit


@dataclass(frozen=True)
class Calibrated:
    """A small model and its moments."""

    weights: Path
    parts: Sequence[Part]
    moments: MomentStore

    def decompose(self, target: Path, settings: FitSettings) -> Spectra:
        decompose(self.weights, self.parts, self.moments, settings, target, CPU)
        return Spectra(target)

    def fit(
        self, target: Path, settings: FitSettings, distances: LayerDistances | None = None
    ) -> FittedModel:
        spectra, device = target / "spectra", CPU
        decompose(self.weights, self.parts, self.moments, settings, spectra, device, distances)
        out = target / "compressed"
        return fit(self.weights, target / "spectra", settings, out, CPU, self.moments)

    @torch.no_grad()
    def logits(self) -> Tensor:
        return load_model(self.weights, "float32", CPU)(input_ids=WINDOWS[:4]).logits


MakeCalibrated = Callable[..., Calibrated]


@pytest.fixture(scope="module")
def make_calibrated(
    make_directory: MakeDirectory, tmp_path_factory: pytest.TempPathFactory
) -> MakeCalibrated:
    """`make_calibrated(family, plant=, **config)`: `plant` may change the weights."""

    def make(
        family: str,
        plant: Callable[[PreTrainedModel], None] = lambda _: None,
        strategy: str = "none",
        **changes: Any,
    ) -> Calibrated:
        directory = make_directory(family, **changes)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            plant(model)
        model.save_pretrained(directory)
        work = tmp_path_factory.mktemp("calibrated")
        model = load_model(directory, "float32", CPU)
        found = classify_model(model)
        never = Checkpoint(work / "checkpoint", {}, math.inf)
        sums = calibrate(model, found.selected, WINDOWS, 6, never, "text")
        write_moments(work / "moments", *sums)
        parts = split_selected(found, strategy)  # type: ignore[arg-type]
        return Calibrated(directory, parts, MomentStore(work / "moments"))

    return make


@pytest.fixture(scope="module")
def llama(make_calibrated: MakeCalibrated) -> Calibrated:
    return make_calibrated("llama", num_hidden_layers=4, **_SIZES)


_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


# What is offered


def test_reads_share_inputs_and_writes_share_outputs(llama: Calibrated) -> None:
    groups = offered_groups(llama.parts, _settings(EVERY))
    for group in groups:
        roles = {part.sublayer.role for part in group.parts}
        assert roles == {"read"} if group.side == "input" else {"write"}
        assert group.n_weights == sum(math.prod(part.shape) for part in group.parts)
        rows, columns = zip(*(part.shape for part in group.parts), strict=True)
        if group.side == "input":
            assert (group.d_out, group.d_in) == (sum(rows), columns[0])
        else:
            assert (group.d_out, group.d_in) == (rows[0], sum(columns))
    counts = Counter((group.structure, group.family) for group in groups)
    of_layers = {
        (f"shared:{n}", family): 4 - (n if n != "all" else 4) + 1
        for n in (2, 3, "all")
        for family in READS + WRITES
    }
    # q, k, v; gate, up; o, down
    assert counts == {("joint", "fused"): 3 * 4, **of_layers}
    names = [group.name for group in groups]
    assert len(set(names)) == len(names)
    assert {"model.layers.1.q+k+v", "model.layers.3.o+down"} <= set(names)
    assert "model.layers.1-3.mlp.down_proj" in names


def test_families_that_do_not_share_are_not_offered_over_layers(llama: Calibrated) -> None:
    settings = _settings("private,shared:2", shared="[k,o]")
    assert {group.family for group in offered_groups(llama.parts, settings)} == {"k", "o"}
    assert not offered_groups(llama.parts, _settings("private"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"structures": "[private,pairs]"}, "'pairs' is none of fixed, private"),
        ({"structures": "[private,shared:1]"}, "'shared:1' is none of"),
        ({"structures": "[joint]"}, "to have private among"),
        ({"structures": "[fixed,private]"}, r"has to be \[fixed\]"),
        ({"structures": "[private,joint]", "allocation": "uniform"}, "allocation=global"),
        ({"structures": "[private]", "share_experts": "true"}, r"fit\.structures=\[fixed\]"),
        ({"structures": "[private,shared:2]", "shared": "[]"}, "names no family"),
        ({"structures": "[private,joint:inner]"}, "'joint:inner' is none of"),
        ({"structures": "[private,by_distance:all]"}, "'by_distance:all' is none of"),
        ({"structures": "[private,by_distance:2]", "shared": "[q]"}, "needs grouping=by_distance"),
    ],
)
def test_what_does_not_go_together_is_told(changes: Mapping[str, str], text: str) -> None:
    overrides = ["fit=auto", *(f"fit.{key}={value}" for key, value in changes.items())]
    with pytest.raises(SettingsError, match=text):
        compose_settings(overrides, REPOSITORY / "conf")


# What is stored


def _errors(model: PreTrainedModel, case: Calibrated) -> dict[str, Tensor]:
    """W - Ŵ of every sublayer, the product put together from what is stored."""
    dense = load_model(case.weights, "float32", CPU)
    unstack(dense)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, SplitLinear):
            weight = dense.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            found[name] = (weight - module.weight).double().detach()
    return found


def _loss(name: str, error: Tensor, case: Calibrated, settings: FitSettings) -> float:
    """tr(G E C Eᵀ) by Cholesky factors of the damped moments."""
    own = case.moments.gradient(name)
    gradient = own.total / case.moments.n_tokens
    inputs = case.moments.read(case.moments.site(name)).second

    def factor(moment: Tensor, damping: float) -> Tensor:
        extra = damping * moment.diagonal().mean() * torch.eye(len(moment)).double()
        return torch.linalg.cholesky(moment + extra)

    left = factor(gradient, settings.damping_gradients).T
    return (left @ error @ factor(inputs, settings.damping_inputs)).square().sum().item()


@pytest.mark.parametrize("storage", ["plain", "interpolative"])
def test_the_loss_told_is_that_of_what_is_stored_and_so_is_the_count(
    storage: str, llama: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _settings(EVERY, storage=storage)
    llama.decompose(tmp_path / "spectra", settings)
    taken = _take(monkeypatch, {"shared:2": READS, "shared:3": WRITES}, rank=7)
    out = tmp_path / "out"
    fitted = fit(llama.weights, tmp_path / "spectra", settings, out, CPU, llama.moments)
    assert len(taken) == 7
    model = load_compressed(out)
    errors = _errors(model, llama)
    for one in fitted.groups:
        loss = sum(
            _loss(part.sublayer.name, errors[part.sublayer.name], llama, settings)
            for part in one.group.parts
        )
        assert one.loss == pytest.approx(loss, rel=1e-3, abs=1e-5 * one.energy)
        if not one.dense:
            assert one.loss > 1e-2 * one.energy
            assert one.n_stored == one.group.n_stored(one.rank, settings.storage)


def _take(
    monkeypatch: pytest.MonkeyPatch, wanted: Mapping[str, Sequence[str]], rank: int | None = None
) -> list[str]:
    """Let `fit` take, of every family, the first group of a structure, and the rest dense."""
    names: list[str] = []

    def chosen(source: Spectra, *_: object, **__: object) -> Chosen:
        groups, n_given = source.groups, source.n_given
        found: dict[int, int] = {}
        covered: set[str] = set()
        for structure, families in wanted.items():
            for family in families:
                i = next(
                    i
                    for i, own in enumerate(groups)
                    if i >= n_given and (own.structure, own.family) == (structure, family)
                )
                names.append(groups[i].name)
                covered |= {part.name for part in groups[i].parts}
                found[i] = rank or groups[i].full_rank
        rest = (i for i in range(n_given) if groups[i].parts[0].name not in covered)
        return Chosen({**found, **dict.fromkeys(rest, DENSE)})

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
    llama: Calibrated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = _settings(f"{EVERY},shared:2:inner", storage=storage)
    llama.decompose(tmp_path / "spectra", settings)
    _take(monkeypatch, wanted)
    out = tmp_path / "out"
    fit(llama.weights, tmp_path / "spectra", settings, out, CPU, llama.moments)
    index = load_record(out / INDEX_FILE, CompressedIndex)
    sides = {group.side for group in index.groups if group.basis}
    assert sides == ({"input"} if wanted is TAKEN["within a layer"] else {"input", "output"})
    expected = llama.logits()
    scale = expected.abs().max().item()
    model = load_compressed(out)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=WINDOWS[:4]).logits, expected, rtol=0, atol=1e-4 * scale
        )
        groups = trainable(model, index)
        torch.testing.assert_close(
            model(input_ids=WINDOWS[:4]).logits, expected, rtol=0, atol=1e-4 * scale
        )
    write_recovered(tmp_path / "again", out, index, groups, Recovery(0, 0, 0, ()), 10_000)
    with torch.no_grad():
        torch.testing.assert_close(
            load_compressed(tmp_path / "again")(input_ids=WINDOWS[:4]).logits,
            expected,
            rtol=0,
            atol=2e-4 * scale,
        )
    assert n_numbers(tmp_path / "again") == n_numbers(out)


# What is picked


def _share(modules: Sequence[torch.nn.Linear], rank: int, side: str) -> None:
    """Give weights one basis of a rank on a side."""
    d_out, d_in = modules[0].weight.shape
    common = torch.randn(rank, d_in if side == "input" else d_out)
    for module in modules:
        own = torch.randn(d_out if side == "input" else d_in, rank)
        product = own @ common / rank**0.5
        module.weight.copy_(0.3 * (product if side == "input" else product.T))


def _plant_layers(model: PreTrainedModel) -> None:
    """Layers 0 and 1 have a basis in common, for their writes and for k; layers 2 and 3 have
    none, but weights of the same rank."""
    for name, side in (
        ("self_attn.o_proj", "output"),
        ("mlp.down_proj", "output"),
        ("self_attn.k_proj", "input"),
    ):
        modules = [model.get_submodule(f"model.layers.{i}.{name}") for i in range(4)]
        _share(modules[:2], 5, side)
        _share(modules[2:3], 5, side)
        _share(modules[3:], 5, side)


def test_layers_that_share_are_found_and_unrelated_ones_stay_private(
    make_calibrated: MakeCalibrated, tmp_path: Path
) -> None:
    case = make_calibrated("llama", _plant_layers, num_hidden_layers=4, **_SIZES)
    settings = _settings("private,shared:2,shared:3", 0.3, shared="[k,o,down]")
    fitted = case.fit(tmp_path / "both", settings)
    shared = {one.group.name for one in fitted.groups if one.group.structure == "shared:2"}
    planted = ("self_attn.o_proj", "mlp.down_proj", "self_attn.k_proj")
    assert shared == {f"model.layers.0-1.{name}" for name in planted}
    assert {one.group.structure for one in fitted.groups} == {"shared:2", "private"}
    alone = case.fit(tmp_path / "alone", _settings("private", 0.3))
    assert _total(fitted) < 0.95 * _total(alone)
    assert 0.3 <= fit_metrics(fitted, settings)["removed_fraction"] < 0.31
    metrics = fit_metrics(fitted, settings)
    assert metrics["structures"]["shared:2"] == 3
    assert metrics["families"]["k"]["structures"] == {"private": 2, "shared:2": 1}
    assert {one["group"] for one in metrics["shared"]} == shared


def _total(fitted: FittedModel) -> float:
    return sum(one.loss for one in fitted.groups)


def _plant_experts(model: PreTrainedModel) -> None:
    """The experts of layer 0 have a basis in common, on the side of the stream."""
    for layer in range(3):
        experts: Any = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for stack, side in ((experts.gate_up_proj, "input"), (experts.down_proj, "output")):
            wrapped = [torch.nn.Linear(*own.shape[::-1]) for own in stack]
            for run in [wrapped] if layer == 0 else [[own] for own in wrapped]:
                _share(run, 6, side)
            stack.copy_(torch.stack([own.weight for own in wrapped]))


def test_experts_that_share_are_found(make_calibrated: MakeCalibrated, tmp_path: Path) -> None:
    case = make_calibrated("mixtral", _plant_experts, num_local_experts=4)
    fitted = case.fit(tmp_path / "both", _settings("private,experts", 0.75))
    shared = {one.group.name for one in fitted.groups if one.group.structure == "experts"}
    assert shared == {
        f"model.layers.0.mlp.experts.{name}.0-3" for name in ("gate_up_proj", "down_proj")
    }
    assert _total(fitted) < 0.9 * _total(case.fit(tmp_path / "alone", _settings("private", 0.75)))


def test_more_structures_never_lose_more(llama: Calibrated, tmp_path: Path) -> None:
    every = (
        _total(llama.fit(tmp_path / str(n), _settings(structures, 0.5)))
        for n, structures in enumerate(("private", "private,shared:2", EVERY))
    )
    alone, *others = every
    assert max(others) <= alone * (1 + 1e-12)


def test_without_moments_the_given_groups_are_taken(llama: Calibrated, tmp_path: Path) -> None:
    settings = _settings(EVERY)
    llama.decompose(tmp_path / "spectra", settings)
    fitted = fit(llama.weights, tmp_path / "spectra", settings, tmp_path / "out", CPU, None)
    assert {one.group.structure for one in fitted.groups} == {"private"}


def test_private_alone_is_what_groups_of_one_are_to_the_last_bit(
    llama: Calibrated, tmp_path: Path
) -> None:
    settings = [_settings("private"), _settings("fixed", shared="[]")]
    fitted = [llama.fit(tmp_path / str(i), own) for i, own in enumerate(settings)]
    private, fixed = (tmp_path / str(i) for i in range(2))
    files = sorted(path.relative_to(private) for path in private.rglob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        assert (private / file).read_bytes() == (fixed / file).read_bytes()
    assert [one.loss for one in fitted[0].groups] == [one.loss for one in fitted[1].groups]


def test_a_limit_of_some_parts_keeps_them_from_sharing_with_others(
    make_calibrated: MakeCalibrated, tmp_path: Path
) -> None:
    case = make_calibrated("llama", _plant_layers, num_hidden_layers=4, **_SIZES)
    only = "[k,o,down]"
    settings = _settings(
        "private,shared:2", 0.3, shared=only, exclude="['.*layers.0.mlp.down_proj']"
    )
    fitted = case.fit(tmp_path / "out", settings)
    shared = {one.group.name for one in fitted.groups if one.group.structure == "shared:2"}
    names = ("self_attn.o_proj", "self_attn.k_proj")
    assert shared == {f"model.layers.0-1.{name}" for name in names}
    (dense,) = (one for one in fitted.groups if one.group.name == "model.layers.0.mlp.down_proj")
    assert dense.dense


# Layers that are near each other


def _plant_copies(model: PreTrainedModel) -> None:
    """Layers 0 and 2, and layers 1 and 3, are one and the same up to gauge; of low rank on the
    side of the stream are q and up."""
    for i in (0, 1):
        _share([model.get_submodule(f"model.layers.{i}.self_attn.q_proj")], 5, "input")
        _share([model.get_submodule(f"model.layers.{i}.mlp.up_proj")], 5, "input")
    layers = layers_of(model)
    for i in (0, 1):
        own = layers.read(i)
        units = {name: random_element(x, layers.freedom(i)) for name, x in own.units.items()}
        layers.write(model, i + 2, Layer(units, own.rest))


@pytest.fixture(scope="module")
def copies(make_calibrated: MakeCalibrated) -> Calibrated:
    return make_calibrated("llama", _plant_copies, num_hidden_layers=4, **_SIZES)


@pytest.fixture(scope="module")
def distances(copies: Calibrated, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    copies: Calibrated, distances: Path, tmp_path: Path
) -> None:
    by_family = read_table(distances)["aligned"]
    near = copies.fit(
        tmp_path / "near", _offering("by_distance:2", "[q,up]", 0.3), distances=by_family
    )
    pairs = {f"model.layers.{pair}.{name}" for pair in ("0+2", "1+3") for name in _LOW_RANK}
    assert {x.group.name for x in near.groups if x.group.structure == "by_distance:2"} == pairs
    assert all(x.rank >= 5 for x in near.groups if len(x.group.parts) == 2)
    adjacent = copies.fit(tmp_path / "adjacent", _offering("shared:2", "[q,up]", 0.3))
    assert _total(near) < 0.9 * _total(adjacent)
    fixed = copies.fit(tmp_path / "fixed", _by_distance(), distances=by_family)
    assert {x.group.name for x in fixed.groups if len(x.group.parts) > 1} == pairs
    for one in fixed.groups:
        if one.group.name in pairs:
            assert one.loss < 1e-5 * one.energy  # two weights of rank 5, and one basis


_LOW_RANK = ("self_attn.q_proj", "mlp.up_proj")


def _offering(structure: str, shared: str, removed: float) -> FitSettings:
    return _settings(f"private,{structure}", removed, shared=shared)


def _by_distance() -> FitSettings:
    """What `fit=basis_sharing` makes of the distances."""
    overrides = ["fit=basis_sharing", "grouping=by_distance", "fit.shared=[q,up]"]
    return compose_settings(overrides, REPOSITORY / "conf").fit


def test_copies_share_on_the_inner_side_only_in_aligned_coordinates(
    copies: Calibrated,
    distances: Path,
    make_calibrated: MakeCalibrated,
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
    expected = copies.logits()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())

    def plant(model: PreTrainedModel) -> None:
        model.load_state_dict(moved.state_dict())

    aligned = make_calibrated("llama", plant, num_hidden_layers=4, **_SIZES)
    settings = _offering("by_distance:2:inner", "[gate,up,down]", 0.3)
    by_family = read_table(distances)["aligned"]
    fitted = {
        name: case.fit(tmp_path / name, settings, by_family)
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
    assert _total(fitted["in common"]) < 0.8 * _total(fitted["as they are"])
    model = load_compressed(tmp_path / "in common/compressed")
    for one in fitted["in common"].groups:
        errors = _errors(model, aligned)
        names = [part.sublayer.name for part in one.group.parts]
        loss = sum(_loss(name, errors[name], aligned, settings) for name in names)
        assert one.loss == pytest.approx(loss, rel=1e-3, abs=1e-5 * one.energy)
