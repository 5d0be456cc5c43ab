"""A model from anywhere becomes one directory in hub format, with a manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
from conftest import MakeDirectory, contents
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sharebasis.errors import ShareBasisError, SourceError, WeightsError
from sharebasis.io.manifest import MANIFEST, Manifest
from sharebasis.io.records import load_record
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import Source, find_source

INDEX = "model.safetensors.index.json"
TOKENS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="session")
def sharded_directory(make_directory: MakeDirectory) -> Path:
    """A llama in several shards; not to be changed."""
    directory = make_directory("llama", max_shard_size="40KB", seed=3)
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture
def own_copy(sharded_directory: Path, tmp_path: Path) -> Path:
    """The sharded llama, to be damaged."""
    return Path(shutil.copytree(sharded_directory, tmp_path / "source"))


def _logits(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def _weights(directory: Path) -> dict[str, Tensor]:
    files = directory.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _assert_describes(manifest: Manifest, directory: Path) -> None:
    """The manifest against what safetensors and hashlib say of the files."""
    weights = _weights(directory)
    assert [tensor.name for tensor in manifest.tensors] == sorted(weights)
    for tensor in manifest.tensors:
        stored = load_file(directory / tensor.file)[tensor.name]
        assert tensor.shape == tuple(stored.shape)
        assert tensor.dtype == {torch.float32: "F32", torch.bfloat16: "BF16"}[stored.dtype]
        raw = stored.contiguous().view(torch.uint8).numpy().tobytes()
        assert tensor.sha256 == hashlib.sha256(raw).hexdigest()
    assert load_record(directory / MANIFEST, Manifest) == manifest


# Directories


def test_a_directory_is_copied_with_all_that_belongs_to_it(
    llama_directory: Path, tmp_path: Path
) -> None:
    manifest = extract(find_source(str(llama_directory)), tmp_path / "weights")
    extracted = contents(tmp_path / "weights")
    del extracted[MANIFEST]
    assert extracted == contents(llama_directory)
    _assert_describes(manifest, tmp_path / "weights")
    assert (manifest.source, manifest.source_version) == (str(llama_directory), "")
    assert {tensor.source for tensor in manifest.tensors} == {"model.safetensors"}


def test_shards_are_copied_byte_for_byte(sharded_directory: Path, tmp_path: Path) -> None:
    manifest = extract(find_source(str(sharded_directory)), tmp_path / "weights")
    extracted = contents(tmp_path / "weights")
    del extracted[MANIFEST]
    assert extracted == contents(sharded_directory)
    _assert_describes(manifest, tmp_path / "weights")
    weight_map = json.loads((sharded_directory / INDEX).read_text())["weight_map"]
    assert {tensor.name: tensor.source for tensor in manifest.tensors} == weight_map


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_extracted_gives_the_same_logits(
    request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    directory = request.getfixturevalue(f"{family}_directory")
    extract(find_source(str(directory)), tmp_path / "weights")
    assert torch.equal(_logits(tmp_path / "weights"), _logits(directory))


def test_half_precision_stays_as_it_is(llama_directory: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama_directory, tmp_path / "source"))
    half = {name: tensor.bfloat16() for name, tensor in _weights(source).items()}
    save_file(half, source / "model.safetensors", metadata={"format": "pt"})
    manifest = extract(find_source(str(source)), tmp_path / "weights")
    _assert_describes(manifest, tmp_path / "weights")
    assert {tensor.dtype for tensor in manifest.tensors} == {"BF16"}


def test_hashing_in_blocks_is_hashing_the_whole(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sharebasis.stages.extract.sources.BLOCK_BYTES", 1000
    )  # a few rows at a time
    manifest = extract(find_source(str(llama_directory)), tmp_path / "weights")
    _assert_describes(manifest, tmp_path / "weights")


def test_an_old_pytorch_checkpoint_is_converted(llama_directory: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama_directory, tmp_path / "source"))
    torch.save(_weights(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    manifest = extract(find_source(str(source)), tmp_path / "weights")
    _assert_describes(manifest, tmp_path / "weights")
    torch.testing.assert_close(_weights(tmp_path / "weights"), _weights(llama_directory))
    assert torch.equal(_logits(tmp_path / "weights"), _logits(llama_directory))
    assert {tensor.source for tensor in manifest.tensors} == {source.name}
    tokenizers = (AutoTokenizer.from_pretrained(d) for d in (tmp_path / "weights", source))
    one, other = (tokenizer("the union")["input_ids"] for tokenizer in tokenizers)
    assert one == other


# GGUF


def _write_gguf(directory: Path, path: Path) -> None:
    """What llama.cpp's converter does to a llama: rows of q and k reordered for its rotary."""
    config = json.loads((directory / "config.json").read_text())
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    bpe = json.loads((directory / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // n_heads)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3] + [1] * (len(bpe["vocab"]) - 1))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in _weights(directory).items():
        for ending, heads in (("q_proj.weight", n_heads), ("k_proj.weight", n_kv_heads)):
            if name.endswith(ending):
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_model_it_was_made_from(
    llama_directory: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.GGUF"
    _write_gguf(llama_directory, path)
    source = find_source(str(path))
    assert source.version == hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = extract(source, tmp_path / "weights")
    _assert_describes(manifest, tmp_path / "weights")
    assert manifest.source_version == source.version
    assert {tensor.source for tensor in manifest.tensors} == {"tiny.GGUF"}
    torch.testing.assert_close(_logits(tmp_path / "weights"), _logits(llama_directory))
    tokenizers = (AutoTokenizer.from_pretrained(d) for d in (tmp_path / "weights", llama_directory))
    one, other = (tokenizer("the union of states")["input_ids"] for tokenizer in tokenizers)
    assert one == other


# Packages


def _installed(monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """Pretend that every package is installed, in version 1.2, and holds `files`."""
    paths = [metadata.PackagePath(file) for file in files]
    for path in paths:
        path.dist = SimpleNamespace(locate_file=lambda file: Path("/site") / file)
    distribution = SimpleNamespace(files=paths, version="1.2")
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)


def test_a_package_stands_for_the_one_gguf_file_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "llm/__init__.py", "llm/tiny.Q4_1.gguf")
    found = find_source("package:llm")
    assert found == Source("package:llm", "1.2", Path("/site/llm/tiny.Q4_1.gguf"))


@pytest.mark.parametrize("files", [("llm/__init__.py",), ("llm/one.gguf", "llm/two.gguf")])
def test_a_package_with_no_gguf_file_or_several_says_how_many(
    monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...]
) -> None:
    _installed(monkeypatch, *files)
    n = sum(file.endswith(".gguf") for file in files)
    with pytest.raises(SourceError, match=rf"package:llm.* holds {n} GGUF files") as raised:
        find_source("package:llm")
    assert all(file in str(raised.value) for file in files if file.endswith(".gguf"))


def test_a_package_that_is_not_installed_says_so() -> None:
    with pytest.raises(SourceError, match="'no-such-package-here' is not installed"):
        find_source("package:no-such-package-here")


# The hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of the hub's client, with the llama in it as org/name."""
    cache = tmp_path / "cache"
    model = cache / "models--org--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(llama_directory, model / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.mark.parametrize("revision", [None, COMMIT])
def test_a_hub_model_is_extracted_at_its_commit(
    hub_cache: Path, llama_directory: Path, tmp_path: Path, revision: str | None
) -> None:
    manifest = extract(find_source("org/name", revision), tmp_path / "weights")
    assert (manifest.source, manifest.source_version) == ("org/name", COMMIT)
    assert torch.equal(_logits(tmp_path / "weights"), _logits(llama_directory))


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/name", "v9")])
def test_a_hub_model_that_cannot_be_fetched_is_named(
    hub_cache: Path, name: str, revision: str | None
) -> None:
    with pytest.raises(SourceError, match=rf"model\.source={name} .* cannot be fetched from"):
        find_source(name, revision)


# What is refused


@pytest.mark.parametrize("name", ["/no/such/directory", "./nothing", "~/nothing", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(name: str) -> None:
    with pytest.raises(SourceError, match=rf"model\.source={name} does not exist"):
        find_source(name)


def test_a_file_that_is_not_gguf_by_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(SourceError, match=r"model\.bin is a file, but not a GGUF file"):
        find_source(str(path))


def _edit(directory: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name])}, file, metadata={"format": "pt"})


def _poison(value: float) -> Callable[[Path], None]:
    def poison(directory: Path) -> None:
        def change(tensor: Tensor) -> Tensor:
            tensor[-1, -1] = value
            return tensor

        _edit(directory, "model.layers.1.mlp.up_proj.weight", change)

    return poison


def _last_shard(directory: Path) -> Path:
    return max(directory.glob("*.safetensors"))


def _truncate_shard(directory: Path) -> None:
    shard = _last_shard(directory)
    os.truncate(shard, shard.stat().st_size - 8)


def _put_into_last_shard(directory: Path) -> None:
    """In the index alone."""
    index = json.loads((directory / INDEX).read_text())
    assert index["weight_map"]["model.embed_tokens.weight"] != _last_shard(directory).name
    index["weight_map"]["model.embed_tokens.weight"] = _last_shard(directory).name
    (directory / INDEX).write_text(json.dumps(index))


def _configure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def _partial_pytorch(directory: Path) -> None:
    weights = _weights(directory)
    del weights["model.layers.1.mlp.up_proj.weight"]
    _no_weights(directory)
    torch.save(weights, directory / "pytorch_model.bin")


def _only_damaged_pytorch(directory: Path) -> None:
    for path in [*directory.glob("*.safetensors"), directory / INDEX]:
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"no pickle")


def _no_weights(directory: Path) -> None:
    for path in [*directory.glob("*.safetensors"), directory / INDEX]:
        path.unlink()


REFUSED: dict[str, tuple[Callable[[Path], object], type[ShareBasisError], str]] = {
    "NaN": (
        _poison(float("nan")),
        WeightsError,
        r"model\.layers\.1\.mlp\.up_proj\.weight \[48, 32\] in .*safetensors has 1 NaN or inf",
    ),
    "infinity": (_poison(float("-inf")), WeightsError, r"layers\.1\.mlp\.up_proj.* has 1 NaN or"),
    "truncated shard": (_truncate_shard, WeightsError, r"safetensors \(\d+ bytes\) is truncated"),
    "missing shard": (lambda d: _last_shard(d).unlink(), WeightsError, r"safetensors is missing"),
    "index of other shards": (
        _put_into_last_shard,
        WeightsError,
        r"lacks 1 tensors that its index puts there, model\.embed_tokens\.weight among them",
    ),
    "quantized": (
        lambda d: _configure(d, quantization_config={"quant_method": "fp8"}),
        SourceError,
        r"is quantized \(fp8\), .* Give one that is not",
    ),
    "pytorch file without a tensor": (
        _partial_pytorch,
        WeightsError,
        r"lacks 1 tensors of the model, model\.layers\.1\.mlp\.up_proj\.weight among them",
    ),
    "width that is no integer": (
        lambda d: _configure(d, hidden_size="32"),
        SourceError,
        "no usable config.json: .*hidden_size",
    ),
    "unknown family": (
        lambda d: _configure(d, model_type="nonsense"),
        SourceError,
        "no usable config.json: .*nonsense",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), SourceError, "no usable config.json"),
    "damaged config": (
        lambda d: (d / "config.json").write_text("{"),
        SourceError,
        "no usable config.json",
    ),
    "damaged pytorch file": (_only_damaged_pytorch, SourceError, "cannot be read by transformers"),
    "no weights": (_no_weights, SourceError, "cannot be read by transformers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_damaged_source_is_refused_and_the_earlier_artefact_stays(
    own_copy: Path, llama_directory: Path, tmp_path: Path, what: str
) -> None:
    target = tmp_path / "artifacts" / "weights"
    extract(find_source(str(llama_directory)), target)
    earlier = contents(tmp_path / "artifacts")
    damage, error, text = REFUSED[what]
    damage(own_copy)
    with pytest.raises(error, match=text):
        extract(find_source(str(own_copy)), target)
    assert contents(tmp_path / "artifacts") == earlier


def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF? no")
    with pytest.raises(SourceError, match=r"model\.gguf in .* cannot be read by transformers"):
        extract(find_source(str(path)), tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
