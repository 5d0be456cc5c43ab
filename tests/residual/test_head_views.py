"""W_Q and its like: TransformerLens's numbers, and what the model's attention and MLPs see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from conftest import SIZES, random_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from viewing import ATTENTION, CASES, D_VOCAB, MLA, MLP, by_head, model_of

from sharebasis.architecture import families
from sharebasis.model.experts import unstack
from sharebasis.residual.head_views import LayerViews, MlpViews, head_views

MIXTURES = [name for name, sizes in SIZES.items() if any("experts" in key for key in sizes)]

NOT_BUILT = {
    "falcon": "it reads a grouped Falcon's interleaved weight as blocks, one after the other",
    "gpt_bigcode, many kv heads": "it refuses a GPT-BigCode without multi_query",
}
"""What TransformerLens 4.3 does not know, and what it does instead."""
NO_ATTENTION = {
    **NOT_BUILT,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "it has no such weights for latent attention"),
}
NO_EXPERTS = "it has no W_in, W_gate and W_out of experts"


# TransformerLens

Bridge = Callable[[PreTrainedModel], Any]


@pytest.fixture(scope="module")
def bridge() -> Bridge:
    """Makes TransformerLens's model of one of ours, in the same memory; ours is of no use then."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    return lambda model: build_bridge_from_module(
        model, type(model).__name__, hf_config=model.config
    )


def taken(views: LayerViews, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    """Copies of views."""
    values = {name: getattr(views, name) for name in names}
    return {name: None if x is None else x.detach().clone() for name, x in values.items()}


def compare(ours: Mapping[str, Tensor | None], theirs: Any) -> None:
    for name, x in ours.items():
        other = getattr(theirs, name, None)  # an ungated MLP has no b_gate, where ours is None
        assert (x is None) == (other is None), name
        if x is not None:
            assert x.shape == other.shape, name
            assert torch.equal(x, other), name


@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_transformer_lens(case: str, bridge: Bridge) -> None:
    if case in NO_ATTENTION:
        pytest.skip(f"not known to TransformerLens: {NO_ATTENTION[case]}")
    model = model_of(case)
    ours = [taken(views, ATTENTION) for views in head_views(model)]
    for views, block in zip(ours, bridge(model).blocks, strict=True):
        compare(views, block.attn)


@pytest.mark.parametrize("case", CASES)
def test_the_mlp_is_that_of_transformer_lens(case: str, bridge: Bridge) -> None:
    if case in NOT_BUILT:
        pytest.skip(f"not known to TransformerLens: {NOT_BUILT[case]}")
    model = model_of(case)
    layers = head_views(model)
    n_dense = getattr(model.config, "first_k_dense_replace", 0) if case in MIXTURES else len(layers)
    assert [bool(views.experts) for views in layers] == [i >= n_dense for i in range(len(layers))]
    ours = [taken(views, MLP) for views in layers[:n_dense]]
    blocks = bridge(model).blocks
    for views, block in zip(ours, blocks[:n_dense], strict=True):
        compare(views, block.mlp)
    assert not [name for block in blocks[n_dense:] for name in MLP if hasattr(block.mlp, name)]
    if not n_dense:
        pytest.skip(f"not known to TransformerLens: {NO_EXPERTS}")


def test_what_is_said_to_be_unknown_to_transformer_lens_is(bridge: Bridge) -> None:
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        bridge(model_of("falcon"))
    with pytest.raises(AssertionError, match="only supports multi_query=True"):
        bridge(model_of("gpt_bigcode, many kv heads"))
    falcon = random_model("falcon", D_VOCAB, multi_query=False)  # the same model; it builds
    W_Q = head_views(falcon)[0].W_Q  # noqa: N806
    tokens = torch.arange(8)[None]
    logits = falcon(tokens).logits
    theirs = bridge(falcon)
    assert theirs.blocks[0].attn.W_Q.shape == W_Q.shape
    assert not torch.allclose(theirs.blocks[0].attn.W_Q, W_Q, atol=0.1)
    assert not torch.allclose(theirs(tokens), logits, atol=0.1)  # and it is not the same any more
    latent = bridge(model_of("deepseek_v3")).blocks[0].attn
    for name in MLA:
        with pytest.raises(NotImplementedError, match="MLA"):
            getattr(latent, name)
    with pytest.raises(ValueError, match="d_head"):
        _ = latent.W_O


def test_a_family_that_is_not_in_the_table_has_views_too(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "ARCHITECTURES", {})
    model = model_of("qwen2")
    ours = [taken(views, ATTENTION + MLP) for views in head_views(model)]
    for views, block in zip(ours, bridge(model).blocks, strict=True):
        compare({name: views[name] for name in ATTENTION}, block.attn)
        compare({name: views[name] for name in MLP}, block.mlp)


# By hand: what reaches the model's attention, and what its MLPs say

TAKEN_APART_BY = {"bloom": "_reshape", "falcon": "_split_heads"}
"""Of models that call no attention function: the method that takes a fused output apart."""
BY_HAND = [
    *(case for case in CASES if case.startswith(("bloom", "falcon", "gpt2", "phi3", "llama"))),
    "gpt_neox",
    "gpt_bigcode",
    "gpt_bigcode, many kv heads",
    "glm4",
    "qwen2",
    "mistral",
]


@torch.no_grad()
def run(model: PreTrainedModel, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every Linear and Conv1D, of one token a sequence: (batch, width)."""
    seen = {}

    def hook(name: str) -> Callable[..., None]:
        def remember(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # Copies: Falcon adds to its MLP's output in place.
            seen[name] = (args[0].flatten(0, -2).clone(), output.flatten(0, -2).clone())

        return remember

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            module.register_forward_hook(hook(name))
    model(input_ids=tokens, use_cache=False)
    return seen


def through(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight if bias is None else x @ weight + bias


def one(seen: Mapping[str, Any], layer: int, *ends: str) -> Any:
    """What is known of the one module of a layer whose name ends in one of these ways."""
    (name,) = (name for name in seen if f".{layer}." in name and name.endswith(ends))
    return seen[name]


@pytest.mark.parametrize("case", BY_HAND)
def test_the_model_attends_with_the_queries_keys_and_values_of_the_views(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One token stands at position 0, where rotary embeddings turn nothing.
    model, tokens = model_of(case), torch.arange(5)[:, None]
    layers = head_views(model)
    calls = []

    def spy(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            # q, k and v are what the method returns, or what the attention function is given.
            calls.append(args[:3] if isinstance(result, Tensor) else result)
            return result

        return call

    place, name = functional, "scaled_dot_product_attention"
    if method := TAKEN_APART_BY.get(model.config.model_type):
        attention = next(m for m in model.modules() if hasattr(m, method))
        place, name = type(attention), method
    monkeypatch.setattr(place, name, spy(getattr(place, name)))
    seen = run(model, tokens)
    assert len(calls) == len(layers) == 3
    for i, (views, qkv) in enumerate(zip(layers, calls, strict=True)):
        x, _ = one(seen, i, "query_key_value", "c_attn", "qkv_proj", "q_proj")
        for given, w, b in zip(qkv, ("W_Q", "W_K", "W_V"), ("b_Q", "b_K", "b_V"), strict=True):
            wanted = by_head(x, getattr(views, w), getattr(views, b))
            given = given.reshape(5, -1, wanted.shape[-1])
            # Some models repeat their keys and values before they attend.
            wanted = wanted.repeat_interleave(given.shape[1] // wanted.shape[1], dim=1)
            torch.testing.assert_close(given, wanted, rtol=1e-5, atol=2e-5)
        z, y = one(seen, i, "attention.dense", "attn.c_proj", "attn.o_proj")
        heads = z.unflatten(-1, (len(views.W_O), -1))
        wanted = torch.einsum("bhd,hdm->bm", heads, views.W_O)
        wanted = wanted if views.b_O is None else wanted + views.b_O
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", BY_HAND)
def test_the_mlp_is_what_its_views_say(case: str) -> None:
    model = model_of(case)
    seen = run(model, torch.arange(5)[:, None])
    for i, views in enumerate(head_views(model)):
        x, up = one(seen, i, "h_to_4h", "c_fc", "gate_up_proj", "up_proj")
        hidden, y = one(seen, i, "4h_to_h", "mlp.c_proj", "down_proj")
        wanted = through(x, views.W_in, views.b_in)
        if views.W_gate is not None:
            gate = through(x, views.W_gate, views.b_gate)
            up, wanted = hidden, functional.silu(gate) * wanted
        torch.testing.assert_close(up, wanted, rtol=1e-5, atol=2e-5)
        wanted = through(hidden, views.W_out, views.b_out)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=2e-5)


def mlp_by_hand(views: MlpViews, x: Tensor, limit: float | None) -> Tensor:
    """What an expert says; with a limit, of the kind of gpt-oss."""
    assert views.W_gate is not None
    gate, up = through(x, views.W_gate, views.b_gate), through(x, views.W_in, views.b_in)
    if limit is None:
        hidden = functional.silu(gate) * up
    else:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        hidden = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return through(hidden, views.W_out, views.b_out)


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_experts_are_what_their_views_say(family: str, unstacked: bool) -> None:
    model = model_of(family)
    if unstacked:
        unstack(model)
    limit = getattr(model.config, "swiglu_limit", None)
    layers = head_views(model)
    mixed = [i for i, views in enumerate(layers) if views.experts]
    assert mixed == ([1, 2] if family.startswith("deepseek") else [0, 1, 2])
    for i in mixed:
        module = model.get_submodule(f"model.layers.{i}.mlp")
        x = torch.randn(5, 32)
        assert len(layers[i].experts) == 4
        for e, views in enumerate(layers[i].experts):
            said = module.experts(x, torch.full((5, 1), e), torch.ones(5, 1))
            wanted = mlp_by_hand(views, x, limit)
            torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-4)
        shared = layers[i].shared_experts
        beside = getattr(module, "shared_experts", getattr(module, "shared_expert", None))
        assert (shared is None) == (beside is None)
        if shared is not None:
            said = beside(x)
            torch.testing.assert_close(said, mlp_by_hand(shared, x, None), rtol=1e-4, atol=1e-4)
