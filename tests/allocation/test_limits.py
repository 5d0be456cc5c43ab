"""Limits hold, the budget is met all the same, and what cannot be met is told."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocating import allocate_alone
from conftest import MakeSettings
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from small_pipeline import CPU, MakeSmallModel

from sharebasis.allocation.uniform import uniform_ranks
from sharebasis.architecture.families import Architecture
from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.architecture.selection import LinearModule, classify
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.config.model import WeightTypeSettings
from sharebasis.config.types import Storage
from sharebasis.errors import BudgetError, SelectionError
from sharebasis.linalg.rows import Rows
from sharebasis.model.hub import load_model
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel, fit_metrics
from sharebasis.structures.curve import DENSE, Curve, curve_of, factor_numbers
from sharebasis.structures.limits import Limit, limits_of

WINDOWS = torch.randint(1, 280, (8, 24), generator=torch.Generator().manual_seed(0))


def _groups(family: str, *shapes: tuple[int, int], size: int = 1) -> Sequence[Group]:
    """One group for each shape, of `size` layers each; their names are layers.N.FAMILY."""
    name = f"{family}_proj"
    modules = [
        LinearModule(f"layers.{i * size + j}.{name}", "Linear", shape, bias=False)
        for i, shape in enumerate(shapes)
        for j in range(size)
    ]
    kinds = {family: WeightTypeSettings(pattern=".*", family=family)}  # type: ignore[arg-type]
    sublayers = classify(modules, Architecture(r"layers\.(\d+)\.", kinds), 4)
    parts = [Part(one, "", one.family, Rows(0, one.shape[0])) for one in sublayers]
    return [Group(tuple(parts[i : i + size])) for i in range(0, len(parts), size)]


def _twins(groups: Sequence[Group]) -> dict[str, tuple[str, ...]]:
    return {part.sublayer.name: () for group in groups for part in group.parts}


# Patterns

GROUPS = [*_groups("q", (4, 6), (4, 6)), *_groups("v", (2, 6), (2, 6))]


def _limits(make_settings: MakeSettings, changes: dict[str, Any]) -> Sequence[Limit]:
    own = make_settings({"fit.allocation": "global", **changes}).fit
    return limits_of(GROUPS, _twins(GROUPS), own)


def test_without_any_every_group_is_free(make_settings: MakeSettings) -> None:
    assert _limits(make_settings, {}) == [Limit()] * 4


def test_families_and_patterns_are_found_and_all_that_name_a_group_hold(
    make_settings: MakeSettings,
) -> None:
    limits = [
        {"sublayers": "v", "floor": 0.3},
        {"sublayers": r"layers\.1\..*", "floor": 0.2, "cap": 0.8},
        {"sublayers": r".*\.v_proj", "cap": 0.9},
    ]
    changes = {"fit.limits": limits, "fit.exclude": [r"layers\.0\.q.*"], "fit.rank_multiple": 2}
    assert _limits(make_settings, changes) == [
        Limit(0.0, 1.0, 2, dense=True),
        Limit(0.2, 0.8, 2),
        Limit(0.3, 0.9, 2),
        Limit(0.3, 0.8, 2),
    ]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fit.exclude": ["layers.7.q_proj"]}, r"fit\.exclude: 'layers\.7\.q_proj' matches"),
        ({"fit.exclude": ["q_proj"]}, r"no selected sublayer; the first .* layers\.0\.q_proj"),
        ({"fit.limits": [{"sublayers": "vv"}]}, r"fit\.limits: 'vv' matches"),
        ({"fit.limits": [{"sublayers": "up"}]}, r"the family up, but there is only q, v\."),
    ],
)
def test_a_pattern_that_matches_nothing_is_told(
    changes: dict[str, Any], text: str, make_settings: MakeSettings
) -> None:
    with pytest.raises(SelectionError, match=text):
        _limits(make_settings, changes)


def test_a_pattern_takes_all_that_share_a_basis_or_none(make_settings: MakeSettings) -> None:
    groups = _groups("q", (4, 6), (4, 6), size=2)
    told = r"matches layers\.3\.q_proj, but not layers\.2\.q_proj, with which it shares"
    with pytest.raises(SelectionError, match=told):
        limits_of(groups, _twins(groups), make_settings({"fit.exclude": [r"layers\.3.*"]}).fit)
    own = make_settings({"fit.exclude": [r"layers\.[23].*"]}).fit
    assert [limit.dense for limit in limits_of(groups, _twins(groups), own)] == [False, True]


def test_a_weight_is_found_under_every_name_that_uses_it(make_settings: MakeSettings) -> None:
    twins = {**_twins(GROUPS), "layers.0.q_proj": ("layers.5.q_proj",)}
    own = make_settings({"fit.exclude": [r"layers\.5.*"]}).fit
    assert [limit.dense for limit in limits_of(GROUPS, twins, own)] == [True, False, False, False]


# The choice


def _curve(shape: tuple[int, int], seed: int, storage: Storage) -> Curve:
    (group,) = _groups("q", shape)
    energies = np.sort(np.random.default_rng(seed).exponential(size=min(shape)) ** 2)[::-1]
    return curve_of(group, energies.copy(), storage)


def _holds(curve: Curve, entry: int, limit: Limit) -> bool:
    """By the words of the settings."""
    rank, kept = curve.rank(entry), curve.stored[entry] / curve.stored[-1]
    if limit.dense:
        return rank == DENSE
    within = limit.floor <= kept and (kept <= limit.cap or limit.cap == 1)
    return bool(within and (rank == DENSE or rank % limit.multiple == 0))


def _sums(curves: Sequence[Curve], entries: Sequence[int]) -> tuple[int, float]:
    pairs = list(zip(curves, entries, strict=True))
    return sum(int(c.stored[i]) for c, i in pairs), float(sum(c.loss[i] for c, i in pairs))


def _every(curves: Sequence[Curve], limits: Sequence[Limit]) -> NDArray[np.float64]:
    """(numbers stored, loss) of every choice that the limits allow, by brute force."""
    allowed = [
        [i for i in range(len(curve.stored)) if _holds(curve, i, limit)]
        for curve, limit in zip(curves, limits, strict=True)
    ]
    return np.array([_sums(curves, entries) for entries in product(*allowed)]).reshape(-1, 2)


LIMITS = st.builds(
    Limit,
    floor=st.sampled_from([0.0, 0.0, 0.2, 0.5, 0.8]),
    cap=st.sampled_from([1.0, 1.0, 0.9, 0.8, 0.6]),
    multiple=st.sampled_from([1, 1, 2, 3]),
    dense=st.sampled_from([False, False, False, True]),
)
SHAPES = st.tuples(st.integers(2, 8), st.integers(2, 8))


@settings(max_examples=150, deadline=None)
@given(
    cases=st.lists(st.tuples(SHAPES, LIMITS), min_size=1, max_size=3),
    storage=st.sampled_from(["plain", "interpolative"]),
    permille=st.integers(50, 800),
    seed=st.integers(0, 2**16),
)
def test_limits_hold_or_it_is_told_that_no_choice_meets_them(
    cases: list[tuple[tuple[int, int], Limit]], storage: Storage, permille: int, seed: int
) -> None:
    shapes, limits = [shape for shape, _ in cases], [limit for _, limit in cases]
    free = [_curve(shape, seed + i, storage) for i, shape in enumerate(shapes)]
    dense = sum(int(curve.stored[-1]) for curve in free)
    budget = (1000 - permille) * dense // 1000
    stored, loss = _every(free, limits).T
    possible = stored <= budget
    if not possible.any() or stored.max() < budget - dense / 1000:
        with pytest.raises(BudgetError):
            allocate_alone(
                [curve.within(limit) for curve, limit in zip(free, limits, strict=True)],
                permille / 1000,
            )
        return
    curves = [curve.within(limit) for curve, limit in zip(free, limits, strict=True)]
    entries = allocate_alone(curves, permille / 1000)
    own_stored, own_loss = _sums(free, entries)
    assert own_stored <= budget
    assert all(map(_holds, free, entries, limits))
    assert own_loss >= loss[possible].min() - 1e-12
    # Before what is left is spent, the choice is the best of all that store no more than it, and
    # that is less than the budget by no more than one step of every curve that is as dear.
    allowed = [curve.stored[np.isfinite(curve.loss)] for curve in curves]
    least = budget - sum(int(own.max() - own.min()) for own in allowed)
    cheaper = loss[stored <= least]
    assert not len(cheaper) or own_loss <= cheaper.min() + 1e-12
    stored, loss = _every(free, [Limit()] * len(free)).T
    assert own_loss >= loss[stored <= budget].min() - 1e-12


@pytest.mark.parametrize("removed", [0.1, 0.2, 0.35, 0.5])
@pytest.mark.parametrize("multiple", [1, 8])
def test_the_budget_is_met_to_a_thousandth_and_limits_never_gain(
    removed: float, multiple: int
) -> None:
    shapes = [(96, 64), (64, 160), (32, 64)] * 40
    storage: Storage = "interpolative"
    free = [_curve(shape, i, storage) for i, shape in enumerate(shapes)]
    kinds = [Limit(0.3, 0.95, multiple), Limit(0.0, 1.0, multiple), Limit(0.6, 1.0, multiple)]
    limits = [Limit(dense=True), *kinds, *kinds[:2], *kinds * 38]
    curves = [curve.within(limit) for curve, limit in zip(free, limits, strict=True)]
    dense = sum(int(curve.stored[-1]) for curve in free)
    bound, unbound = allocate_alone(curves, removed), allocate_alone(free, removed)
    assert all(map(_holds, free, bound, limits))
    assert not all(map(_holds, free, unbound, limits))
    share = 1 - _sums(free, bound)[0] / dense
    assert removed <= share <= removed + 1e-3
    assert _sums(free, bound)[1] > _sums(free, unbound)[1]


def test_limits_that_hold_anyway_change_nothing() -> None:
    free = [_curve((20, 30), seed, "interpolative") for seed in range(6)]
    entries = allocate_alone(free, 0.3)
    kept = [curve.stored[i] / curve.stored[-1] for curve, i in zip(free, entries, strict=True)]
    limits = [Limit(max(own - 0.2, 0.0), min(own + 0.2, 1.0)) for own in kept]
    curves = [curve.within(limit) for curve, limit in zip(free, limits, strict=True)]
    assert any(np.isinf(curve.loss).any() for curve in curves)
    assert allocate_alone(curves, 0.3) == entries


@pytest.mark.parametrize(
    ("limit", "removed", "text"),
    [
        (Limit(floor=0.9), 0.2, r"least that limits allow already stores \d+\. Lower"),
        (Limit(dense=True), 0.2, r"leaves 960 numbers, but the least .* stores 1200"),
        (Limit(cap=0.5), 0.2, r"allow no more than \d+, which is removing 0\.5\d*\. Raise"),
        (Limit(multiple=21, cap=0.9), 0.2, "can be stored in no way"),
        (Limit(0.5, 0.501), 0.5, r"no way .* \(fractions 0\.5 to 0\.501, ranks in steps of 1\)"),
    ],
)
def test_limits_that_no_choice_meets_are_told(limit: Limit, removed: float, text: str) -> None:
    with pytest.raises(BudgetError, match=text):
        _allocate_two(limit, removed)


def _allocate_two(limit: Limit, removed: float) -> list[int]:
    curves = [_curve((20, 30), i, "interpolative").within(limit) for i in range(2)]
    return allocate_alone(curves, removed)


# Uniform


@given(permille=st.integers(50, 600), multiple=st.integers(1, 4), dense=st.integers(0, 2))
def test_uniform_ranks_make_up_for_what_stays_dense(
    permille: int, multiple: int, dense: int
) -> None:
    groups = _groups("q", *[(60, 40), (30, 40), (80, 40), (50, 60), (64, 64)])
    limits = [Limit(multiple=multiple, dense=i < dense) for i in range(5)]
    total = sum(group.n_weights for group in groups)
    rest = sum(group.n_weights for group in groups[dense:])
    budget = (1000 - permille) * total - 1000 * (total - rest)  # of the rest, in thousandths
    ranks = uniform_ranks(groups, permille / 1000, "plain", limits) if budget > 0 else []
    assert ranks[:dense] == [DENSE] * dense
    for group, rank in zip(groups[dense:], ranks[dense:], strict=True):
        assert rank % multiple == 0
        allowed = budget * group.n_weights
        assert factor_numbers(group, rank, "plain") * 1000 * rest <= allowed
        assert factor_numbers(group, rank + multiple, "plain") * 1000 * rest > allowed


def test_uniform_ranks_cannot_make_up_for_everything() -> None:
    groups = _groups("q", (60, 40), (60, 40))
    with pytest.raises(BudgetError, match=r"leaves 2160 numbers, but what fit\.exclude .* 2400"):
        uniform_ranks(groups, 0.55, "plain", [Limit(dense=True), Limit()])
    with pytest.raises(BudgetError, match=r"Removing 0\.9 of layers\.1.* leaves no rank: rank 3"):
        uniform_ranks(groups, 0.45, "plain", [Limit(dense=True), Limit(multiple=3)])
    with pytest.raises(BudgetError, match=r"rank_multiple=41 is more than its full rank, 40"):
        uniform_ranks(groups, 0.2, "plain", [Limit(multiple=41)] * 2)


# A model


@pytest.fixture(scope="module")
def decomposed(
    small_model: MakeSmallModel,
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """artifacts/spectra of a small Llama; not to be changed."""
    target = tmp_path_factory.mktemp("decomposed") / "spectra"
    small = small_model("llama", windows=WINDOWS, batch=4, labels=None)
    small.decompose(target, _alone(make_settings, {}))
    return target


def _alone(make_settings: MakeSettings, changes: dict[str, Any]) -> FitSettings:
    fixed = {"fit.method": "svd_llm", "fit.group_size": 1, "fit.shared": [], "fit.removed": 0.3}
    return make_settings({**fixed, **changes}).fit


@pytest.mark.parametrize("storage", ["plain", "interpolative"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_what_is_excluded_is_stored_as_it_was_and_the_others_make_up_for_it(
    allocation: str,
    storage: str,
    decomposed: Path,
    llama_directory: Path,
    make_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    own = _alone(
        make_settings,
        {
            "fit.allocation": allocation,
            "fit.storage": storage,
            "fit.exclude": [r".*layers\.0\.mlp\..*", r".*\.v_proj"],
            "fit.rank_multiple": 2,
        },
    )
    fitted = fit(llama_directory, decomposed, own, tmp_path / "compressed", CPU, None)
    excluded = {f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")}
    excluded |= {f"model.layers.{i}.self_attn.v_proj" for i in range(3)}
    assert _dense(fitted) >= excluded
    assert len(_dense(fitted)) < len(fitted.groups)
    assert all(one.form == "dense" or (one.rank or 1) % 2 == 0 for one in fitted.groups)
    removed = fit_metrics(fitted, own)["removed_fraction"]
    assert 0.3 <= removed < 0.36
    before = load_file(llama_directory / "model.safetensors")
    after = {
        name: tensor
        for file in (tmp_path / "compressed").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    model = load_model(llama_directory, "float32", CPU)
    compressed = load_compressed(tmp_path / "compressed", device=CPU)
    for name in excluded:
        assert torch.equal(after[f"{name}.dense"], before[f"{name}.weight"])
        x = torch.randn(5, model.get_submodule(name).in_features)
        expected = model.get_submodule(name)(x)
        torch.testing.assert_close(compressed.get_submodule(name)(x), expected)


def test_limits_reach_the_model_with_no_other_decomposition(
    decomposed: Path, llama_directory: Path, make_settings: MakeSettings, tmp_path: Path
) -> None:
    limits = [{"sublayers": "q", "cap": 0.5}, {"sublayers": r".*layers\.1\.mlp.*", "floor": 0.8}]
    losses = []
    for given_limits in ([], limits):
        changes = {"fit.allocation": "global", "fit.limits": given_limits}
        own = _alone(make_settings, {**changes, "fit.storage": "interpolative"})
        fitted = fit(llama_directory, decomposed, own, tmp_path / "compressed", CPU, None)
        losses.append(sum(one.loss for one in fitted.groups))
    kept = {one.group.name: one.n_stored / one.group.n_weights for one in fitted.groups}
    for layer in range(3):
        assert kept[f"model.layers.{layer}.self_attn.q_proj"] <= 0.5
    for x in ("gate", "up", "down"):
        assert kept[f"model.layers.1.mlp.{x}_proj"] >= 0.8
    assert fit_metrics(fitted, own)["removed_fraction"] >= 0.3
    assert losses[1] > losses[0]


def _dense(fitted: FittedModel) -> set[str]:
    return {one.group.parts[0].sublayer.name for one in fitted.groups if one.form == "dense"}
