"""Measured losses become weights of the predicted ones."""

from __future__ import annotations

import math

import pytest
from conftest import MakeSettings
from sensing import Case, MakeCase, maker
from small_pipeline import MakeSmallModel

from sharebasis.errors import CalibrationError
from sharebasis.spectra.store import Spectra
from sharebasis.stages.sensitivity.corrections import Cell, cells_of, corrections


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


def _cells(n: int) -> list[Cell]:
    return [Cell("q", (i, i), (i,)) for i in range(n)]


def test_weights_are_ratios_to_the_ratio_of_the_sums() -> None:
    losses, ratio = corrections(_cells(3), [1.0, 2.0, 1.0], [1.0, 1.0, 4.0], 100.0)
    assert ratio == 1.5
    assert [one.weight for one in losses] == pytest.approx([1 / 1.5, 0.5 / 1.5, 4 / 1.5])


def test_weights_are_clipped_and_a_cell_that_loses_nothing_has_weight_1() -> None:
    losses, ratio = corrections(_cells(4), [1.0, 1.0, 0.0, 8.0], [100.0, -1.0, 3.0, 8.0], 4.0)
    assert ratio == 10.7
    assert [one.weight for one in losses] == pytest.approx([4.0, 0.25, 1.0, 0.25])


@pytest.mark.parametrize(
    ("predicted", "measured"), [([0.0], [1.0]), ([1.0], [0.0]), ([1.0], [math.nan])]
)
def test_a_draft_that_loses_nothing_gives_no_weights(
    predicted: list[float], measured: list[float]
) -> None:
    with pytest.raises(CalibrationError, match=r"Raise sensitivity\.removed"):
        corrections(_cells(1), predicted, measured, 4.0)


@pytest.mark.parametrize("runs", [1, 2, 3, 5])
def test_cells_hold_every_group_once_in_runs_of_neighbours(case: Case, runs: int) -> None:
    groups = Spectra(case.spectra).baseline
    cells = cells_of(groups, runs)
    assert sorted(i for cell in cells for i in cell.groups) == list(range(len(groups)))
    for cell in cells:
        for i in cell.groups:
            assert groups[i].family == cell.kind
            assert cell.layers[0] <= groups[i].parts[0].sublayer.layer <= cell.layers[1]
    covered = sorted({cell.layers for cell in cells})
    assert len(covered) == min(runs, 3)
    assert [layer for a, b in covered for layer in range(a, b + 1)] == [0, 1, 2]
