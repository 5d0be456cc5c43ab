"""W_Q and its like: TransformerLens's numbers, the model's memory, and what its attention sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIZES, MakeDirectory, MakeSettings, fit_at_once, random_model, small_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture import families
from sharebasis.architecture.fused import projections_of
from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.loader import load_compressed
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError, SplitError
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.model import classify
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_model
from sharebasis.model.surgery import wrap, wrapped
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.residual.head_views import LayerViews, MlpViews, head_views
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source

D_VOCAB = 96
ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
LATENT = ("W_UQ", "W_UK", "W_UV")
MLP = ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")

MORE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2, square": ("gpt2", {"n_inner": 32}),
    "llama, square": ("llama", {"intermediate_size": 32, "num_key_value_heads": 4}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "falcon, one kv head, biases": ("falcon, one kv head", {"bias": True}),
    "falcon, old layout, biases": ("falcon, old layout", {"bias": True}),
    "codegen, 8 heads": ("codegen", {"n_head": 8}),
}
"""Variants of what is in families.yaml."""
CASES = {**{name: (name, {}) for name in SIZES}, **MORE}

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

MLA = {"W_Q", "W_K", "W_V", "b_Q", "b_K", "b_V"}
"""What latent attention does not have."""


def model_of(case: str) -> PreTrainedModel:
    name, changes = CASES[case]
    return random_model(name, D_VOCAB, **changes)


def existing(views: LayerViews | MlpViews, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    """Views by name, but for those that are refused."""
    found = {}
    for name in names:
        try:
            found[name] = getattr(views, name)
        except SelectionError:
            continue
    return found


def everything(model: PreTrainedModel, found: Classification | None = None) -> dict[str, Tensor]:
    """Every view of a model: `3.W_Q`, `3.experts.0.W_in`, `3.shared_experts.W_in`."""
    views: dict[str, Tensor | None] = {}
    for i, layer in enumerate(head_views(model, found)):
        mlps = {f"experts.{e}": own for e, own in enumerate(layer.experts)}
        if layer.shared_experts is not None:
            mlps["shared_experts"] = layer.shared_experts
        views |= {f"{i}.{name}": x for name, x in existing(layer, ATTENTION + LATENT + MLP).items()}
        for place, mlp in mlps.items():
            views |= {f"{i}.{place}.{name}": x for name, x in existing(mlp, MLP).items()}
    return {name: x for name, x in views.items() if x is not None}


def assert_same(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 0
) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(
            x, theirs[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


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


def by_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(batch, d_model) -> (batch, heads, d_head)."""
    y = torch.einsum("bm,hmd->bhd", x, weight)
    return y if bias is None else y + bias


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


# The same memory


@pytest.mark.parametrize("case", CASES)
def test_views_share_the_models_memory_where_the_layout_allows(case: str) -> None:
    model = model_of(case)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    views = everything(model)
    copied = {x for x, view in views.items() if view.untyped_storage().data_ptr() not in storages}
    assert len(views) > 12
    names = {"falcon": ["W_Q"], "codegen, 8 heads": ["W_Q", "W_K", "W_V"]}.get(case, [])
    assert copied == {f"{i}.{name}" for i in range(3) for name in names}


@pytest.mark.parametrize("case", ["falcon", "gpt2", "gpt_neox", "phi3", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_what_is_written_to_a_view_is_in_the_model_once(case: str) -> None:
    model = model_of(case)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    written = {name: x for name, x in everything(model).items() if name[2:] != "W_Q"}
    for x in written.values():
        x += 1
    changed = 0
    for name, parameter in model.named_parameters():
        added = parameter - before[name]
        assert torch.all((added == 0) | ((added - 1).abs() < 1e-6))
        changed += int((added != 0).sum())
    assert changed == sum(x.numel() for x in written.values())


def test_biases_of_grouped_heads_that_take_turns_are_copied() -> None:
    model = random_model("falcon", D_VOCAB, bias=True)
    views = head_views(model)[1]
    fused = model.transformer.h[1].self_attention.query_key_value
    # (2 key-value heads) x (2 of q, one of k, one of v) x (8 rows)
    turns = fused.bias.view(2, 4, 8)
    assert torch.equal(views.b_Q, torch.cat([turns[0, :2], turns[1, :2]]))
    assert torch.equal(views.b_K, turns[:, 2])
    assert torch.equal(views.b_V, turns[:, 3])
    storage = fused.bias.untyped_storage().data_ptr()
    shares = [x.untyped_storage().data_ptr() == storage for x in (views.b_Q, views.b_K, views.b_V)]
    assert shares == [False, True, True]


@pytest.mark.parametrize("case", ["falcon", "gpt2", "gpt_oss"])
def test_gradients_flow_through_views(case: str) -> None:
    model = model_of(case)
    head_views(model)[2].W_Q[1].sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ((name, grad),) = grads.items()
    assert ".2." in name
    d_head = head_views(model)[2].W_Q.shape[2]
    assert int((grad == 1).sum()) == grad.count_nonzero() == 32 * d_head


def test_asking_changes_nothing_in_the_model() -> None:
    model = model_of("deepseek_v3")
    modules, config = dict(model.named_modules()), model.config.to_dict()
    parameters = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    everything(model)
    assert dict(model.named_modules()) == modules
    assert model.config.to_dict() == config
    for name, p in model.named_parameters():
        assert id(p) == parameters[name][0]
        assert torch.equal(p, parameters[name][1])


def test_a_class_that_writes_to_its_config_does_not_write_to_the_models() -> None:
    class Counting(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            config.built = getattr(config, "built", 0) + 1

    model = Counting(small_config("llama"))
    assert head_views(model)[0].W_Q.shape == (4, 32, 8)
    assert model.config.built == 1


def test_the_trunk_alone_has_the_same_views() -> None:
    model = model_of("gpt2")
    assert_same(everything(model.base_model), everything(model))


def test_layers_count_from_the_end_too() -> None:
    layers = head_views(model_of("gpt_neo"))
    assert len(layers) == 4
    assert torch.equal(layers[-1].W_Q, layers[3].W_Q)
    with pytest.raises(IndexError):
        _ = layers[4]


# Conv1D or Linear: by type


@pytest.mark.parametrize("case", ["llama, square", "gpt2, square"])
@torch.no_grad()
def test_a_module_of_the_other_type_has_the_same_views(case: str) -> None:
    model, tokens = model_of(case), torch.arange(8)[None]
    before = {name: x.clone() for name, x in everything(model).items()}
    logits = model(tokens).logits
    square = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head":
            square += module.weight.shape[0] == module.weight.shape[1]
            model.set_submodule(name, of_other_type(module))
    assert square == (7 if case.startswith("llama") else 3) * 3
    torch.testing.assert_close(model(tokens).logits, logits, rtol=0, atol=1e-4)
    # A Conv1D cannot be without a bias.
    assert_same({name: x for name, x in everything(model).items() if x.any()}, before)


def of_other_type(module: nn.Linear | Conv1D) -> nn.Linear | Conv1D:
    """A Conv1D for a Linear and the other way round, that computes the same."""
    rows, columns = module.weight.shape
    other: nn.Linear | Conv1D = nn.Linear(rows, columns)
    if isinstance(module, nn.Linear):
        other = Conv1D(rows, columns)
    other.weight = nn.Parameter(module.weight.T.clone())
    other.bias = nn.Parameter(torch.zeros(len(other.bias)) if module.bias is None else module.bias)
    return other


# Wrapped and compressed

LAYOUTS = ("gpt2", "gpt_neox", "falcon", "codegen", "phi3", "gpt_oss")
"""Of fused weights, one each."""
STRATEGIES = ("none", "qkv", "heads")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", [*LAYOUTS, "deepseek_v3"])
def test_a_wrapped_model_has_the_same_views(family: str, strategy: Any) -> None:
    model = model_of(family)
    found = classify_model(model)
    before = everything(model, found)
    with wrapped(model, rows_by_sublayer(split_selected(found, strategy))):
        assert_same(everything(model), before)


@torch.no_grad()
def compressed(
    model: PreTrainedModel, found: Classification, strategy: Any, rank: int = 3
) -> PreTrainedModel:
    """A model with factors of its own in the place of every part."""
    model = copy.deepcopy(model)
    for module in wrap(model, rows_by_sublayer(split_selected(found, strategy))).values():
        basis = nn.Parameter(torch.randn(rank, module.in_features), requires_grad=False)
        for part in module.parts:
            part.compress(basis, torch.randn(part.out_features, rank))
    return model


@torch.no_grad()
def with_products(dense: PreTrainedModel, small: PreTrainedModel) -> PreTrainedModel:
    """The dense model with the weights of a compressed one, as its modules answer unit vectors."""
    unstack(dense)
    for name, module in list(dense.named_modules()):
        other = small.get_submodule(name)
        if isinstance(module, nn.Linear | Conv1D) and type(other) is not type(module):
            columns = other(torch.eye(other.in_features))
            columns = columns if other.bias is None else columns - other.bias
            assert other.state == "compressed"
            module.weight.copy_(columns if isinstance(module, Conv1D) else columns.T)
    return dense


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *((family, "heads") for family in SIZES),
        *((family, strategy) for family in LAYOUTS for strategy in ("none", "qkv")),
    ],
)
def test_a_compressed_model_has_the_views_of_its_products(family: str, strategy: Any) -> None:
    dense = model_of(family)
    found = classify_model(dense)
    before = {name: x.clone() for name, x in everything(dense, found).items()}
    small = compressed(dense, found, strategy)
    views = everything(small)
    assert_same(views, everything(with_products(dense, small), found), tolerance=2e-5)
    kept = {name for name, x in views.items() if torch.equal(x, before[name])}
    assert kept == {name for name in views if name.rpartition(".")[2].startswith("b_")}


def test_some_parts_may_be_compressed_and_others_not() -> None:
    model = model_of("gpt_neox")
    before = everything(model)
    fused = "gpt_neox.layers.1.attention.query_key_value"
    parts = split_selected(classify_model(model), "heads")
    module = wrap(model, rows_by_sublayer(parts))[fused]
    labels = [part.label for part in parts if part.sublayer.name == fused]
    basis, coefficient = torch.randn(2, 32), torch.randn(8, 2)
    part: ShareLinear = module.parts[labels.index("k.head3")]
    part.compress(basis, coefficient)
    after = everything(model)
    changed = [name for name, x in after.items() if not torch.equal(x, before[name])]
    assert changed == ["1.W_K"]
    assert torch.equal(after["1.W_K"][:3], before["1.W_K"][:3])
    torch.testing.assert_close(after["1.W_K"][3], (coefficient @ basis).T)


def test_a_compressed_model_from_disk_has_views(
    make_directory: MakeDirectory, make_settings: MakeSettings, tmp_path: Path
) -> None:
    extract(find_source(str(make_directory("gpt2"))), tmp_path / "weights")
    dense = load_model(tmp_path / "weights", "float32", torch.device("cpu"))
    parts = split_selected(classify_model(dense), "heads")
    settings = make_settings({"fit.method": "svd", "fit.group_size": 1, "fit.shared": []}).fit
    write_moments(tmp_path / "moments", (), {})
    moments = MomentStore(tmp_path / "moments")
    fit_at_once(tmp_path / "weights", parts, moments, settings, tmp_path / "small")
    small = load_compressed(tmp_path / "small")
    views = everything(small)
    assert_same(views, everything(with_products(dense, small)), tolerance=2e-5)
    assert views["2.W_Q"].shape == (4, 32, 8)


# Layouts that no family has, and what is refused


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
