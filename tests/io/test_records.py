"""Records come back as they were, or say what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.model_family import Architecture
from sharebasis.architecture.sublayers import Classification, Sublayer
from sharebasis.compressed.index import FORMAT, CompressedIndex, StoredGroup, StoredPart
from sharebasis.errors import StoreError
from sharebasis.io.manifest import Manifest, TensorOrigin
from sharebasis.io.records import load_record, save_record
from sharebasis.linalg.rows import Rows
from sharebasis.model.sites import Site
from sharebasis.moments.store import MomentIndex

_SUBLAYER = Sublayer(
    name="model.layers.3.self_attn.q_proj",
    slot="model.layers.*.self_attn.q_proj",
    layer=3,
    weight_type="q_proj",
    family="q",
    type="Linear",
    shape=(16, 32),
    bias=True,
    role="read",
    evidence="shape",
)


WEIGHT_TYPES = ARCHITECTURES["gpt2"].weight_types
RECORDS: dict[str, Any] = {
    "classification": Classification(
        "gpt2", Dims(32, 4, 2, 1, 16), Architecture(r"h\.(\d+)", WEIGHT_TYPES), (_SUBLAYER,)
    ),
    "manifest": Manifest(
        "org/name", "abc", (TensorOrigin("w", (2, 3), "F32", "00ff", "m.safetensors", "m.bin"),)
    ),
    "moments": MomentIndex(
        (Site("q", ("q", "k"), 32),), {"q": 7}, {"q.total": "moments-00001.safetensors"}
    ),
    "compressed": CompressedIndex(
        (
            StoredGroup(
                "g",
                "q",
                "low_rank",
                (StoredPart(("q",), Rows(0, 16), {"coefficient": "q.coefficient"}),),
                {"basis": "g.basis"},
                5,
            ),
        ),
        {"g.basis": "sharebasis-00001.safetensors"},
        ({"kind": "value_gauge", "value": "v.dense", "output": "o"},),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    record, path = RECORDS[name], tmp_path / "new" / "record.json"
    save_record(path, record)
    assert load_record(path, type(record)) == record


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_another_version_says_which_field_is_wrong(tmp_path: Path, name: str) -> None:
    record, path = RECORDS[name], tmp_path / "record.json"
    field, *_ = content = asdict(record)
    content[field] = {"surely": ["not"]}
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=rf"no {type(record).__name__} that .*\({field}") as raised:
        load_record(path, type(record))
    assert "dvc repro" in str(raised.value)


def test_a_compressed_model_of_a_later_format_is_refused(tmp_path: Path) -> None:
    record, path = RECORDS["compressed"], tmp_path / "record.json"
    save_record(path, record)
    assert load_record(path, CompressedIndex) == record
    path.write_text(json.dumps({**asdict(record), "format": FORMAT + 1, "unknown": 1}))
    with pytest.raises(StoreError, match=f"format {FORMAT + 1} is of a later version"):
        load_record(path, CompressedIndex)


@pytest.mark.parametrize("name", RECORDS)
def test_a_missing_record_says_what_writes_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match=r"record\.json is missing; run the stage"):
        load_record(tmp_path / "record.json", type(RECORDS[name]))


@pytest.mark.parametrize("content", [b"", b'{"half":', b"\x80\xff\x00"], ids=repr)
def test_a_file_that_is_not_json_is_told_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"record\.json is not JSON"):
        load_record(path, Manifest)
