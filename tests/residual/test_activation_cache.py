"""What a forward pass adds to the stream sums to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SIZES, random_model, small_config
from passing import D_VOCAB, SIDE_BY_SIDE, TOKENS, assert_rounding, passed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from sharebasis.errors import StreamError
from sharebasis.residual.cache import Observer, run_with_cache
from sharebasis.residual.names import act_name
from sharebasis.residual.norm import neuron_results
from sharebasis.residual.norm_probe import probe_norm

POSITIONS = {"gpt2", "gpt_neo", "gpt_bigcode", "gpt_bigcode, many kv heads", "opt"}
CHANGED_ON_THE_WAY = {"glm4", "gemma2", "gemma3_text", "olmo2", "granite"}
"""Families that multiply or norm what they add."""
NO_NORM_BEFORE = {"olmo2"}
LATENT = {"deepseek_v3"}
MIXTURES = {name for name, sizes in SIZES.items() if any("experts" in key for key in sizes)}


# The sum


@pytest.mark.parametrize("name", SIZES)
def test_the_pass_is_the_models_own(name: str) -> None:
    model = passed(name)[1].anatomy.model
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
    assert not stack.requires_grad
    wrong = (TOKENS + 1) % D_VOCAB
    cap = cache.anatomy.unembedding.cap
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
    assert_rounding(found, cache["out", 1, "ln1"], 4 * cache["out", 1, "ln1"])
    views = cache.anatomy.layers[1]
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


# Names, selection, slices


def test_names_of_activations() -> None:
    assert act_name("z", 3) == "blocks.3.attn.hook_z"
    assert act_name("post", 0) == "blocks.0.mlp.hook_post"
    assert act_name("scale", 2, "ln2") == "blocks.2.ln2.hook_scale"
    assert act_name("scale") == "ln_final.hook_scale"
    assert act_name("key", 1) == "blocks.1.attn.hook_k"
    assert act_name("embed") == "hook_embed"


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        ("resid_pre", {f"blocks.{i}.hook_resid_pre" for i in range(3)}),
        (["blocks.1.attn.hook_z"], {"blocks.1.attn.hook_z", "blocks.1.hook_attn_factor"}),
        (
            ["scale"],
            {"ln_final.hook_scale", *(f"blocks.{i}.ln1.hook_scale" for i in range(3))},
        ),
        (lambda key: key.endswith("hook_q"), {f"blocks.{i}.attn.hook_q" for i in range(3)}),
        (
            ["result"],
            {f"blocks.{i}.{key}" for i in range(3) for key in ("attn.hook_z", "hook_attn_factor")},
        ),
    ],
)
def test_only_what_is_named_is_kept(names: Any, kept: set[str]) -> None:
    _, cache = run_with_cache(passed("gemma2")[1].anatomy.model, TOKENS, names)
    assert set(cache) == kept
    whole = passed("gemma2")[1]
    for key, x in cache.items():
        assert torch.equal(x, whole[key])


def test_what_is_not_there_is_named_with_what_is() -> None:
    _, cache = run_with_cache(passed("llama")[1].anatomy.model, TOKENS, ["z", "resid_pre"])
    with pytest.raises(StreamError, match=r"blocks\.1\.mlp\.hook_post is not in .*hook_z"):
        _ = cache["post", 1]
    with pytest.raises(StreamError, match="resid_mid is not in this cache"):
        _ = passed("gptj")[1]["resid_mid", 0]
    with pytest.raises(StreamError, match="Nothing norms what the attention of layer 1 reads"):
        passed("olmo2")[1].decompose_resid(1, apply_ln=True)
    with pytest.raises(StreamError, match="There is no layer 4: there are 3"):
        passed("llama")[1].decompose_resid(4)


def test_layers_count_from_the_end_and_a_batch_can_be_cut() -> None:
    cache = passed("gpt2")[1]
    assert torch.equal(cache["z", -1], cache["blocks.2.attn.hook_z"])
    second = cache.apply_slice_to_batch_dim(slice(1, 2)).remove_batch_dim()
    assert torch.equal(second["resid_post", -1], cache["resid_post", 2][1])
    assert torch.equal(cache.apply_slice_to_batch_dim(1)["z", 0], second["z", 0])
    for call in ("decompose_resid", "stack_head_results", "get_full_resid_decomposition"):
        assert_rounding(getattr(second, call)(), getattr(cache, call)()[:, 1])
        assert_rounding(
            getattr(second, call)(apply_ln=True), getattr(cache, call)(apply_ln=True)[:, 1]
        )
    with pytest.raises(StreamError, match="The cache holds 2 sequences"):
        cache.remove_batch_dim()


def test_inputs_of_heads_are_the_stream_once_for_each() -> None:
    cache = passed("llama")[1]
    assert cache["q_input", 1].shape == (2, 12, 4, 32)
    assert cache["k_input", 1].shape == cache["v_input", 1].shape == (2, 12, 2, 32)
    assert torch.equal(cache["q_input", 1][:, :, 3], cache["resid_pre", 1])
    assert cache["q_input", 1].untyped_storage().data_ptr() == (
        cache["resid_pre", 1].untyped_storage().data_ptr()
    )


# Streams that are forced


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "falcon", "bloom", "mixtral"])
def test_a_forced_pass_computes_every_component_on_given_inputs(name: str) -> None:
    """Each block of another model by itself, on the first one's streams."""
    given = passed(name)[1]
    other = Observer(random_model(name, D_VOCAB, seed=1))
    _, forced = other(TOKENS, forced=given)
    _, itself = Observer(given.anatomy.model)(TOKENS, forced=given)
    for i in range(3):
        assert torch.equal(forced["resid_pre", i], given["resid_pre", i])
        for out in ("attn_out", "mlp_out"):
            assert_rounding(itself[out, i], given[out, i])
            assert not torch.allclose(forced[out, i], given[out, i], rtol=0.1)
    # By hand: norm, MLP and what is between it and the stream, on the stream in the middle.
    if name == "llama":
        block: Any = other.model.get_submodule("model.layers.1")
        with torch.no_grad():
            mid = given["resid_mid", 1]
            assert_rounding(forced["mlp_out", 1], block.mlp(block.post_attention_layernorm(mid)))


# What cannot be taken apart


def test_a_norm_after_the_sum_is_refused() -> None:
    config = small_config("opt")
    config.do_layer_norm_before = False
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(StreamError, match="This model's stream is not a plain sum"):
        run_with_cache(model, TOKENS)


def test_a_sum_that_lacks_something_is_refused() -> None:
    model = random_model("llama", D_VOCAB)
    layer: Any = model.get_submodule("model.layers.1")
    layer.register_forward_hook(lambda module, args, output: output * 1.001)
    with pytest.raises(StreamError, match=r"model\.layers\.1 and what its sublayers were seen"):
        run_with_cache(model, TOKENS)


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_is_what_it_does(kind: Any, width: int) -> None:
    module = kind(width)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    norm = probe_norm(module, torch.empty(width), "here")
    x = torch.randn(5, width)
    with torch.no_grad():
        y = module(x)
        assert_rounding(norm.weight, module.weight)
        assert_rounding(norm.linear(x, norm.scale(x, y)) + norm.bias, y, 2 * y)
        u = torch.randn(5, width)
        ahead = (norm.linear(x, norm.scale(x, y)) * u).sum(-1, keepdim=True)
        back = (x * norm.pull_back(u)).sum(-1, keepdim=True) / norm.scale(x, y)
        assert_rounding(back, ahead, 10 * ahead)


@pytest.mark.parametrize("module", [nn.Tanh(), nn.GroupNorm(2, 8), nn.Softmax(-1)])
def test_what_is_no_norm_is_refused(module: nn.Module) -> None:
    class Each(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return module(x.view(-1, 8)).view(x.shape)

    with pytest.raises(StreamError, match=r"here .Each. is neither a LayerNorm nor an RMSNorm"):
        probe_norm(Each(), torch.empty(8), "here")


@pytest.mark.parametrize("scaled", [False, True])
def test_the_tensor_of_neurons_times_width_is_never_made_for_a_projection(scaled: bool) -> None:
    """It would have 2**39 numbers."""
    n_tokens, d_mlp, d_model = 2**10, 2**17, 2**12
    with torch.device("meta"):
        factor = torch.empty(n_tokens, d_model) if scaled else None
        post, w_out = torch.empty(n_tokens, d_mlp), torch.empty(d_mlp, d_model)
        with Largest() as largest:
            neuron_results(post, w_out, factor, torch.empty(d_model, 2))
    assert largest.numbers <= d_mlp * max(d_model, 2 * n_tokens)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operator makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(x.numel() for x in tree_leaves(output)))
        return output
