"""What a forward pass adds to the stream: it sums, and it is what TransformerLens says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache as remembered
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, MakeDirectory, MakeSettings, fit_at_once, random_model, small_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sharebasis.activation_cache import ActivationCache, Observer, act_name, run_with_cache
from sharebasis.activation_capture import probe_norm
from sharebasis.errors import StreamError
from sharebasis.residual import Norm, head_results, neuron_results

D_VOCAB = 96
TOKENS = torch.randint(1, D_VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))

SIDE_BY_SIDE = {"gpt_neox", "codegen", "gptj", "falcon", "phi", "cohere", "cohere2"}
SIDE_BY_SIDE |= {"falcon, one kv head", "falcon, old layout"}
POSITIONS = {"gpt2", "gpt_neo", "gpt_bigcode", "gpt_bigcode, many kv heads", "opt"}
CHANGED_ON_THE_WAY = {"glm4", "gemma2", "gemma3_text", "olmo2", "granite"}
"""Families that multiply or norm what they add."""
NO_NORM_BEFORE = {"olmo2"}
LATENT = {"deepseek_v3"}
MIXTURES = {name for name, sizes in SIZES.items() if any("experts" in key for key in sizes)}


@remembered
def passed(name: str) -> tuple[Tensor, ActivationCache]:
    """Logits and cache of a random model; not to be changed."""
    return run_with_cache(random_model(name, D_VOCAB), TOKENS)


def assert_rounding(a: Tensor, b: Tensor, scale: Tensor | None = None) -> None:
    """Equal up to what float32 rounding makes of the largest number."""
    largest = (b if scale is None else scale).abs().max().item()
    torch.testing.assert_close(a, b, rtol=0, atol=5e-6 * largest)


# The sum


@pytest.mark.parametrize("name", SIZES)
def test_the_pass_is_the_models_own(name: str) -> None:
    model = random_model(name, D_VOCAB)
    with torch.no_grad():
        assert torch.equal(passed(name)[0], model(input_ids=TOKENS, use_cache=False).logits)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", SIZES)
def test_components_sum_to_the_stream_at_every_depth(name: str) -> None:
    _, cache = passed(name)
    for layer in range(cache.n_layers + 1):
        stream = cache["resid_pre", layer] if layer < cache.n_layers else cache["resid_post", -1]
        assert_rounding(cache.decompose_resid(layer).sum(0), stream)
        neurons = name not in MIXTURES
        assert_rounding(
            cache.get_full_resid_decomposition(layer, expand_neurons=neurons).sum(0), stream
        )
        if ("resid_mid", layer % cache.n_layers) in cache and layer < cache.n_layers:
            found = cache.decompose_resid(layer, mlp_input=True).sum(0)
            assert_rounding(found, cache["resid_mid", layer])
            found = cache.get_full_resid_decomposition(
                layer, mlp_input=True, expand_neurons=neurons
            )
            assert_rounding(found.sum(0), cache["resid_mid", layer])
    assert (("resid_mid", 0) in cache) == (name not in SIDE_BY_SIDE)
    assert ("pos_embed" in cache) == (name in POSITIONS)
    assert (("attn_factor", 1) in cache) == (name in CHANGED_ON_THE_WAY)


@pytest.mark.parametrize("name", SIZES)
def test_attributions_and_bias_sum_to_the_logit(name: str) -> None:
    logits, cache = passed(name)
    stack, labels = cache.get_full_resid_decomposition(
        expand_neurons=name not in MIXTURES, return_labels=True
    )
    assert len(stack) == len(labels) == len(set(labels))
    wrong = (TOKENS + 1) % D_VOCAB
    cap = cache._observer.unembedding.cap
    if cap is not None:
        logits = cap * torch.atanh(logits / cap)
    assert (cap is not None) == (name == "gemma2")

    def of(tokens: Tensor) -> Tensor:
        return logits.gather(-1, tokens[..., None])[..., 0]

    found = cache.logit_attrs(stack, TOKENS).sum(0) + cache.logit_bias(TOKENS)
    assert_rounding(found, of(TOKENS), 5 * logits)
    found = cache.logit_attrs(stack, TOKENS, wrong).sum(0) + cache.logit_bias(TOKENS, wrong)
    assert_rounding(found, of(TOKENS) - of(wrong), 5 * logits)


@pytest.mark.parametrize("name", sorted(SIZES.keys() - NO_NORM_BEFORE - LATENT))
def test_what_is_normed_is_what_the_next_layer_reads(name: str) -> None:
    """Behind the norm, components and its bias sum to the input of W_Q."""
    _, cache = passed(name)
    stack = cache.decompose_resid(1)
    place = "blocks.1.ln1"
    found = cache.apply_ln_to_stack(stack, 1).sum(0) + cache.norms[place].bias
    assert_rounding(found, cache["normalized", 1, "ln1"], 4 * cache["normalized", 1, "ln1"])
    views = cache._observer.layers[1]
    q = torch.einsum("bpd,hdk->bphk", found, views.W_Q)
    q = q if views.b_Q is None else q + views.b_Q
    assert_rounding(q.detach(), cache["q", 1], 4 * cache["q", 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "granite", "falcon", "mixtral"])
def test_narrow_types_pass_too(name: str, dtype: torch.dtype) -> None:
    model = random_model(name, D_VOCAB).to(dtype)
    logits, cache = run_with_cache(model, TOKENS)
    assert logits.isfinite().all()
    stream = cache["resid_post", -1].float()
    total = cache.decompose_resid().float().sum(0)
    error = (total - stream).abs().max() / stream.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


# TransformerLens

ORACLE = ("gpt2", "llama", "gpt_neox", "qwen2", "gemma2", "qwen3", "olmo2", "phi", "granite")


@remembered
def theirs(name: str) -> tuple[Any, Any]:
    """TransformerLens's model of the same weights, and its cache."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = random_model(name, D_VOCAB)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    with torch.no_grad():
        return bridge, bridge.run_with_cache(TOKENS)[1]


@pytest.mark.parametrize("name", ORACLE)
def test_activations_are_those_of_transformer_lens(name: str) -> None:
    cache, other = passed(name)[1], theirs(name)[1]
    ours = {key for key in cache if not key.endswith("_factor")}
    common = ours & set(other.keys())
    assert len(common) >= 0.8 * len(ours), sorted(ours - common)
    for key in sorted(common):
        assert_rounding(cache[key], other[key].detach().view(cache[key].shape))


CALLS: Mapping[str, Callable[[Any], Any]] = {
    "accumulated": lambda c: c.accumulated_resid(return_labels=True),
    "accumulated, mid": lambda c: c.accumulated_resid(2, incl_mid=True, return_labels=True),
    "accumulated, up to an MLP": lambda c: c.accumulated_resid(
        1, incl_mid=True, mlp_input=True, return_labels=True
    ),
    "accumulated, one position": lambda c: c.accumulated_resid(pos_slice=-1),
    "logit lens": lambda c: c.accumulated_resid(apply_ln=True),
    "decomposed": lambda c: c.decompose_resid(return_labels=True),
    "decomposed, layer 2": lambda c: c.decompose_resid(2, return_labels=True),
    "decomposed, MLP input": lambda c: c.decompose_resid(1, mlp_input=True, return_labels=True),
    "decomposed, attention": lambda c: c.decompose_resid(mode="attn", return_labels=True),
    "decomposed, MLPs": lambda c: c.decompose_resid(
        mode="mlp", incl_embeds=False, return_labels=True
    ),
    "heads": lambda c: c.stack_head_results(return_labels=True),
    "heads, rest": lambda c: c.stack_head_results(
        2, incl_remainder=True, pos_slice=slice(1, 5), return_labels=True
    ),
    "neurons": lambda c: c.stack_neuron_results(2, return_labels=True, incl_remainder=True),
    "some neurons": lambda c: c.stack_neuron_results(3, neuron_slice=slice(1, 20, 3)),
    "neurons, along one": lambda c: c.stack_neuron_results(3, project_output_onto=DIRECTIONS[:, 0]),
    "neurons, along some": lambda c: c.stack_neuron_results(
        2, project_output_onto=DIRECTIONS, incl_remainder=True
    ),
    "all, neurons": lambda c: c.get_full_resid_decomposition(return_labels=True),
    "all, MLPs": lambda c: c.get_full_resid_decomposition(
        2, expand_neurons=False, return_labels=True
    ),
    "all, along some": lambda c: c.get_full_resid_decomposition(
        3, project_output_onto=DIRECTIONS, return_labels=True
    ),
    "all, along one": lambda c: c.get_full_resid_decomposition(
        1, project_output_onto=DIRECTIONS[:, 1]
    ),
    "stacked": lambda c: c.stack_activation("z"),
}
DIRECTIONS = torch.randn(32, 3, generator=torch.Generator().manual_seed(5))
MID = {"accumulated, mid", "accumulated, up to an MLP", "decomposed, MLP input"}
NOT_SCALED = "TransformerLens leaves out of heads and neurons what norms what attention adds"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ORACLE)
def test_methods_are_those_of_transformer_lens(name: str, call: str) -> None:
    if name in SIDE_BY_SIDE and call in MID:
        pytest.skip("no stream between attention and an MLP that does not read it")
    ours = CALLS[call](passed(name)[1])
    with torch.no_grad():
        wanted = CALLS[call](theirs(name)[1])
    if isinstance(wanted, tuple):
        assert ours[1] == wanted[1]
        ours, wanted = ours[0], wanted[0]
    assert ours.shape == wanted.shape
    assert_rounding(ours.detach(), wanted)
