"""What small models become is what it was, to the byte, and models of a former format are read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SCRIPT, STORED = HERE / "golden.py", HERE / "golden.json"
GOLDEN: Mapping[str, Mapping[str, Any]] = json.loads(STORED.read_text(encoding="utf-8"))
FORMER = sorted(path.stem for path in (HERE / "data" / "index_format_5").glob("*.json"))

UPDATE = (
    "If a change is meant to do that, run `python tests/golden.py > tests/golden.json` and declare "
    "it in CHANGELOG.md: users get other models from the same settings."
)


@pytest.fixture(scope="module")
def outcomes() -> Mapping[str, Mapping[str, Any]]:
    """What the script prints today."""
    command = [sys.executable, str(SCRIPT)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_the_cases_are_those_that_are_stored(outcomes: Mapping[str, Any]) -> None:
    assert sorted(outcomes) == sorted(GOLDEN), f"Other cases than those of {STORED.name}. {UPDATE}"


@pytest.mark.parametrize("case", GOLDEN)
def test_a_model_is_what_it_was(case: str, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
    keys = "picked", "dense", "files"
    found, expected = ({key: own[case].get(key) for key in keys} for own in (outcomes, GOLDEN))
    other = [key for key in keys if found[key] != expected[key]]
    assert found == expected, f"{case}: other {', '.join(other)} than before. {UPDATE}"


@pytest.mark.parametrize("case", FORMER)
def test_a_model_with_an_index_of_format_5_is_read(
    case: str, outcomes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Today's tensors, by the index as it was then: the same weights, bit for bit."""
    own = outcomes[case]
    assert own["by_index_format_5"] == own["dense"], f"{case}: the index is read otherwise"
