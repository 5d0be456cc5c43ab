"""What a forward pass adds to the stream is what TransformerLens says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache as remembered
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from passing import D_VOCAB, SIDE_BY_SIDE, TOKENS, assert_rounding, passed
from torch import Tensor
from transformer_lens.utilities import Slice, get_act_name

from sharebasis.errors import StreamError
from sharebasis.residual.cache import ActivationCache, run_with_cache
from sharebasis.residual.names import act_name

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
NORMED_AFTER = {"gemma2", "olmo2"}
IN_PARTS = {call for call in CALLS if "heads" in call or "neurons" in call or "all" in call}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ORACLE)
def test_methods_are_those_of_transformer_lens(name: str, call: str) -> None:
    if name in SIDE_BY_SIDE and call in MID:
        pytest.skip("no stream between attention and an MLP that does not read it")
    if name in NORMED_AFTER and call in IN_PARTS:
        pytest.skip("TransformerLens leaves the norm out of heads and neurons; see the next test")
    ours = CALLS[call](passed(name)[1])
    with torch.no_grad():
        compare(ours, CALLS[call](theirs(name)[1]))


ARGUMENTS: Sequence[tuple[str, tuple[Any, ...], Mapping[str, Any]]] = [
    ("accumulated_resid", (None, False, True), {}),
    ("accumulated_resid", (None, True, True, (1, 5)), {}),
    ("accumulated_resid", (2, True, False, (1, 9, 2), True, True), {}),
    ("accumulated_resid", (-1,), {"pos_slice": (3,)}),
    ("accumulated_resid", (3,), {"pos_slice": [1, 4]}),
    ("accumulated_resid", (), {"pos_slice": torch.tensor([4, 1])}),
    ("accumulated_resid", (), {"pos_slice": torch.arange(12) % 3 == 0}),
    ("accumulated_resid", (), {"pos_slice": np.array([4, 1])}),
    ("accumulated_resid", (), {"pos_slice": np.int64(2)}),
    ("accumulated_resid", (), {"pos_slice": torch.tensor(2)}),
    ("accumulated_resid", (), {"pos_slice": Slice((1, 5))}),
    ("accumulated_resid", (), {"pos_slice": slice(1, -1)}),
    ("decompose_resid", (2, False, "attn", False, (1, 5), False, True), {}),
    ("decompose_resid", (2,), {"mode": "mlp", "pos_slice": None}),
    ("stack_head_results", (-1, True, True, (1, 5)), {}),
    ("stack_head_results", (2,), {"pos_slice": [3]}),
    ("stack_head_results", (2, True), {"pos_slice": 4, "incl_remainder": True}),
    ("stack_neuron_results", (2, (1, 5), (0, 6), True), {}),
    ("stack_neuron_results", (2, 3, [1, 4, 5], True), {}),
    ("stack_neuron_results", (1, None, 7, True, True), {}),
    ("stack_neuron_results", (1,), {"pos_slice": Slice(2), "neuron_slice": None}),
    ("stack_neuron_results", (1,), {"neuron_slice": Slice(3), "return_labels": True}),
    ("get_full_resid_decomposition", (2, False, True, False, (1, 5), True), {}),
    ("get_full_resid_decomposition", (2, False, False), {"pos_slice": -1}),
    ("stack_activation", ("z", 2), {}),
    ("stack_activation", ("scale", -1, "ln2"), {}),
]


def compare(ours: Any, wanted: Any) -> None:
    if isinstance(wanted, tuple):
        assert ours[1] == wanted[1]
        ours, wanted = ours[0], wanted[0]
    assert ours.shape == wanted.shape
    assert_rounding(ours.detach(), wanted.detach())


@pytest.mark.parametrize(("method", "args", "kwargs"), ARGUMENTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_arguments_mean_what_they_mean_to_transformer_lens(
    name: str, method: str, args: Any, kwargs: Any
) -> None:
    ours, wanted = (getattr(x[1], method)(*args, **kwargs) for x in (passed(name), theirs(name)))
    compare(ours, wanted)


@pytest.mark.parametrize(
    "batch_slice",
    [0, -1, (0, 1), (1,), [1, 0], None, Slice((0, 1)), torch.tensor([1]), np.int64(1)],
    ids=str,
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sequences_are_chosen_as_by_transformer_lens(name: str, batch_slice: Any) -> None:
    ours, wanted = (
        cache.apply_slice_to_batch_dim(batch_slice) for _, cache in (passed(name), theirs(name))
    )
    assert ours.has_batch_dim == wanted.has_batch_dim
    for method, args, kwargs in ARGUMENTS[1::4]:
        compare(getattr(ours, method)(*args, **kwargs), getattr(wanted, method)(*args, **kwargs))


KEYS = [
    "z1", "k1a", "pre2", "post0m", "scale1ln2", "normalized2ln1", "embed", ("embed",), "pos_embed",
    ("z", 1), ("z", -1), ("z", 1, None), ("key", 0), ("mlp_post", 2), ("scale", 1, "ln1"), "scale",
    "blocks.1.attn.hook_z", ("resid_pre", 1, "b"), ("result", 2, "attn"),
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_keys_are_those_of_transformer_lens(key: Any) -> None:
    theirs("gpt2")[1].compute_head_results()
    compare(passed("gpt2")[1][key], theirs("gpt2")[1][key])
    assert passed("gpt2")[1].get(key) is not None
    arguments = key if isinstance(key, tuple) else (key,)
    assert act_name(*arguments) == get_act_name(*arguments)


@pytest.mark.parametrize("key", ["attn", "attn1", "pattern3a", ("attn", 0), "mid1", "rot_q"])
def test_what_is_never_kept_is_called_the_same_and_is_refused(key: Any) -> None:
    arguments = key if isinstance(key, tuple) else (key,)
    cache = passed("gpt2")[1]
    assert act_name(*arguments) == get_act_name(*arguments)
    with pytest.raises(StreamError, match=f"{get_act_name(*arguments)} is not in this cache"):
        _ = cache[key]
    assert cache.get(key) is None
    assert cache.get(key, 5) == 5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_is_a_mapping_as_that_of_transformer_lens(name: str) -> None:
    ours, other = passed(name)[1], theirs(name)[1]
    assert list(ours.keys()) == list(ours) == [key for key, _ in ours.items()]
    assert all(x is ours[key] for key, x in zip(ours, ours.values(), strict=True))
    assert repr(ours) == f"ActivationCache with keys {list(ours)}"
    assert (ours.has_embed, ours.has_pos_embed) == (other.has_embed, other.has_pos_embed)


def test_a_cache_changes_in_place_where_that_of_transformer_lens_does() -> None:
    for cache in (passed("gpt2")[1], theirs("gpt2")[1]):
        one = cache.apply_slice_to_batch_dim([1])
        assert one.remove_batch_dim() is one
        assert not one.has_batch_dim
        assert torch.equal(one["z", 0], cache["z", 0][1])
        assert one.to("meta") is one
        assert {x.device.type for x in one.values()} == {"meta"}
        assert {x.device.type for x in cache.values()} == {"cpu"}
        assert cache.has_batch_dim


@pytest.mark.parametrize("pos_slice", ["1:5", True, 1.5, torch.zeros(2, 2, dtype=torch.long)])
def test_what_is_no_slice_is_refused(pos_slice: Any) -> None:
    with pytest.raises(StreamError, match="is no slice"):
        passed("gpt2")[1].accumulated_resid(pos_slice=pos_slice)


def test_what_would_be_overlooked_is_refused() -> None:
    model = passed("gpt2")[1].anatomy.model
    for inputs in ({"names_filter": "z"}, {"stop_at_layer": 1}, {"remove_batch_dim": True}):
        with pytest.raises(StreamError, match=f"{next(iter(inputs))}: no argument of a GPT2LM"):
            run_with_cache(model, TOKENS, **inputs)
    for names in ("bogus", ["z", "bogus"], "blocks.3.attn.hook_z", ["blocks.0.hook_z"], "attn"):
        with pytest.raises(StreamError, match="No activation of 3 layers is called"):
            run_with_cache(model, TOKENS, names)
    known = {"attention_mask": torch.ones_like(TOKENS), "position_ids": torch.arange(12)[None]}
    assert len(run_with_cache(model, TOKENS, "z2", is_causal=True, **known)[1]) == 1
    assert set(run_with_cache(model, TOKENS, "blocks.1.hook_q_input")[1]) == {
        "blocks.1.hook_resid_pre"
    }
    unchecked: Any = inspect.unwrap(ActivationCache.decompose_resid)
    with pytest.raises(StreamError, match="no mode 'bogus': there are all, attn, mlp"):
        unchecked(passed("gpt2")[1], mode="bogus")


@pytest.mark.parametrize("name", sorted(NORMED_AFTER))
def test_heads_and_neurons_of_a_norm_after_them_are_transformer_lenss_times_that_norm(
    name: str,
) -> None:
    cache, other = passed(name)[1], theirs(name)[1]
    for i in range(3):
        norms: Any = passed(name)[1].anatomy.model.get_submodule(f"model.layers.{i}")
        before = other.stack_head_results(i + 1)[-4:].detach()
        epsilon = norms.self_attn.config.rms_norm_eps
        scale = (before.sum(0).square().mean(-1, keepdim=True) + epsilon).sqrt()
        gain = norms.post_attention_layernorm.weight + (name == "gemma2")
        assert_rounding(cache["result", i].movedim(-2, 0), (before / scale * gain).detach())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "qwen2"])
def test_logit_attributions_are_those_of_transformer_lens_with_folded_norms(name: str) -> None:
    """It has no norm weights then, so that its attributions are whole."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = random_model(name, D_VOCAB)
    ours = passed(name)[1]
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    bridge.enable_compatibility_mode(
        disable_warnings=True,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    with torch.no_grad():
        other = bridge.run_with_cache(TOKENS)[1]
        wrong = (TOKENS + 1) % D_VOCAB
        for call in ("decompose_resid", "stack_head_results"):
            stack, theirs_ = getattr(ours, call)(), getattr(other, call)()
            wanted = other.logit_attrs(theirs_, TOKENS)
            assert_rounding(ours.logit_attrs(stack, TOKENS), wanted, 4 * wanted)
            wanted = other.logit_attrs(theirs_, TOKENS, wrong)
            assert_rounding(ours.logit_attrs(stack, TOKENS, wrong), wanted, 4 * wanted)
            one = other.logit_attrs(theirs_[..., -1, :], 5, pos_slice=-1)
            assert_rounding(ours.logit_attrs(stack[..., -1, :], 5, pos_slice=-1), one, 4 * one)
        stack, theirs_ = ours.decompose_resid(), other.decompose_resid()
        for tokens in (7, torch.tensor(7), TOKENS[:, 3], TOKENS[:1], TOKENS[0], TOKENS):
            wanted = other.logit_attrs(theirs_, tokens)
            assert_rounding(ours.logit_attrs(stack, tokens), wanted, 4 * wanted)
        for cut in (1, (0, 1), [1, 0], Slice((1, 2))):
            wanted = other.logit_attrs(theirs_, 7, None, None, cut)
            found = ours.logit_attrs(stack, 7, None, None, cut)
            assert found.shape == wanted.shape
            assert_rounding(found, wanted, 4 * wanted)
        for tokens, incorrect in ((TOKENS, 7), (TOKENS[:, 0], TOKENS), (5, TOKENS)):
            with pytest.raises(ValueError, match="same shape"):
                other.logit_attrs(theirs_, tokens, incorrect)
            with pytest.raises(StreamError, match="shapes have to be the same"):
                ours.logit_attrs(stack, tokens, incorrect)
        with pytest.raises(RuntimeError):
            other.logit_attrs(theirs_, TOKENS[:, :5])
        with pytest.raises(StreamError, match=r"shape \[2, 5\] do not go with .* \[2, 12\]"):
            ours.logit_attrs(stack, TOKENS[:, :5])
        folded = other.stack_neuron_results(3, apply_ln=True, project_output_onto=bridge.W_U[:, :4])
        found = ours.stack_neuron_results(
            None, apply_ln=True, project_output_onto=model_w_u(name)[:, :4]
        )
        assert_rounding(found, folded, 4 * folded)


def model_w_u(name: str) -> Tensor:
    return passed(name)[1].anatomy.unembedding.w_u.detach()
