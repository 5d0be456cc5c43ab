"""A wrong key or value is named before anything runs."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from composing import CONF, composed
from conftest import REPOSITORY, with_changes

from sharebasis.config.fit import LimitSettings
from sharebasis.config.methods import METHODS, Metric
from sharebasis.config.structures import STRUCTURES, StructureEntry, structure_name
from sharebasis.errors import SettingsError
from sharebasis.pipeline.compose import compose_params
from sharebasis.pipeline.settings import load_settings, parse_settings

UNKNOWN = ["typo", "model.typo", "data.typo", "data.calibration.typo", "calibrate.typo"]
UNKNOWN += ["split.typo", "sensitivity.typo", "fit.typo", "propagate.typo", "recover.typo"]
UNKNOWN += ["vary.typo", "verify.typo", "attribute.typo"]


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_named(params: Mapping[str, Any], key: str) -> None:
    with pytest.raises(SettingsError, match=rf"params\.yaml is not valid: {re.escape(key)}: "):
        parse_settings(with_changes(params, {key: 1}), "params.yaml")


def _keys(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    return [
        key
        for name, value in tree.items()
        for key in [
            f"{prefix}{name}",
            *(_keys(value, f"{prefix}{name}.") if isinstance(value, Mapping) else ()),
        ]
    ]


@pytest.mark.parametrize("key", _keys(yaml.safe_load((REPOSITORY / "params.yaml").read_text())))
def test_a_missing_key_is_named(params: Mapping[str, Any], key: str) -> None:
    content = with_changes(params, {})
    *path, last = key.split(".")
    section = content
    for step in path:
        section = section[step]
    del section[last]
    with pytest.raises(SettingsError, match=rf"not valid: {re.escape(key)}: .*[Mm]issing|required"):
        parse_settings(content, "params.yaml")


WRONG: list[tuple[str, Any]] = [
    ("model.dtype", "float8"),
    ("model.source", None),
    ("model.source", 3),
    ("model.weight_types", {"q": {"pattern": ".*q", "split": "halves"}}),
    ("model.weight_types", {"q": {"patern": ".*q"}}),
    ("model.weight_types", {"q": {"pattern": ".*q", "n_head": 0}}),
    ("model.weight_types", {"q": {"pattern": ".*q", "qkv_order": "qqk"}}),
    ("model.weight_types", {"q": {"pattern": ".*q", "qkv_order": ""}}),
    ("model.block_pattern", ["layers", "blocks"]),
    ("data.source", "internet"),
    ("data.window", 1),
    ("data.window", "long"),
    ("data.batch", 0),
    ("data.calibration.windows", 0),
    ("data.evaluation.windows", -3),
    ("data.calibration", None),
    ("calibrate.checkpoint_seconds", 0),
    ("calibrate.checkpoint_seconds", float("nan")),
    ("calibrate.outliers.inputs.treatment", "cut"),
    ("calibrate.outliers.gradients.limit", 1),
    ("split.strategy", "halves"),
    ("vary.alignment", "rough"),
    ("vary.pairs", "some"),
    ("vary.layers", [3]),
    ("vary.layers", [-1, 3]),
    ("fit.method", "magic"),
    ("fit.removed", 0),
    ("fit.removed", 1),
    ("fit.removed", 20),
    ("fit.removed", float("nan")),
    ("fit.removed", "a lot"),
    ("fit.group_size", 0),
    ("fit.group_size", 1.5),
    ("fit.shared", ["q", "w"]),
    ("fit.shared", "q"),
    ("fit.shard_bytes", 0),
    ("fit.exclude", "v"),
    ("fit.limits", [{"sublayers": "v", "floor": -0.1}]),
    ("fit.limits", [{"sublayers": "v", "cap": 0}]),
    ("fit.limits", [{"sublayers": "v", "cap": 1.1}]),
    ("fit.limits", [{"family": "v"}]),
    ("fit.rank_multiple", 0),
    ("sensitivity.by", "guess"),
    ("sensitivity.removed", 1),
    ("sensitivity.runs", 0),
    ("sensitivity.clip", 0.5),
    ("verify.prompt", ""),
    ("verify.new_tokens", 0),
    ("verify.lossless_windows", 0),
    ("attribute.windows", 0),
    ("attribute.window", 1),
    ("attribute.top", 0),
    ("seed", "lucky"),
    ("seed", None),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: str(value))
def test_a_wrong_value_is_named_with_its_key_and_shown(
    params: Mapping[str, Any], key: str, value: Any
) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_settings(with_changes(params, {key: value}), "params.yaml")
    text = str(raised.value)
    assert text.startswith(f"params.yaml is not valid: {key}")
    assert "\n" not in text
    if not isinstance(value, dict | list):
        assert repr(value) in text


def test_a_split_of_false_is_none(params: Mapping[str, Any]) -> None:
    weight_types = {"q": {"pattern": ".*q", "split": False, "qkv_order": "vk"}}
    changes = {"split.strategy": False, "model.weight_types": weight_types}
    settings = parse_settings(with_changes(params, changes), "params.yaml")
    assert settings.split.strategy == "none"
    assert settings.model.weight_types is not None
    assert settings.model.weight_types["q"].split == "none"


def test_every_wrong_key_is_named_at_once(params: Mapping[str, Any]) -> None:
    changes = {"fit.removed": 2, "data.window": 0, "typo": 1}
    with pytest.raises(SettingsError) as raised:
        parse_settings(with_changes(params, changes), "params.yaml")
    assert all(key in str(raised.value) for key in changes)


ALONE = {"fit.group_size": 1, "fit.shared": []}
TOGETHER: list[tuple[Mapping[str, Any], str]] = [
    ({"fit.method": "svd", "fit.group_size": 2}, r"fit\.group_size=2, but svd"),
    *(
        ({"fit.method": method, **ALONE, "fit.two_sided": True}, f"true, but {method} .*fit=kfac")
        for method in ("svd", "asvd", "svd_llm")
    ),
    *(
        ({"fit.method": method, **ALONE, "fit.two_sided": False}, f"false, but {method} .*svd_llm")
        for method in ("fwsvd", "kfac")
    ),
    (
        {
            "fit.method": "kfac",
            **ALONE,
            "fit.two_sided": True,
            "calibrate.gradients": None,
            "fit.allocation": "uniform",
        },
        r"fit=kfac weighs by the gradients .* calibrate\.gradients=null does not gather",
    ),
    ({"sensitivity.by": "probes"}, r"sensitivity\.by=probes needs fit\.allocation=global"),
    ({"fit.limits": [{"sublayers": "v"}]}, r"fit\.limits needs fit\.allocation=global"),
    (
        {
            "fit.allocation": "global",
            "fit.limits": [{"sublayers": "v", "floor": 0.6, "cap": 0.5}],
        },
        r"at least 0\.6 and at most 0\.5 of v",
    ),
    ({"fit.exclude": ["(a"]}, r"fit\.exclude: '\(a' is not a regular expression"),
    (
        {"fit.allocation": "global", "fit.limits": [{"sublayers": "*"}]},
        r"fit\.limits: '\*' is not a regular expression",
    ),
    ({"data.source": "files", "data.evaluation.path": "b"}, r"data\.calibration\.path is missing"),
    ({"data.source": "files", "data.calibration.path": "a"}, r"data\.evaluation\.path is missing"),
    (
        {"data.source": "hub", "data.calibration.path": "a", "data.evaluation.path": "b"},
        r"data\.hub_id is missing",
    ),
    (
        {"data.source": "files", "data.calibration.path": "./a", "data.evaluation.path": "a"},
        r"data\.calibration\.path and data\.evaluation\.path are the same text, a",
    ),
    (
        {
            "data.source": "files",
            "data.calibration.path": "~/a",
            "data.evaluation.path": str(Path.home() / "a"),
        },
        r"data\.calibration\.path and data\.evaluation\.path are the same text",
    ),
]


@pytest.mark.parametrize(("changes", "text"), TOGETHER)
def test_values_that_do_not_go_together_are_named(
    params: Mapping[str, Any], changes: Mapping[str, Any], text: str
) -> None:
    with pytest.raises(SettingsError, match=text):
        parse_settings(with_changes(params, changes), "params.yaml")


def test_a_method_that_is_added_to_the_table_is_one(
    params: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = with_changes(params, {"fit.method": "toy", **ALONE})
    known = "svd, asvd, svd_llm, fwsvd, kfac, basis_sharing, auto"
    refused = rf"fit\.method: it has to be one of {known} \(it is 'toy'\)"
    with pytest.raises(SettingsError, match=refused):
        parse_settings(changed, "params.yaml")
    monkeypatch.setitem(METHODS, "toy", Metric(inputs="full"))
    assert parse_settings(changed, "params.yaml").fit.method == "toy"


def test_a_structure_that_is_added_to_the_table_is_one(
    params: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"fit.structures": ["private", "toy:3"], "fit.allocation": "global", **ALONE}
    changed = with_changes(params, {**changes, "fit.shared": ["q"]})
    with pytest.raises(SettingsError, match=r"not valid: fit\.structures: 'toy:3' is none of priv"):
        parse_settings(changed, "params.yaml")
    monkeypatch.setitem(STRUCTURES, "toy", StructureEntry("toys:Toy", r"toy:\d"))
    assert parse_settings(changed, "params.yaml").fit.structures == ("private", "toy:3")
    assert structure_name("toy:3") == "toy"


@pytest.mark.parametrize(
    ("name", "specs"),
    {
        "private": ["private"],
        "neurons": ["neurons"],
        "sparse": ["sparse"],
        "shared": ["fixed", "joint", "experts", "shared:2", "shared:all:inner", "by_distance:10"],
        None: ["", "shared", "shared:1", "joint:inner", "private ", "by_distance:all", "Sparse"],
    }.items(),
)
def test_an_entry_of_structures_belongs_to_one_structure(
    name: str | None, specs: list[str]
) -> None:
    for spec in specs:
        if name is None:
            with pytest.raises(SettingsError, match=f"{spec!r} is none of .*shared:N .N from 2"):
                structure_name(spec)
        else:
            assert structure_name(spec) == name
        matching = [entry for entry in STRUCTURES.values() if re.fullmatch(entry.pattern, spec)]
        assert len(matching) == (name is not None)


def test_limits_can_be_given_on_the_command_line() -> None:
    fit = composed(
        r"fit.exclude=['.*layers\.0\..*']", "fit.limits=[{sublayers: v, floor: 0.5}]"
    ).fit
    assert fit.exclude == (r".*layers\.0\..*",)
    assert fit.limits == (LimitSettings("v", 0.5, 1.0),)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["fit=magic"], "magic"),
        (["magic=fit"], "magic"),
        (["fit.typo=1"], "typo"),
        (["fit.removed=[1"], "removed"),
        (["model.source=${nowhere}"], "nowhere"),
    ],
    ids=str,
)
def test_an_override_that_fits_nothing_is_named(overrides: list[str], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        compose_params(CONF, overrides)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a: [1", r"params\.yaml is not YAML"),
        (b"<<<<<<< HEAD\nseed: 1\n", r"params\.yaml is not"),
        (b"\xff\xfe\x00", r"params\.yaml is not"),
        (b"", r"params\.yaml is not valid: the file"),
        (b"- 1\n", r"params\.yaml is not valid: the file"),
    ],
    ids=repr,
)
def test_a_file_that_is_no_settings_is_told_as_such(
    tmp_path: Path, content: bytes, text: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=text):
        load_settings(path)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing here .* python -m sharebasis\.params"):
        load_settings(tmp_path / "params.yaml")


def test_every_knob_says_what_it_is() -> None:
    files = sorted((REPOSITORY / "src/sharebasis/config").glob("*.py"))
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    classes = (node for module in modules for node in module.body)
    sections = [
        node for node in classes if isinstance(node, ast.ClassDef) and "Settings" in node.name
    ]
    assert len(sections) > 5
    for section in sections:
        for field, following in itertools.pairwise([*section.body, ast.Pass()]):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).endswith(
                "Settings"  # a section, which says it itself
            ):
                continue
            said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert said, f"{section.name}.{ast.unparse(field.target)}"
