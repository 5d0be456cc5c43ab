"""Layouts that no family has, and views that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_model
from torch import nn
from viewing import D_VOCAB, MLA, MLP, assert_same, by_head, everything, model_of

from sharebasis.architecture.fused import projections_of
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError, SplitError
from sharebasis.model import classify
from sharebasis.model.classify import classify_model
from sharebasis.residual.head_views import head_views


@pytest.mark.parametrize("order", ["qkv", "vqk"])
@pytest.mark.parametrize(
    ("n_kv_heads", "interleave"),
    [
        *((n, turns) for n in (1, 2, 4) for turns in (None, "head", 2, 4, 8)),
        (2, 16),
        (4, 16),
        (4, 32),
    ],
)
def test_heads_are_their_rows_in_every_layout(n_kv_heads: int, interleave: Any, order: str) -> None:
    model = model_of("gpt_neox")
    fused = nn.Linear(32, (4 + 2 * n_kv_heads) * 8)
    for layer in model.gpt_neox.layers:
        layer.attention.query_key_value = fused
    settings = WeightTypeSettings(
        r".*query_key_value",
        qkv_order=order,
        interleave=interleave,
        n_head=4,
        n_kv_head=n_kv_heads,
    )
    found = classify_model(model, weight_types={"fused": settings})
    views = head_views(model, found)[1]
    blocks = projections_of(found.selected[1], settings, found.dims)
    assert {block.family: block.n_heads for block in blocks} == {
        "q": 4,
        "k": n_kv_heads,
        "v": n_kv_heads,
    }
    for block in blocks:
        heads = torch.tensor(list(block.rows)).view(block.n_heads, 8)
        x = block.family.upper()
        assert torch.equal(getattr(views, f"W_{x}"), fused.weight[heads].mT)
        assert torch.equal(getattr(views, f"b_{x}"), fused.bias[heads])


def test_latent_attention_has_no_queries_keys_and_values_but_an_output() -> None:
    model = model_of("deepseek_v3")
    views = head_views(model)[0]
    for name in MLA:
        with pytest.raises(SelectionError) as error:
            getattr(views, name)
        for said in (
            f"one sublayer of family '{name[-1].lower()}' that reads the residual stream",
            "layer 0 has none",
            "model.layers.0.self_attn.q_b_proj (q, neither)",
            "model.layers.0.self_attn.kv_b_proj (k, neither)",
            "model.layers.0.self_attn.kv_b_proj (v, neither)",
        ):
            assert said in str(error.value)
    o_proj = model.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(views.W_O, torch.stack([o_proj[:, 6 * i : 6 * i + 6].T for i in range(4)]))


def test_latent_attention_has_what_goes_up_from_its_latents() -> None:
    model = model_of("deepseek_v3")
    views, attention = head_views(model)[1], model.model.layers[1].self_attn
    assert views.W_UQ.shape == (4, 16, 12)
    assert views.W_UK.shape == (4, 12, 8)
    assert views.W_UV.shape == (4, 12, 6)
    c_q, c_kv = torch.randn(5, 16), torch.randn(5, 12)
    k, v = attention.kv_b_proj(c_kv).view(5, 4, 14).split([8, 6], dim=-1)
    q = attention.q_b_proj(c_q).view(5, 4, 12)
    for c, W, expected in ((c_q, views.W_UQ, q), (c_kv, views.W_UK, k), (c_kv, views.W_UV, v)):  # noqa: N806
        torch.testing.assert_close(by_head(c, W, None), expected, rtol=0, atol=1e-5)
        own = W.untyped_storage().data_ptr()
        assert own in {p.untyped_storage().data_ptr() for p in attention.parameters()}


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O"])
def test_attention_to_an_encoder_that_is_not_there_does_not_count(name: str) -> None:
    model = random_model(
        "bart",
        D_VOCAB,
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    attention = model.model.decoder.layers[1].self_attn
    x = name[-1].lower()
    own = attention.out_proj if x == "o" else getattr(attention, f"{x}_proj")
    heads = own.weight.T.unflatten(0, (4, 8)) if x == "o" else own.weight.unflatten(0, (4, 8)).mT
    assert torch.equal(getattr(head_views(model)[1], name), heads)


@pytest.mark.parametrize("name", ["W_UQ", "W_UK", "W_UV"])
def test_what_has_no_latent_says_what_it_has(name: str) -> None:
    with pytest.raises(SelectionError) as error:
        getattr(head_views(model_of("llama"))[0], name)
    for said in (f"family '{name[-1].lower()}' that reads a latent", "none", "q_proj (q, read)"):
        assert said in str(error.value)


def test_latent_attention_with_queries_of_its_own_has_those() -> None:
    model = random_model("deepseek_v3", D_VOCAB, q_lora_rank=None)
    views, attention = head_views(model)[2], model.model.layers[2].self_attn
    assert views.W_Q.shape == (4, 32, 12)
    x = torch.randn(5, 32)
    torch.testing.assert_close(
        by_head(x, views.W_Q, views.b_Q).flatten(1), attention.q_proj(x), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", MLP)
def test_a_layer_of_experts_says_where_its_weights_are(name: str) -> None:
    mixtral, deepseek = head_views(model_of("mixtral")), head_views(model_of("deepseek_v3"))
    said = (
        r"^layer 1 has 4 experts and no (up|gate|down) of its own; ask its \.experts\[i\] for W_in"
    )
    with pytest.raises(SelectionError, match=said):
        getattr(mixtral[1], name)
    said = r"layer 2 has 4 experts .* ask its \.experts\[i\] and \.shared_experts for W_in"
    with pytest.raises(SelectionError, match=said):
        getattr(deepseek[2], name)
    assert deepseek[0].experts == ()
    assert deepseek[0].shared_experts is None
    assert deepseek[0].W_gate is not None


def test_a_router_is_no_shared_expert() -> None:
    model = model_of("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.gate = nn.Linear(32, 4)
    views = head_views(model, classify_model(model))[1]
    assert "model.layers.1.mlp.gate.gate" in {x.name for x in classify_model(model).sublayers}
    assert len(views.experts) == 4
    assert views.shared_experts is None
    with pytest.raises(SelectionError, match=r"ask its \.experts\[i\] for W_in"):
        _ = views.W_gate


def test_a_fused_weight_whose_layout_nobody_gave_has_no_views() -> None:
    model = model_of("gpt2")
    types = {"all": WeightTypeSettings(r".*\.h\..*")}
    views = head_views(model, classify_model(model, weight_types=types))
    with pytest.raises(
        SelectionError, match=r"layer 2 has none\. .*2\.attn\.c_attn \(fused, read\)"
    ):
        _ = views[2].W_K
    assert views[2].W_O.shape == (4, 8, 32)


def test_two_sublayers_of_one_family_are_not_told_apart() -> None:
    model = model_of("llama")
    types = {"mlp": WeightTypeSettings(r".*\.(gate|up)_proj", family="up")}
    views = head_views(model, classify_model(model, weight_types=types))
    with pytest.raises(
        SelectionError, match=r"layer 0 has 2\. .*gate_proj \(up, read\), .*up_proj"
    ):
        _ = views[0].W_in
    assert views[0].W_gate is None
    assert views[0].W_out.shape == (48, 32)


@pytest.mark.parametrize(("name", "what"), [("q", "rows"), ("o", "columns")])
def test_heads_that_do_not_divide_a_weight_are_refused(name: str, what: str) -> None:
    model = model_of("llama")
    types = {x: WeightTypeSettings(rf".*\.{x}_proj", n_head=5) for x in "qo"}
    views = head_views(model, classify_model(model, weight_types=types))[1]
    said = rf"^model\.layers\.1\.self_attn\.{name}_proj has 32 {what}, which 5 heads do not divide"
    with pytest.raises(SplitError, match=said):
        getattr(views, f"W_{name.upper()}")


def test_a_sublayer_whose_role_nobody_knows_has_views(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("it does not run")

    model = model_of("gpt2, square")
    before = everything(model)
    monkeypatch.setattr(classify, "trace", fail)
    assert "ambiguous_unknown" in {x.role for x in classify_model(model).sublayers}
    assert_same(everything(model), before)


def test_head_counts_of_a_weight_type_go_before_the_models() -> None:
    model = model_of("llama")
    types = {x: WeightTypeSettings(rf".*\.{x}_proj", n_head=2) for x in "qk"}
    views = head_views(model, classify_model(model, weight_types=types))[1]
    shapes = [tuple(x.shape) for x in (views.W_Q, views.W_K, views.W_O)]
    assert shapes == [(2, 32, 16), (2, 32, 8), (2, 16, 32)]


def test_a_model_without_memory_has_views_without_memory() -> None:
    with torch.device("meta"):
        model = model_of("mixtral")
    views = everything(model)
    assert {x.device.type for x in views.values()} == {"meta"}
    assert views["1.experts.3.W_in"].shape == (32, 48)
