"""From a model in hub format to a smaller one that runs; every family is in test_families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from low_rank_fits import fit_rank
from small_pipeline import MakeSmallPipeline, SmallPipeline, dense_rows
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from sharebasis import load_compressed
from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.parts import rows_by_sublayer
from sharebasis.compressed.index import INDEX_FILE
from sharebasis.forms.share_linear import ShareLinear, State
from sharebasis.io.manifest import MANIFEST
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.rows import Rows
from sharebasis.model import surgery
from sharebasis.stages.verify.verify import compare, continuations, lossless_difference

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


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, small_pipeline: MakeSmallPipeline) -> SmallPipeline:
    """Each of CASES; not to be changed."""
    family, strategy, changes = CASES[request.param]
    changes = {**changes, "split.strategy": strategy, "fit.shard_bytes": 20_000}
    return small_pipeline(family, changes, windows=CALIBRATION, batch=4, labels=None)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits.float()


def _close(one: Tensor, other: Tensor, relative: float) -> bool:
    """Whether two tensors differ by less than a fraction of their scale."""
    return (one - other).abs().max().item() <= relative * other.abs().max().item()


# The wrap


def test_the_wrap_alone_changes_nothing(run: SmallPipeline) -> None:
    model = run.model.unstacked()
    before = _logits(model)
    assert lossless_difference(model, rows_by_sublayer(run.parts), TOKENS) <= 2e-5
    assert torch.equal(_logits(model), before)
    assert not any(isinstance(module, ShareLinear) for module in model.modules())


def test_a_wrap_that_loses_something_is_noticed(
    run: SmallPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, d_out = run.parts[-1].sublayer.name, run.parts[-1].sublayer.shape[0]
    half = d_out // 2
    swapped = {**rows_by_sublayer(run.parts), name: [Rows(half, d_out - half), Rows(0, half)]}
    assert lossless_difference(run.model.unstacked(), swapped, TOKENS) <= 2e-5
    monkeypatch.setattr(surgery, "inverse_order", lambda rows: None)  # the halves stay swapped
    assert lossless_difference(run.model.unstacked(), swapped, TOKENS) > 1e-2


def test_all_that_the_family_promises_is_selected(run: SmallPipeline) -> None:
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


def test_stored_numbers_are_those_in_the_files(run: SmallPipeline) -> None:
    in_files = sum(run.stored[name].numel() for name in run.factors())
    model = run.model.unstacked()
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


def test_what_was_asked_is_removed_and_one_rank_more_would_not_be(run: SmallPipeline) -> None:
    assert run.metrics["removed_fraction"] >= run.settings.fit.removed
    for one in run.fitted.groups:
        a_rank = one.group.d_in + one.group.d_out
        assert one.rank * a_rank <= (1 - run.settings.fit.removed) * one.group.n_weights
        assert (one.rank + 1) * a_rank > (1 - run.settings.fit.removed) * one.group.n_weights


def test_the_files_hold_the_model_without_its_original_weights_and_nothing_else(
    run: SmallPipeline,
) -> None:
    fitted = {f"{sublayer.name}.weight" for sublayer in run.classification.selected}
    model = run.model.unstacked()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert run.stored.keys() == (model.state_dict().keys() - fitted - tied) | run.factors()
    for name in run.stored.keys() - run.factors():
        assert torch.equal(run.stored[name], model.state_dict()[name]), name
    numels = sum(tensor.numel() for tensor in run.stored.values())
    n_bytes = sum(path.stat().st_size for path in run.compressed.glob("*.safetensors"))
    n_headers = 200 * len(run.stored)
    assert 4 * numels < n_bytes < 4 * numels + n_headers


def test_companions_come_along_and_the_manifest_does_not(run: SmallPipeline) -> None:
    ours = {path.name for path in run.compressed.iterdir() if path.suffix != ".safetensors"}
    theirs = {path.name for path in run.weights.iterdir() if path.suffix != ".safetensors"}
    assert ours == theirs - {MANIFEST} | {INDEX_FILE}


def test_every_basis_is_on_disk_once_and_in_memory_once(run: SmallPipeline) -> None:
    bases = [group.tensors["basis"] for group in run.index.groups]
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
        assert {user.form.kind for user in users} == {"low_rank"}
        assert len({id(user.form.basis) for user in users}) == 1
        pointers.append(users[0].form.basis.data_ptr())
        assert {user.state for user in users} == {State.COMPRESSED}
    assert not parts
    assert len(set(pointers)) == len(pointers)
    assert sum(p.numel() for p in model.parameters()) == sum(
        tensor.numel() for tensor in run.stored.values()
    )


def test_only_shared_families_share_and_only_with_their_neighbours(run: SmallPipeline) -> None:
    for group in run.index.groups:
        numbers = [_numbers(part.sublayer) for part in group.parts]
        if run.settings.fit.share_experts and len(numbers[0]) == 2:
            assert numbers == [(numbers[0][0], expert) for expert in range(4)]
            continue
        layers = [layer for layer, *_ in numbers]
        assert layers == list(range(layers[0], layers[0] + len(layers)))
        assert len({tuple(expert) for _, *expert in numbers}) == 1
        assert len(layers) == 1 or group.family in run.settings.fit.shared
    if run.settings.fit.method == "basis_sharing":
        assert any(len(group.parts) == run.settings.fit.group_size for group in run.index.groups)


def _numbers(name: str) -> tuple[int, ...]:
    """Of the layer, and of the expert if it is one."""
    return tuple(int(step) for step in name.split(".") if step.isdigit())


# What it computes


@torch.no_grad()
def _hooked_moments(run: SmallPipeline) -> dict[str, Moment]:
    """Moments by sublayer, from hooks on the dense model."""
    model, seen = run.model.unstacked(), {}
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


def test_products_and_losses_are_those_of_the_dense_weights_and_hooked_moments(
    run: SmallPipeline,
) -> None:
    model, moments = run.model.unstacked(), _hooked_moments(run)
    whitened = run.settings.fit.method != "svd"
    loss = energy = 0.0
    for group in run.index.groups:
        weights = [dense_rows(model, p.sublayer, p.rows) for p in group.parts]
        # Experts have seen tokens of their own, and not as many as each other.
        own = {part.sublayer: moments[part.sublayer] for part in group.parts}.values()
        pooled = sum(one.total for one in own) / sum(one.n_tokens for one in own)
        moment = Moment(pooled, torch.zeros(len(pooled)).double(), 1, "pooled")
        factors = fit_rank(weights, moment if whitened else None, group.rank)
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


def test_the_compressed_model_is_the_dense_one_with_the_products_put_in(run: SmallPipeline) -> None:
    by_hand = run.model.unstacked()
    original = _logits(by_hand)
    for group in run.index.groups:
        rows = iter(run.product(group).split([len(part.rows) for part in group.parts]))
        for part in group.parts:
            view = dense_rows(by_hand, part.sublayer, part.rows)
            view.copy_(next(rows))
    expected = _logits(by_hand)
    assert not _close(expected, original, 1e-2)  # putting them in made a difference
    assert _close(_logits(load_compressed(run.compressed)), expected, 1e-4)


def test_the_compressed_model_generates_what_its_logits_say(run: SmallPipeline) -> None:
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
def test_the_dtype_is_that_of_every_parameter(run: SmallPipeline, dtype: torch.dtype) -> None:
    model = load_compressed(run.compressed, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    if dtype == torch.float64:
        reference = _logits(load_compressed(run.compressed))
        assert _close(_logits(model), reference, 1e-3)


def test_tied_embeddings_stay_tied_and_others_apart(run: SmallPipeline) -> None:
    model = load_compressed(run.compressed)
    one, other = (m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert (one.data_ptr() == other.data_ptr()) == model.config.tie_word_embeddings
    assert ("lm_head.weight" in run.stored) != model.config.tie_word_embeddings


def test_half_precision_weights_become_half_precision_factors(
    small_pipeline: MakeSmallPipeline,
) -> None:
    run = small_pipeline("llama", SVD, PreTrainedModel.bfloat16)
    assert {tensor.dtype for tensor in run.stored.values()} == {torch.bfloat16}
    assert {p.dtype for p in load_compressed(run.compressed).parameters()} == {torch.bfloat16}
    model = run.model.unstacked()
    for group in run.index.groups:
        (part,) = group.parts
        weight = dense_rows(model, part.sublayer, part.rows)
        factors = fit_rank([weight], None, group.rank)
        expected = factors.coefficients[0] @ factors.basis
        assert _close(run.product(group), expected, 4 * torch.finfo(torch.bfloat16).eps)


def _make_low_rank(model: PreTrainedModel, rank: int = 6) -> None:
    """Give every linear sublayer of every block a weight of rank `rank`, exactly that."""
    generator = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            rows, columns = module.weight.shape
            left = torch.randn(rows, rank, generator=generator)
            right = torch.randn(rank, columns, generator=generator)
            module.weight.data = 0.2 / rank**0.5 * left @ right


@pytest.mark.parametrize("changes", [SVD, SVD_LLM, SHARE], ids=["svd", "svd_llm", "share"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_have_the_rank_that_is_kept_lose_nothing(
    small_pipeline: MakeSmallPipeline, family: str, changes: Mapping[str, Any]
) -> None:
    run = small_pipeline(family, changes, _make_low_rank, CALIBRATION, 4)
    assert min(one.rank for one in run.fitted.groups) >= 6
    assert run.metrics["removed_fraction"] >= 0.2
    assert run.metrics["relative_loss"] < 1e-9
    assert _close(_logits(load_compressed(run.compressed)), _logits(run.model.unstacked()), 1e-4)
    compressed = {"compressed": load_compressed(run.compressed)}
    fidelity = compare(run.model.unstacked(), compressed, TOKENS, batch=2)["compressed"]
    assert fidelity.kl_mean < 1e-6
    assert fidelity.compressed_perplexity == pytest.approx(fidelity.dense_perplexity, rel=1e-4)


def test_continuations_of_equal_models_are_equal(
    run: SmallPipeline, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = load_compressed(run.compressed)
    texts = continuations({"one": model, "other": model}, tokenizer, "the union", 5)
    inputs = tokenizer("the union", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == {"one": expected, "other": expected}
