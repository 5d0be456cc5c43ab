"""What may share is offered, and what does not go together is told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import pytest
from conftest import REPOSITORY
from sharing import (
    EVERY,
    FOUR_LAYERS,
    READS,
    WRITES,
    offered_groups,
    sharing_settings,
)
from small_pipeline import MakeSmallModel, SmallModel

from sharebasis.errors import SettingsError
from sharebasis.pipeline.compose import compose_settings


@pytest.fixture(scope="module")
def llama(small_model: MakeSmallModel) -> SmallModel:
    return small_model("llama", **FOUR_LAYERS)


def test_reads_share_inputs_and_writes_share_outputs(llama: SmallModel) -> None:
    groups = offered_groups(llama, sharing_settings(EVERY))
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


def test_families_that_do_not_share_are_not_offered_over_layers(llama: SmallModel) -> None:
    settings = sharing_settings("private,shared:2", shared="[k,o]")
    assert {group.family for group in offered_groups(llama, settings)} == {"k", "o"}
    assert not offered_groups(llama, sharing_settings("private"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"structures": "[private,pairs]"}, "'pairs' is none of private, fixed"),
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
