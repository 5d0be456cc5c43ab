"""What the allocation makes of weights of the losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from allocating import allocate_alone
from conftest import MakeSettings, contents
from hypothesis import given, settings
from hypothesis import strategies as st
from sensing import PROBES, Case, MakeCase, maker
from small_pipeline import CPU, MakeSmallModel

from sharebasis.allocation.loss_weights import part_weight
from sharebasis.allocation.sensitivity import UNWEIGHED, Sensitivity
from sharebasis.compressed.loader import load_compressed
from sharebasis.spectra.store import Spectra
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.structures.curve import Curve


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, make_case: MakeCase) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module")
def make_case(
    small_model: MakeSmallModel,
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeCase:
    return maker(small_model, make_settings, tmp_path_factory)


def _ones(case: Case) -> Sensitivity:
    names = {part.name for group in Spectra(case.spectra).baseline for part in group.parts}
    return replace(UNWEIGHED, by="probes", parts=dict.fromkeys(names, 1.0))


def test_weights_of_1_and_none_at_all_give_the_same_bytes(case: Case, tmp_path: Path) -> None:
    found = []
    for i, own in enumerate([(), (UNWEIGHED,), (_ones(case),)]):
        target = tmp_path / str(i)
        fitted = fit(case.weights, case.spectra, case.fit, target, CPU, None, *own)
        found.append((contents(target), [one.rank for one in fitted.groups]))
    assert found[0] == found[1] == found[2]


def test_the_allocation_minimises_the_weighed_loss_and_reports_both(
    case: Case, tmp_path: Path
) -> None:
    sensitivity = case.measure(replace(PROBES, clip=4.0))
    weights = [one.weight for one in sensitivity.cells]
    assert 0.25 <= min(weights) < 0.9 < 1.1 < max(weights) <= 4
    metrics = []
    for own in (UNWEIGHED, sensitivity):
        fitted = fit(case.weights, case.spectra, case.fit, tmp_path / "compressed", CPU, None, own)
        metrics.append(fit_metrics(fitted, case.fit))
    plain, weighed = metrics
    assert plain["sensitivity"]["by"] == "none"
    assert plain["sensitivity"]["relative_weighed_loss"] == plain["relative_loss"]
    assert weighed["sensitivity"]["by"] == "probes"
    assert weighed["sensitivity"]["max_weight"] == pytest.approx(max(weights))
    assert weighed["relative_loss"] > plain["relative_loss"]  # that one was the least there is
    source, energies = Spectra(case.spectra), Spectra(case.spectra).energies
    with case.draft() as unweighed:
        pairs = zip(unweighed.groups, unweighed.losses, strict=True)
        of_plain = sum(part_weight(sensitivity, group.parts) * loss for group, loss in pairs)
    of_plain /= sum(
        part_weight(sensitivity, group.parts) * energies[number].sum()
        for number, group in enumerate(source.baseline)
    )
    assert weighed["sensitivity"]["relative_weighed_loss"] < of_plain
    assert load_compressed(tmp_path / "compressed")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    which=st.integers(0, 7),
    factor=st.floats(1, 50),
    removed=st.floats(0.1, 0.6),
)
def test_a_larger_weight_never_lowers_what_is_kept(
    seed: int, which: int, factor: float, removed: float
) -> None:
    generator = np.random.default_rng(seed)
    curves = []
    for i in range(8):
        energies = np.sort(generator.exponential(size=24))[::-1] * generator.uniform(0.1, 10)
        ranks = np.arange(1, 25)
        stored = np.append(ranks * (24 + 40 - ranks) + ranks, 24 * 40)
        tails = np.append(np.cumsum(energies[::-1])[::-1][1:], [0.0, 0.0])
        curves.append(Curve(str(i), stored, tails))
    before = allocate_alone(curves, removed)[which]
    curves[which] = replace(curves[which], loss=factor * curves[which].loss)
    after = allocate_alone(curves, removed)[which]
    assert curves[which].stored[after] >= curves[which].stored[before]
