"""A checkpoint read tensor by tensor is the model that transformers loads from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from sharebasis.errors import SourceError, WeightsError
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.rows import Rows
from sharebasis.model import checkpoint_weights
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_model

CPU = torch.device("cpu")
HRM_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
"""Not in the table. Its checkpoints keep in one tensor what the model keeps in four."""
FAMILIES: dict[str, dict[str, Any]] = {**{name: {} for name in SIZES}, "hrm_text": HRM_TEXT}
TIED = {"llama": {"tie_word_embeddings": True}, "gpt2": {}}


def saved(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def unstacked_state(directory: Path) -> dict[str, Tensor]:
    """What transformers loads, by the names of the unstacked model; tied tensors once."""
    model = load_model(directory, "float32", CPU)
    unstack(model)
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {
        name: tensor.detach()
        for name, tensor in state.items()
        if first.setdefault(id(tensor), name) == name
    }


def assert_reads_all(directory: Path, expected: dict[str, Tensor]) -> None:
    dense = DenseWeights(directory)
    assert len(set(dense.names)) == len(dense.names)
    assert set(dense.names) == expected.keys()
    for name, tensor in dense.stream(without=set()):
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_one_that_transformers_loads(family: str, tmp_path: Path) -> None:
    saved(random_model(family, 288, **FAMILIES[family]), tmp_path)
    assert_reads_all(tmp_path, unstacked_state(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "mixtral", "gpt_oss"])
def test_a_checkpoint_of_the_base_model_alone_lacks_the_prefix(family: str, tmp_path: Path) -> None:
    model = random_model(family, 288)
    saved(model.base_model, tmp_path)
    AutoConfig.for_model(**model.config.to_dict()).save_pretrained(tmp_path)
    unstack(model)
    prefix = f"{model.base_model_prefix}."
    assert not any(name.startswith(prefix) for name in load_file(tmp_path / "model.safetensors"))
    expected = model.state_dict()
    assert_reads_all(
        tmp_path, {name: expected[name] for name in expected if name.startswith(prefix)}
    )


def test_shards_of_the_checkpoint_do_not_matter(tmp_path: Path) -> None:
    random_model("mixtral", 288).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_reads_all(tmp_path, unstacked_state(tmp_path))


def test_numbers_are_read_in_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", 288).bfloat16()
    saved(model, tmp_path)
    unstack(model)
    assert_reads_all(tmp_path, dict(model.state_dict()))


@pytest.mark.parametrize("family", TIED)
def test_embeddings_that_are_tied_are_listed_once(family: str, tmp_path: Path) -> None:
    model = random_model(family, 288, **TIED[family])
    saved(model, tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in files
    dense = DenseWeights(tmp_path)
    assert "lm_head.weight" not in dense.names
    assert len(dense.names) == len(files)
    # A checkpoint may hold the tied tensor twice.
    embedding = next(name for name in files if name.endswith(("embed_tokens.weight", "wte.weight")))
    save_file({**files, "lm_head.weight": files[embedding].clone()}, tmp_path / "model.safetensors")
    assert DenseWeights(tmp_path).names == dense.names


def test_a_renaming_that_leads_nowhere_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(random_model("llama", 288), tmp_path)
    expected = unstacked_state(tmp_path)
    meant_for_others = [WeightRenaming("mlp.up_proj", "mlp.wi"), WeightRenaming("norm", "ln")]
    monkeypatch.setattr(
        checkpoint_weights, "get_model_conversion_mapping", lambda model: meant_for_others
    )
    assert_reads_all(tmp_path, expected)


def test_some_tensors_are_left_out_of_the_stream(tmp_path: Path) -> None:
    saved(random_model("olmoe", 288), tmp_path)
    dense = DenseWeights(tmp_path)
    without = {name for name in dense.names if ".experts." in name or "norm" in name}
    assert without
    streamed = [name for name, _ in dense.stream(without)]
    assert streamed == [name for name in dense.names if name not in without]


# Rows


ROWS = [Rows(0, 16), Rows(5, 7), Rows(0, 2, 4, 6), Rows(4, 2, 4, 6), Rows(1, 1, 8, 2)]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize(
    ("family", "ending"),
    [
        ("llama", "q_proj.weight"),
        ("gpt2", "c_attn.weight"),
        ("mixtral", "experts.gate_up_proj.2.weight"),
        ("gpt_oss", "experts.down_proj.3.weight"),
    ],
)
def test_some_rows_of_a_weight_are_those_rows(
    family: str, ending: str, rows: Rows, tmp_path: Path
) -> None:
    saved(random_model(family, 288), tmp_path)
    dense = DenseWeights(tmp_path)
    (name, *_) = (name for name in dense.names if name.endswith(ending))
    stored = unstacked_state(tmp_path)[name]
    transposed = family == "gpt2"
    whole = stored.T if transposed else stored
    assert torch.equal(dense.read(name, transposed=transposed), whole)
    found = dense.read(name, rows, transposed=transposed)
    assert torch.equal(found, whole[torch.tensor(list(rows))])


# How much is read


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The tensors of the checkpoint that are read from now on, and how many numbers of each."""
    seen: list[tuple[str, int]] = []
    original = TensorReader.read

    def read(self: TensorReader, name: str, *rest: slice, **named: slice) -> Tensor:
        tensor = original(self, name, *rest, **named)
        seen.append((name, tensor.untyped_storage().nbytes() // tensor.itemsize))
        return tensor

    monkeypatch.setattr(TensorReader, "read", read)
    return seen


def test_nothing_is_read_before_it_is_asked_for(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    for i, family in enumerate(("llama", "mixtral", "gpt_oss", "hrm_text")):
        saved(random_model(family, 288, **FAMILIES[family]), tmp_path / str(i))
        DenseWeights(tmp_path / str(i))
    assert reads == []


def test_one_expert_alone_is_read_for_one_expert(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    dense = DenseWeights(saved(random_model("mixtral", 288), tmp_path))
    dense.read("model.layers.1.mlp.experts.gate_up_proj.2.weight")
    of_expert = "model.layers.1.block_sparse_moe.experts.2."
    assert sorted(reads) == [(f"{of_expert}w1.weight", 48 * 32), (f"{of_expert}w3.weight", 48 * 32)]
    reads.clear()
    dense.read("model.layers.1.mlp.experts.down_proj.0.weight", Rows(3, 5))
    assert reads == [("model.layers.1.block_sparse_moe.experts.0.w2.weight", 48 * 32)]


def test_one_expert_alone_is_read_of_a_stack_on_disk(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    dense = DenseWeights(saved(random_model("gpt_oss", 288), tmp_path))
    dense.read("model.layers.0.mlp.experts.gate_up_proj.3.weight")
    dense.read("model.layers.0.mlp.experts.gate_up_proj.3.bias")
    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    assert reads == [(prefix, 96 * 32), (f"{prefix}_bias", 96)]


@pytest.mark.parametrize(("family", "n_rows"), [("llama", 48), ("gpt2", 128)])
def test_a_block_of_rows_is_read_without_the_others(
    family: str, n_rows: int, tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    dense = DenseWeights(saved(random_model(family, 288), tmp_path))
    ending = {"llama": "mlp.up_proj.weight", "gpt2": "mlp.c_fc.weight"}[family]
    (name, *_) = (name for name in dense.names if name.endswith(ending))
    assert dense.read(name, Rows(8, n_rows - 10), family == "gpt2").shape == (n_rows - 10, 32)
    assert reads == [(name, (n_rows - 10) * 32)]


def test_a_conversion_is_done_once_for_all_that_it_makes(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    dense = DenseWeights(saved(random_model("hrm_text", 288, **HRM_TEXT), tmp_path))
    prefix = "model.L_module.layers.1.self_attn"
    for x in ("gate", "q", "k", "v"):
        dense.read(f"{prefix}.{x}_proj.weight")
    assert [name for name, _ in reads] == ["model.L_module.layers.1.attn.gqkv_proj.weight"]


# What is refused


def _without(directory: Path, gone: Callable[[str], bool]) -> DenseWeights:
    """Of a checkpoint that lacks some tensors."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not gone(name)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    return DenseWeights(directory)


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    dense = _without(saved(random_model("llama", 288), tmp_path), lambda key: key == name)
    assert name not in dense.names
    for rows in (None, Rows(0, 4), Rows(0, 2, 2, 4)):
        with pytest.raises(WeightsError) as error:
            dense.read(name, rows)
        assert str(error.value) == f"{tmp_path} holds no tensor for {name}."


def test_a_name_that_no_model_has_is_missing_too(tmp_path: Path) -> None:
    dense = DenseWeights(saved(random_model("llama", 288), tmp_path))
    with pytest.raises(WeightsError, match=r"holds no tensor for model\.layers\.9\.x\.weight"):
        dense.read("model.layers.9.x.weight")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_are_missing_are_named(family: str, tmp_path: Path) -> None:
    dense = _without(
        saved(random_model(family, 288), tmp_path),
        lambda key: "layers.1." in key and ".experts." in key,
    )
    assert not any("layers.1.mlp.experts" in name for name in dense.names)
    assert any("layers.2.mlp.experts" in name for name in dense.names)
    said = r"holds no tensor for model\.layers\.1\.mlp\.experts\.down_proj"
    with pytest.raises(WeightsError, match=said):
        dense.read("model.layers.1.mlp.experts.down_proj.0.weight")


def test_one_matrix_of_one_expert_that_is_missing_is_an_error_that_says_of_what(
    tmp_path: Path,
) -> None:
    dense = _without(
        saved(random_model("mixtral", 288), tmp_path),
        lambda key: key.endswith("layers.1.block_sparse_moe.experts.1.w1.weight"),
    )
    with pytest.raises(WeightsError) as error:
        dense.read("model.layers.1.mlp.experts.gate_up_proj.0.weight")
    for said in (str(tmp_path), "cannot make model.layers.1.mlp.experts.gate_up_proj", "w1", "w3"):
        assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("gone", [1, 3])
@pytest.mark.parametrize("expert", [2, 3])
def test_a_whole_expert_that_is_missing_is_not_replaced_by_the_next(
    gone: int, expert: int, tmp_path: Path
) -> None:
    dense = _without(
        saved(random_model("mixtral", 288), tmp_path),
        lambda key: f"1.block_sparse_moe.experts.{gone}." in key,
    )
    with pytest.raises(WeightsError):
        dense.read(f"model.layers.1.mlp.experts.down_proj.{expert}.weight")


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises((SourceError, WeightsError), match=str(tmp_path)):
        DenseWeights(tmp_path)
    saved(random_model("llama", 288), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(SourceError, match="no usable config"):
        DenseWeights(tmp_path)
