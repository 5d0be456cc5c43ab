"""From a model in hub format to a smaller one that runs; every family is in test_families."""

from __future__ import annotations

import csv
import json
import math
import os
import runpy
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import (
    CORPUS,
    REPOSITORY,
    MakeDirectory,
    MakeSettings,
    RunPython,
    contents,
    fit_at_once,
    small_config,
    with_changes,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from sharebasis import load_compressed
from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.parts import Part, rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.index import INDEX_FILE, CompressedGroup, CompressedIndex
from sharebasis.config.fit import FitSettings
from sharebasis.errors import ShareBasisError, SourceError, StoreError, WeightsError
from sharebasis.forms.share_linear import ShareLinear, State
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.manifest import MANIFEST
from sharebasis.io.records import load_record, save_record
from sharebasis.linalg.factorize import fit_read_basis
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.rows import Rows
from sharebasis.model import surgery
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel, fit_metrics
from sharebasis.stages.verify.verify import compare, continuations, lossless_difference

CPU = torch.device("cpu")
CALIBRATION = torch.randint(288, (12, 32), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(288, (3, 24), generator=torch.Generator().manual_seed(2))

SHARE = {"fit.method": "basis_sharing", "fit.group_size": 2}
ALONE = {"fit.group_size": 1, "fit.shared": []}
SVD, SVD_LLM = {"fit.method": "svd", **ALONE}, {"fit.method": "svd_llm", **ALONE}

CASES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama-none-svd": ("llama", "none", SVD),
    "llama-none-svd_llm": ("llama", "none", {**SVD_LLM, "fit.removed": 0.5}),
    "llama-none-share": ("llama", "none", SHARE),
    "llama-heads-share3": ("llama", "heads", {**SHARE, "fit.group_size": 3}),
    "gpt2-none-svd": ("gpt2", "none", SVD),
    "gpt2-qkv-share": ("gpt2", "qkv", SHARE),
    "gpt2-heads-svd_llm": ("gpt2", "heads", SVD_LLM),
    "mistral-heads-svd": ("mistral", "heads", SVD),
    "qwen2-qkv-share": ("qwen2", "qkv", SHARE),
    "qwen3-heads-share": ("qwen3", "heads", SHARE),
    "smollm3-none-share": ("smollm3", "none", {**SHARE, "fit.removed": 0.35}),
    "gptj-none-svd_llm": ("gptj", "none", SVD_LLM),
    "opt-heads-share": ("opt", "heads", SHARE),
    "phi-none-svd_llm": ("phi", "none", SVD_LLM),
    "gpt_neox-heads-share": ("gpt_neox", "heads", SHARE),  # heads of q, k and v in turn
    "mixtral-qkv-layers": ("mixtral", "qkv", SHARE),
    "mixtral-none-experts": ("mixtral", "none", {**SHARE, "fit.share_experts": True}),
}
"""Family, split, and settings of `fit`: every method with heads and without."""

MIXTRAL = {f"self_attn_{x}_proj" for x in "qkvo"} | {"mlp_experts_gate_up_proj"}
MIXTRAL |= {"mlp_experts_down_proj"}


@dataclass
class Run:
    """A model and all that the pipeline made of it."""

    weights: Path
    compressed: Path
    classification: Classification
    parts: Sequence[Part]
    settings: FitSettings
    fitted: FittedModel
    moments: Path

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return fit_metrics(self.fitted, self.settings)

    @cached_property
    def index(self) -> CompressedIndex:
        return load_record(self.compressed / INDEX_FILE, CompressedIndex)

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """Every tensor of the compressed directory; a name in two files is an error."""
        tensors: dict[str, Tensor] = {}
        for file in sorted(self.compressed.glob("*.safetensors")):
            own = load_file(file)
            assert not tensors.keys() & own.keys()
            tensors |= own
        return tensors

    def factors(self) -> set[str]:
        """Names of the bases and coefficients."""
        coefficients = {part.coefficient for group in self.index.groups for part in group.parts}
        return coefficients | {group.basis for group in self.index.groups}

    def dense(self) -> PreTrainedModel:
        model = load_model(self.weights, "float32", CPU)
        unstack(model)
        return model

    def dense_rows(self, model: PreTrainedModel, sublayer: str, rows: Rows) -> Tensor:
        """A view of rows of the (d_out, d_in) weight, whatever way round it is stored."""
        module = model.get_submodule(sublayer)
        assert isinstance(module.weight, Tensor)
        weight = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        return rows.take(weight)

    def product(self, group: CompressedGroup) -> Tensor:
        """The dense rows that a group's factors stand for, stacked."""
        coefficients = [self.stored[part.coefficient].double() for part in group.parts]
        return torch.cat(coefficients) @ self.stored[group.basis].double()


def compress(
    source: Path, target: Path, strategy: str, settings: FitSettings, shard_bytes: int = 20_000
) -> Run:
    """Every stage of the pipeline but `verify`, by the functions that the scripts call."""
    weights = target / "weights"
    extract(find_source(str(source)), weights)
    config = load_config(weights)
    classification = classify_model(meta_model(config))
    model = load_model(weights, "float32", CPU)
    checkpoint = Checkpoint(target / "checkpoint", {}, math.inf)
    sites, sums = calibrate(model, classification.selected, CALIBRATION, 4, checkpoint)
    write_moments(target / "moments", sites, sums)
    parts = split_selected(classification, strategy)  # type: ignore[arg-type]
    moments = MomentStore(target / "moments")
    fitted = fit_at_once(weights, parts, moments, settings, target / "compressed")
    return Run(
        weights,
        target / "compressed",
        classification,
        parts,
        settings,
        fitted,
        target / "moments",
    )


@pytest.fixture(scope="module", params=CASES)
def run(
    request: pytest.FixtureRequest,
    make_directory: MakeDirectory,
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Each of CASES, compressed once; not to be changed."""
    family, strategy, changes = CASES[request.param]
    settings = make_settings({**changes, "fit.shard_bytes": 20_000}).fit
    return compress(
        make_directory(family), tmp_path_factory.mktemp("artifacts"), strategy, settings
    )


@pytest.fixture
def llama_run(llama_directory: Path, make_settings: MakeSettings, tmp_path: Path) -> Run:
    """A llama of its own, to be damaged."""
    settings = make_settings({**SHARE, "fit.shard_bytes": 20_000}).fit
    return compress(llama_directory, tmp_path, "none", settings)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits.float()


def _close(one: Tensor, other: Tensor, relative: float) -> bool:
    """Whether two tensors differ by less than a fraction of their scale."""
    return (one - other).abs().max().item() <= relative * other.abs().max().item()


# The wrap


def test_the_wrap_alone_changes_nothing(run: Run) -> None:
    model = run.dense()
    before = _logits(model)
    assert lossless_difference(model, rows_by_sublayer(run.parts), TOKENS) <= 2e-5
    assert torch.equal(_logits(model), before)
    assert not any(isinstance(module, ShareLinear) for module in model.modules())


def test_a_wrap_that_loses_something_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    name, d_out = run.parts[-1].sublayer.name, run.parts[-1].sublayer.shape[0]
    half = d_out // 2
    swapped = {**rows_by_sublayer(run.parts), name: [Rows(half, d_out - half), Rows(0, half)]}
    assert lossless_difference(run.dense(), swapped, TOKENS) <= 2e-5
    monkeypatch.setattr(surgery, "inverse_order", lambda rows: None)  # the halves stay swapped
    assert lossless_difference(run.dense(), swapped, TOKENS) > 1e-2


def test_all_that_the_family_promises_is_selected(run: Run) -> None:
    found = run.classification.architecture.weight_types
    promised = ARCHITECTURES[run.classification.model_type].weight_types
    if run.classification.model_type == "mixtral":  # has experts in every layer
        promised = {name: own for name, own in promised.items() if name in MIXTRAL}
    assert found == promised
    selected = run.classification.selected
    n_in_layer = sum(4 if "experts" in name else 1 for name in promised)
    assert len(selected) == n_in_layer * run.classification.dims.n_layers
    assert all(sublayer.family != "other" for sublayer in selected)


# What is stored


def test_stored_numbers_are_those_in_the_files(run: Run) -> None:
    in_files = sum(run.stored[name].numel() for name in run.factors())
    model = run.dense()
    weights = [
        model.get_submodule(sublayer.name).weight for sublayer in run.classification.selected
    ]
    original = sum(weight.numel() for weight in weights)
    assert run.metrics["stored_numbers"] == in_files
    assert run.metrics["original_numbers"] == original
    assert run.metrics["removed_fraction"] == pytest.approx(1 - in_files / original, rel=1e-12)
    for count in ("stored_numbers", "original_numbers", "n_groups"):
        by_family = sum(family[count] for family in run.metrics["families"].values())
        assert by_family == run.metrics[count]
    whole = run.metrics["whole_model"]
    assert whole["stored_numbers"] == sum(tensor.numel() for tensor in run.stored.values())
    assert whole["original_numbers"] == sum(one.numel() for one in model.parameters())


def test_what_was_asked_is_removed_and_one_rank_more_would_not_be(run: Run) -> None:
    assert run.metrics["removed_fraction"] >= run.settings.removed
    for one in run.fitted.groups:
        a_rank = one.group.d_in + one.group.d_out
        assert one.rank * a_rank <= (1 - run.settings.removed) * one.group.n_weights
        assert (one.rank + 1) * a_rank > (1 - run.settings.removed) * one.group.n_weights


def test_the_files_hold_the_model_without_its_original_weights_and_nothing_else(run: Run) -> None:
    fitted = {f"{sublayer.name}.weight" for sublayer in run.classification.selected}
    model = run.dense()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert run.stored.keys() == (model.state_dict().keys() - fitted - tied) | run.factors()
    for name in run.stored.keys() - run.factors():
        assert torch.equal(run.stored[name], model.state_dict()[name]), name
    numels = sum(tensor.numel() for tensor in run.stored.values())
    n_bytes = sum(path.stat().st_size for path in run.compressed.glob("*.safetensors"))
    n_headers = 200 * len(run.stored)
    assert 4 * numels < n_bytes < 4 * numels + n_headers


def test_companions_come_along_and_the_manifest_does_not(run: Run) -> None:
    ours = {path.name for path in run.compressed.iterdir() if path.suffix != ".safetensors"}
    theirs = {path.name for path in run.weights.iterdir() if path.suffix != ".safetensors"}
    assert ours == theirs - {MANIFEST} | {INDEX_FILE}


def test_every_basis_is_on_disk_once_and_in_memory_once(run: Run) -> None:
    bases = [group.basis for group in run.index.groups]
    assert len(set(bases)) == len(bases) == run.metrics["n_groups"]
    model = load_compressed(run.compressed)
    parts = {
        (name, part_rows): part
        for name, rows in rows_by_sublayer(run.parts).items()
        for part_rows, part in zip(rows, model.get_submodule(name).parts, strict=True)
    }
    pointers = []
    for group in run.index.groups:
        users = [parts.pop((part.sublayer, part.rows)) for part in group.parts]
        assert len({id(user.basis) for user in users}) == 1
        pointers.append(users[0].basis.data_ptr())
        assert {user.state for user in users} == {State.COMPRESSED}
        assert all(user.weight is None for user in users)
    assert not parts
    assert len(set(pointers)) == len(pointers)
    assert sum(p.numel() for p in model.parameters()) == sum(
        tensor.numel() for tensor in run.stored.values()
    )


def test_only_shared_families_share_and_only_with_their_neighbours(run: Run) -> None:
    for group in run.index.groups:
        numbers = [_numbers(part.sublayer) for part in group.parts]
        if run.settings.share_experts and len(numbers[0]) == 2:
            assert numbers == [(numbers[0][0], expert) for expert in range(4)]
            continue
        layers = [layer for layer, *_ in numbers]
        assert layers == list(range(layers[0], layers[0] + len(layers)))
        assert len({tuple(expert) for _, *expert in numbers}) == 1
        assert len(layers) == 1 or group.family in run.settings.shared
    if run.settings.method == "basis_sharing":
        assert any(len(group.parts) == run.settings.group_size for group in run.index.groups)


def _numbers(name: str) -> tuple[int, ...]:
    """Of the layer, and of the expert if it is one."""
    return tuple(int(step) for step in name.split(".") if step.isdigit())


# What it computes


@torch.no_grad()
def _hooked_moments(run: Run) -> dict[str, Moment]:
    """Moments by sublayer, from hooks on the dense model."""
    model, seen = run.dense(), {}
    for sublayer in run.classification.selected:
        inputs = seen[sublayer.name] = []
        model.get_submodule(sublayer.name).register_forward_pre_hook(
            lambda _, args, own=inputs: own.append(args[0].flatten(0, -2).double())
        )
    model(input_ids=CALIBRATION)
    moments = {}
    for name, inputs in seen.items():
        x = torch.cat(inputs)
        moments[name] = Moment(x.T @ x, x.sum(0), len(x), name)
    return moments


def test_products_and_losses_are_those_of_the_dense_weights_and_hooked_moments(run: Run) -> None:
    model, moments = run.dense(), _hooked_moments(run)
    whitened = run.settings.method != "svd"
    loss = energy = 0.0
    for group in run.index.groups:
        weights = [run.dense_rows(model, p.sublayer, p.rows) for p in group.parts]
        # Experts have seen tokens of their own, and not as many as each other.
        own = {part.sublayer: moments[part.sublayer] for part in group.parts}.values()
        pooled = sum(one.total for one in own) / sum(one.n_tokens for one in own)
        moment = Moment(pooled, torch.zeros(len(pooled)).double(), 1, "pooled")
        factors = fit_read_basis(weights, moment if whitened else None, group.rank)
        expected = torch.cat(factors.coefficients) @ factors.basis
        product = run.product(group)
        assert _close(product, expected, 1e-4), group.name
        metric = pooled if whitened else torch.eye(len(pooled)).double()
        error = torch.cat(weights).double() - product
        loss += torch.einsum("oi,ij,oj->", error, metric, error).item()
        stacked = torch.cat(weights).double()
        energy += torch.einsum("oi,ij,oj->", stacked, metric, stacked).item()
    assert loss / energy > 1e-4  # there is a loss to be reported
    assert run.metrics["relative_loss"] == pytest.approx(loss / energy, rel=1e-4)


def test_the_compressed_model_is_the_dense_one_with_the_products_put_in(run: Run) -> None:
    by_hand = run.dense()
    original = _logits(by_hand)
    for group in run.index.groups:
        rows = iter(run.product(group).split([len(part.rows) for part in group.parts]))
        for part in group.parts:
            view = run.dense_rows(by_hand, part.sublayer, part.rows)
            view.copy_(next(rows))
    expected = _logits(by_hand)
    assert not _close(expected, original, 1e-2)  # putting them in made a difference
    assert _close(_logits(load_compressed(run.compressed)), expected, 1e-4)


def test_the_compressed_model_generates_what_its_logits_say(run: Run) -> None:
    model = load_compressed(run.compressed)
    assert not model.training
    assert not any(parameter.requires_grad for name, parameter in _factor_parameters(model))
    found = model.generate(
        input_ids=TOKENS[:1, :5],
        attention_mask=torch.ones(1, 5, dtype=torch.long),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
    )
    tokens = TOKENS[:1, :5]
    for _ in range(4):
        following = _logits(model, tokens)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
    assert torch.equal(found, tokens)


def _factor_parameters(model: PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    found = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if name.endswith((".basis", ".coefficient"))
    ]
    assert found
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_every_parameter(run: Run, dtype: torch.dtype) -> None:
    model = load_compressed(run.compressed, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if dtype == torch.float64:
        reference = _logits(load_compressed(run.compressed))
        assert _close(_logits(model), reference, 1e-3)


def test_tied_embeddings_stay_tied_and_others_apart(run: Run) -> None:
    model = load_compressed(run.compressed)
    one, other = (m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert (one.data_ptr() == other.data_ptr()) == model.config.tie_word_embeddings
    assert ("lm_head.weight" in run.stored) != model.config.tie_word_embeddings


def test_half_precision_weights_become_half_precision_factors(
    make_directory: MakeDirectory, make_settings: MakeSettings, tmp_path: Path
) -> None:
    source = make_directory("llama")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    run = compress(source, tmp_path, "none", make_settings(SVD).fit)
    assert {tensor.dtype for tensor in run.stored.values()} == {torch.bfloat16}
    assert {p.dtype for p in load_compressed(run.compressed).parameters()} == {torch.bfloat16}
    model = run.dense()
    for group in run.index.groups:
        (part,) = group.parts
        weight = run.dense_rows(model, part.sublayer, part.rows)
        factors = fit_read_basis([weight], None, group.rank)
        expected = factors.coefficients[0] @ factors.basis
        assert _close(run.product(group), expected, 4 * torch.finfo(torch.bfloat16).eps)


def _make_low_rank(directory: Path, rank: int) -> None:
    """Give every linear sublayer of every block a weight of rank `rank`, exactly that."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            rows, columns = module.weight.shape
            left = torch.randn(rows, rank, generator=generator)
            right = torch.randn(rank, columns, generator=generator)
            module.weight.data = 0.2 / rank**0.5 * left @ right
    model.save_pretrained(directory)


@pytest.mark.parametrize("changes", [SVD, SVD_LLM, SHARE], ids=["svd", "svd_llm", "share"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_have_the_rank_that_is_kept_lose_nothing(
    make_directory: MakeDirectory,
    make_settings: MakeSettings,
    tmp_path: Path,
    family: str,
    changes: Mapping[str, Any],
) -> None:
    directory = make_directory(family)
    _make_low_rank(directory, rank=6)
    run = compress(directory, tmp_path, "none", make_settings(changes).fit)
    assert min(one.rank for one in run.fitted.groups) >= 6
    assert run.metrics["removed_fraction"] >= 0.2
    assert run.metrics["relative_loss"] < 1e-9
    assert _close(_logits(load_compressed(run.compressed)), _logits(run.dense()), 1e-4)
    compressed = {"compressed": load_compressed(run.compressed)}
    fidelity = compare(run.dense(), compressed, TOKENS, batch=2)["compressed"]
    assert fidelity.kl_mean < 1e-6
    assert fidelity.compressed_perplexity == pytest.approx(fidelity.dense_perplexity, rel=1e-4)


def test_continuations_of_equal_models_are_equal(
    run: Run, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_compressed(run.compressed)
    texts = continuations({"one": model, "other": model}, tokenizer, "the union", 5)
    inputs = tokenizer("the union", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == {"one": expected, "other": expected}


# Damage


def _shard_of(run: Run, ending: str) -> Path:
    name = next(name for name in run.index.files if name.endswith(ending))
    return run.compressed / run.index.files[name]


def _forget_a_tensor(run: Run) -> None:
    path = run.compressed / INDEX_FILE
    content = json.loads(path.read_text())
    del content["files"]["model.layers.1.input_layernorm.weight"]
    path.write_text(json.dumps(content))


def _forget_a_basis(run: Run) -> None:
    path = run.compressed / INDEX_FILE
    content = json.loads(path.read_text())
    del content["files"][content["groups"][0]["basis"]]
    path.write_text(json.dumps(content))


DAMAGES: Mapping[str, tuple[Callable[[Run], object], type[ShareBasisError], str]] = {
    "missing shard": (
        lambda run: _shard_of(run, ".basis").unlink(),
        WeightsError,
        r"sharebasis-\d+\.safetensors is missing",
    ),
    "truncated shard": (
        lambda run: os.truncate(_shard_of(run, ".basis"), 3000),
        WeightsError,
        r"sharebasis-\d+\.safetensors \(3000 bytes\) is truncated",
    ),
    "missing index": (
        lambda run: (run.compressed / INDEX_FILE).unlink(),
        StoreError,
        r"sharebasis\.json is missing; run the stage",
    ),
    "damaged index": (
        lambda run: (run.compressed / INDEX_FILE).write_text('{"groups": []}'),
        StoreError,
        r"sharebasis\.json is no CompressedIndex .*files",
    ),
    "missing config": (
        lambda run: (run.compressed / "config.json").unlink(),
        SourceError,
        r"no usable config\.json",
    ),
    "forgotten tensor": (
        _forget_a_tensor,
        StoreError,
        r"lacks 1 tensors of the model, model\.layers\.1\.input_layernorm\.weight among",
    ),
    "forgotten basis": (_forget_a_basis, StoreError, r"layers\.0-1\.self_attn\.q_proj\.basis"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_compressed_directory_is_refused(llama_run: Run, what: str) -> None:
    damage, error, text = DAMAGES[what]
    damage(llama_run)
    with pytest.raises(error, match=text):
        load_compressed(llama_run.compressed)


def test_weights_without_one_of_the_sublayers_leave_the_earlier_result(
    llama_run: Run, tmp_path: Path
) -> None:
    earlier = contents(llama_run.compressed)
    damaged = Path(shutil.copytree(llama_run.weights, tmp_path / "damaged"))
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    moments = MomentStore(llama_run.moments)
    with pytest.raises(WeightsError, match=r"holds no tensor for model.*1\.mlp\.up_proj\.w"):
        fit_at_once(damaged, llama_run.parts, moments, llama_run.settings, llama_run.compressed)
    assert contents(llama_run.compressed) == earlier


FIT_AND_DIE = """
    import os, signal, sys, torch
    from pathlib import Path
    from sharebasis import store, tensor_store
    from sharebasis.fitting import fit
    from sharebasis.settings import FitSettings

    target = Path(sys.argv[1])
    settings = store.load_record(target / "fit.json", FitSettings)
    flush, left = tensor_store.TensorWriter.flush, 3

    def die(self):
        global left
        flush(self)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    tensor_store.TensorWriter.flush = die
    device = torch.device("cpu")
    fit(target / "weights", target / "spectra", settings, target / "compressed", device, None)
"""


def test_a_kill_in_the_middle_of_fit_leaves_the_earlier_result(
    llama_run: Run, tmp_path: Path, run_python: RunPython
) -> None:
    earlier = contents(llama_run.compressed)
    save_record(tmp_path / "fit.json", llama_run.settings)
    killed = run_python(FIT_AND_DIE, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / ".compressed.partial").iterdir())) == 3
    assert contents(llama_run.compressed) == earlier
    target = llama_run.compressed
    fit(llama_run.weights, target.parent / "spectra", llama_run.settings, target, CPU, None)
    assert contents(target) == earlier  # nothing in the fit is random
    assert not (tmp_path / ".compressed.partial").exists()


# The scripts


def test_the_stages_one_after_the_other_make_and_measure_a_smaller_model(
    llama_directory: Path,
    params: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("text.txt", "other.txt"):
        (tmp_path / name).write_text(CORPUS)
    changes = {
        "model.source": str(llama_directory),
        "data.source": "files",
        "data.window": 16,
        "data.calibration.path": "text.txt",
        "data.calibration.windows": 8,
        "data.evaluation.path": "other.txt",
        "data.evaluation.windows": 3,
        "device": "cpu",
        "split.strategy": "heads",
        "verify.new_tokens": 3,
        "curve.windows": 3,
        "curve.removed": [0.4, 0.2],
        "attribute.windows": 3,
        "attribute.window": 16,
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(with_changes(params, changes)))
    monkeypatch.chdir(tmp_path)
    before_fit = ("extract", "classify", "calibrate", "decompose", "sensitivity")
    for stage in (*before_fit, "fit", "verify", "curve", "attribute"):
        runpy.run_path(str(REPOSITORY / "stages" / f"{stage}.py"), run_name="__main__")
    metrics = {path.stem: json.loads(path.read_text()) for path in Path("metrics").iterdir()}
    assert metrics["classify"]["n_selected"] == metrics["verify"]["lossless"]["n_modules"] == 21
    assert 0.2 <= metrics["fit"]["removed_fraction"] < 0.3
    assert metrics["verify"]["lossless"]["max_abs_logit_diff"] <= 2e-5
    assert metrics["verify"]["n_predictions"] == 3 * 15
    assert 0 < metrics["verify"]["compressed"]["kl_mean"] < 5
    assert metrics["attribute"]["model"] == "compressed"
    # The same text and windows: two roads to one number.
    split = metrics["attribute"]["kl"]
    assert split["total"] == pytest.approx(metrics["verify"]["compressed"]["kl_mean"], rel=1e-4)
    assert sum(value for part, value in split.items() if part != "total") == pytest.approx(
        split["total"], rel=1e-4
    )
    low, high = metrics["curve"]["points"]["0.2"], metrics["curve"]["points"]["0.4"]
    assert low["removed_fraction"] == metrics["fit"]["removed_fraction"]
    for key in ("perplexity", "kl_mean", "top1_agreement"):  # the same budget, text and windows
        assert low[key] == metrics["verify"]["compressed"][key]
    assert 0.4 <= high["removed_fraction"] < 0.5
    assert low["kl_mean"] < high["kl_mean"]
    with Path("plots/curve.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows[0]["perplexity"] == metrics["verify"]["dense"]["perplexity"]
    assert rows[1:] == [low, high]
    assert not Path("artifacts/curve").exists()
    assert not Path("artifacts/checkpoints/calibrate").exists()
    assert "The state of the Union is" in " ".join(capsys.readouterr().out.split())
    runpy.run_module("sharebasis.summary", run_name="__main__")
    assert "lossless wrap of 21 modules" in capsys.readouterr().out
    # Where there is a recovered model, it is the one to be explained.
    shutil.copytree("artifacts/compressed", "artifacts/recovered")
    runpy.run_path(str(REPOSITORY / "stages" / "attribute.py"), run_name="__main__")
    recovered = json.loads(Path("metrics/attribute.json").read_text())
    assert recovered == {**metrics["attribute"], "model": "recovered"}


@pytest.fixture
def classify_metrics(
    params: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[PretrainedConfig], Any]:
    """Runs the stage in an empty directory, which needs a config and no weights."""

    def run(config: PretrainedConfig) -> Any:
        monkeypatch.chdir(tmp_path)
        config.save_pretrained(tmp_path / "artifacts" / "weights")
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(dict(params)))
        runpy.run_path(str(REPOSITORY / "stages" / "classify.py"), run_name="__main__")
        return json.loads((tmp_path / "metrics" / "classify.json").read_text())

    return run


def test_a_name_that_what_was_seen_contradicts_is_told_and_counted(
    classify_metrics: Callable[[PretrainedConfig], Any], caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    metrics = classify_metrics(small_config("rwkv", **sizes))
    told = [record.getMessage() for record in caplog.records if record.name == "__main__"]
    assert told == [
        f"rwkv.blocks.{layer}.feed_forward.value: trace: write, shape: write, name: read; it is "
        "write."
        for layer in (0, 1)
    ]
    assert metrics["n_disagreements"] == 2
    assert metrics["evidence"] == {"trace": 14}
    assert metrics["role"] == {"read": 10, "write": 4}


def test_the_metrics_of_classify_count_every_sublayer(
    classify_metrics: Callable[[PretrainedConfig], Any], caplog: pytest.LogCaptureFixture
) -> None:
    metrics = classify_metrics(small_config("qwen2_moe"))
    assert not [record for record in caplog.records if record.name == "__main__"]
    assert metrics.pop("provenance")
    n_layer = {"attention": 4, "experts": 2 * 4, "shared expert": 3}
    gates = 3
    assert metrics == {
        "n_sublayers": 3 * sum(n_layer.values()) + gates,
        "n_selected": 3 * sum(n_layer.values()),
        "role": {"read": 3 * (3 + 4 + 2) + gates, "write": 3 * (1 + 4 + 1)},
        "evidence": {"trace": 3 * 15 + gates},
        "category": {
            "ambiguous_read": 3,
            "read": 3 * (2 + 4 + 2) + gates,
            "ambiguous_write": 3,
            "write": 3 * (4 + 1),
        },
        "n_disagreements": 0,
        "n_tied": 0,
        "family": {"q": 3, "k": 3, "v": 3, "o": 3, "fused": 12, "down": 15, "gate": 3, "up": 3}
        | {"other": gates},
    }
