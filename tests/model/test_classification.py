"""A model's modules become records: what is in the table, what is not, and what cannot be run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import random_model, small_config
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.parts import rows_by_sublayer, split_selected
from sharebasis.architecture.selection import LinearModule
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.model import WeightTypeSettings
from sharebasis.errors import SelectionError
from sharebasis.model.classify import classify_model
from sharebasis.model.explore import is_linear, linear_modules
from sharebasis.model.hub import meta_model
from sharebasis.stages.verify.verify import lossless_difference

# Linear modules


@pytest.mark.parametrize(("d_out", "d_in"), [(6, 4), (4, 4)])
def test_conv1d_and_linear_are_told_apart_by_type_and_report_the_same_shape(
    d_out: int, d_in: int
) -> None:
    model = nn.ModuleDict({"conv": Conv1D(d_out, d_in), "linear": nn.Linear(d_in, d_out, False)})
    assert linear_modules(model) == (
        LinearModule("conv", "Conv1D", (d_out, d_in), bias=True),
        LinearModule("linear", "Linear", (d_out, d_in), bias=False),
    )


def test_a_module_that_uses_anothers_weight_says_whose() -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "other", "third")})
    model["third"].weight = model["one"].weight
    assert [(module.name, module.tied_to) for module in linear_modules(model)] == [
        ("one", None),
        ("other", None),
        ("third", "one"),
    ]


def test_a_module_under_two_names_is_there_twice() -> None:
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": linear, "other": linear})
    found = [(module.name, module.tied_to) for module in linear_modules(model)]
    assert found == [("one", None), ("other", "one")]


class Twice(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return 2 * super().forward(input)


class Router(nn.Linear):
    def forward(self, input: Tensor) -> Any:  # noqa: A002
        return super().forward(input).topk(2)


class Picky(nn.Linear):
    def forward(self, one: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(one + other)


class Renamed(nn.Linear):
    """Does what a Linear does by a forward pass of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        flat = input.reshape(-1, input.shape[-1]) @ self.weight.T
        flat = flat if self.bias is None else flat + self.bias
        return flat.view(*input.shape[:-1], -1)


class RenamedConv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("module_type", "expected"),
    [(nn.Linear, True), (Renamed, True), (Twice, False), (Router, False), (Picky, False)],
)
def test_what_inherits_from_linear_is_one_if_it_computes_like_one(
    module_type: type[nn.Linear], expected: bool, bias: bool, device: str
) -> None:
    module = module_type(5, 3, bias, device=device)
    before = dict(module.named_parameters())
    assert is_linear(module) == expected
    assert len(linear_modules(nn.ModuleDict({"one": module}))) == expected
    assert all(after is before[name] for name, after in module.named_parameters())


def test_what_inherits_from_conv1d_is_one_if_it_computes_like_one() -> None:
    assert is_linear(RenamedConv1D(3, 5))
    assert is_linear(Conv1D(3, 5))
    assert not is_linear(nn.Embedding(3, 5))


# Families that are not in the table


PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ATTENTION = {
    "self_attn_q_proj": "read",
    "self_attn_k_proj": "read",
    "self_attn_v_proj": "read",
    "self_attn_o_proj": "write",
}
UNKNOWN: Mapping[str, tuple[dict[str, Any], str, Mapping[str, str]]] = {
    "nemotron": (
        {**PLAIN, "num_key_value_heads": 2},
        r"^model\.layers\.(\d+)\.",
        {**ATTENTION, "mlp_up_proj": "read", "mlp_down_proj": "write"},
    ),
    "persimmon": (
        PLAIN,
        r"^model\.layers\.(\d+)\.",
        {
            "self_attn_query_key_value": "read",
            "self_attn_dense": "write",
            "mlp_dense_h_to_4h": "read",
            "mlp_dense_4h_to_h": "write",
        },
    ),
    # output.dense is the end of attention.output.dense, too
    "bert": (
        {**PLAIN, "is_decoder": True},
        r"^bert\.encoder\.layer\.(\d+)\.",
        {
            "attention_self_query": "read",
            "attention_self_key": "read",
            "attention_self_value": "read",
            "attention_output_dense": "write",
            "intermediate_dense": "read",
            "output_dense": "write",
        },
    ),
    # blocks that are not alike, experts without a gate, a latent that the experts read and write
    "nemotron_h": (
        {
            **PLAIN,
            "layers_block_type": ["full_attention", "moe", "full_attention"],
            "num_key_value_heads": 2,
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_latent_size": 16,
            "moe_shared_expert_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
        },
        r"^model\.layers\.(\d+)\.",
        {
            "mixer_q_proj": "read",
            "mixer_k_proj": "read",
            "mixer_v_proj": "read",
            "mixer_o_proj": "write",
            "mixer_fc1_latent_proj": "read",
            "mixer_fc2_latent_proj": "write",
            "mixer_experts_up_proj": "neither",
            "mixer_experts_down_proj": "neither",
            "mixer_shared_experts_up_proj": "read",
            "mixer_shared_experts_down_proj": "write",
        },
    ),
    # four residual streams, which one latent mixes before they are read
    "qwen4_exp_text": (
        {
            **PLAIN,
            "hidden_size": 16,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        r"^model\.layers\.(\d+)\.",
        {
            **ATTENTION,
            "self_attn_indexer_index_qk_proj": "read",
            "linear_attn_in_proj_qkv": "read",
            "linear_attn_in_proj_z": "read",
            "linear_attn_in_proj_b": "read",
            "linear_attn_in_proj_a": "read",
            "linear_attn_out_proj": "write",
            "mlp_experts_gate_up_proj": "read",
            "mlp_experts_down_proj": "write",
            "mlp_shared_expert_gate_proj": "read",
            "mlp_shared_expert_up_proj": "read",
            "mlp_shared_expert_down_proj": "write",
            "mlp_shared_expert_gate": "read",
            "attn_hyper_connection_input_mix_weight_down": "read",
            "attn_hyper_connection_input_mix_weight_up": "neither",
            "attn_hyper_connection_block_inject_weight": "read",
            "mlp_hyper_connection_input_mix_weight_down": "read",
            "mlp_hyper_connection_input_mix_weight_up": "neither",
            "mlp_hyper_connection_block_inject_weight": "read",
        },
    ),
    # every other block begins the stream anew and is given its earlier states
    "inkling2_text": (
        {
            **PLAIN,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_layers_per_attn_res_block": 2,
            "d_rel": 8,
            "unpadded_vocab_size": 288,
        },
        r"^model\.layers\.(\d+)\.",
        {
            **ATTENTION,
            "self_attn_r_proj": "read",
            "self_attn_gate_proj": "read",
            "self_attn_sink_proj": "read",
            "self_attn_k_sconv_weight_proj": "read",
            "self_attn_v_sconv_weight_proj": "read",
            "mlp_experts_gate_up_proj": "read",
            "mlp_experts_down_proj": "write",
        },
    ),
    # no attention; names that tell nothing
    "mamba2": (
        {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "n_groups": 1},
        r"^backbone\.layers\.(\d+)\.",
        {"mixer_in_proj": "read", "mixer_out_proj": "write"},
    ),
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_a_family_that_is_not_in_the_table_is_explored(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes, block_pattern, roles = UNKNOWN[family]
    assert family not in ARCHITECTURES
    found = classify_model(meta_model(small_config(family, **changes)))
    assert found.architecture.block_pattern == block_pattern
    seen: dict[str, set[str]] = {}
    for sublayer in found.sublayers:
        assert (sublayer.evidence, sublayer.selected) == ("trace", True)
        seen.setdefault(str(sublayer.weight_type), set()).add(sublayer.role)
    assert seen == {weight_type: {role} for weight_type, role in roles.items()}
    assert found.architecture.weight_types.keys() == roles.keys()
    (warning,) = (record for record in caplog.records if record.name.startswith("sharebasis"))
    for said in (f"family '{family}' is not known", "compressing", "fused", *roles):
        assert said in warning.getMessage()


@pytest.mark.parametrize("family", ["nemotron", "bert", "nemotron_h"])
def test_what_was_explored_can_be_wrapped(family: str) -> None:
    model = random_model(family, 288, **UNKNOWN[family][0])
    found = classify_model(model)
    tokens = torch.randint(288, (1, 12))
    logits = model(input_ids=tokens).logits
    for strategy in ("none", "heads"):
        rows = rows_by_sublayer(split_selected(found, strategy))  # type: ignore[arg-type]
        assert rows.keys() == {sublayer.name for sublayer in found.selected}
        difference = lossless_difference(model, rows, tokens)
        assert difference <= 2e-5 * logits.abs().max().item()


def test_weight_types_of_the_caller_are_searched_for_in_blocks_that_are_looked_for() -> None:
    mine = {"up": WeightTypeSettings(pattern=r".*\.mlp\.up_proj")}
    model = meta_model(small_config("nemotron", **UNKNOWN["nemotron"][0]))
    found = classify_model(model, weight_types=mine)
    assert found.architecture.weight_types == mine
    assert {sublayer.layer for sublayer in found.selected} == {0, 1, 2}
    assert len(found.selected) == 3
    assert len(found.sublayers) == 18


def test_no_weight_types_are_not_taken_for_weight_types_that_were_not_given() -> None:
    model = meta_model(small_config("nemotron", **UNKNOWN["nemotron"][0]))
    with pytest.raises(SelectionError, match=r"^weight_types is empty"):
        classify_model(model, weight_types={})


def test_blocks_of_the_caller_are_not_looked_for() -> None:
    model = meta_model(small_config("nemotron", **UNKNOWN["nemotron"][0]))
    model.config.num_hidden_layers = 7  # there is no such list
    found = classify_model(model, block_pattern=r"layers\.(\d+)\.")
    assert found.architecture.block_pattern == r"layers\.(\d+)\."
    assert {sublayer.layer for sublayer in found.selected} == {0, 1, 2}
    assert len(found.selected) == 18


@pytest.mark.parametrize(
    ("family", "sizes"), [("nemotron", UNKNOWN["nemotron"][0]), ("llama", {}), ("mixtral", {})]
)
@pytest.mark.parametrize("pattern", [r"layers\.([02])\.", r"^model\.layers\.(0|2)\."])
def test_layers_that_the_callers_blocks_leave_out_stay_as_they_are(
    family: str, sizes: dict[str, Any], pattern: str
) -> None:
    model = meta_model(small_config(family, **sizes))
    everywhere = classify_model(model).selected
    found = classify_model(model, block_pattern=pattern)
    assert found.architecture.block_pattern == pattern
    assert found.sublayers == found.selected
    assert [(one.name, one.role, one.weight_type) for one in found.selected] == [
        (one.name, one.role, one.weight_type) for one in everywhere if one.layer in (0, 2)
    ]


@pytest.mark.parametrize("family", ["nemotron", "llama"])
def test_blocks_of_the_caller_that_are_nowhere_are_what_the_error_speaks_of(family: str) -> None:
    sizes = UNKNOWN["nemotron"][0] if family == "nemotron" else {}
    model = meta_model(small_config(family, **sizes))
    with pytest.raises(SelectionError, match=r"block.*stacks"):
        classify_model(model, block_pattern=r"stacks\.(\d+)\.")
    with pytest.raises(SelectionError, match=r"^block_pattern '\(' is not a regular expression"):
        classify_model(model, block_pattern="(")


# Models that are made for it


class TinyConfig(PretrainedConfig):
    model_type = "tiny"

    def __init__(self, d_model: int = 32, n_layers: int = 2, **rest: Any) -> None:
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = d_model, n_layers, 2
        super().__init__(**rest)


class Block(nn.Module):
    """Names that say the opposite of what their sublayers do, and a router."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.o_proj, self.q_proj = nn.Linear(d, d), nn.Linear(d, d)
        self.router = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.q_proj(self.o_proj(y).tanh()) * self.router(y).sigmoid()


class Tiny(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig, fails: bool = False) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.fails, self.embed = fails, nn.Embedding(8, d)
        # lists that are not the blocks: of another length
        self.extra = nn.ModuleList([nn.Linear(d, d) for _ in range(config.num_hidden_layers + 1)])
        self.body = nn.ModuleList([Block(d) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(d, 8)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for i, block in enumerate(self.body):
            if self.fails and i:
                raise TypeError("not like this\nadvice")
            x = block(x)
        return self.lm_head(x)


def classified(caplog: pytest.LogCaptureFixture, **settings: Any) -> Classification:
    with caplog.at_level(logging.WARNING):
        return classify_model(Tiny(TinyConfig(), **settings))


def test_what_was_seen_goes_before_a_name_that_misleads(caplog: pytest.LogCaptureFixture) -> None:
    found = classified(caplog)
    assert found.architecture.block_pattern == r"^body\.(\d+)\."
    assert found.model_type == "tiny"
    assert [(one.name, one.role, one.evidence) for one in found.selected] == [
        ("body.0.o_proj", "read", "trace"),
        ("body.0.q_proj", "write", "trace"),
        ("body.1.o_proj", "read", "trace"),
        ("body.1.q_proj", "write", "trace"),
    ]
    assert {one.disagreement for one in found.selected} == {
        "trace: read, name: write",
        "trace: write, name: read",
    }
    assert {one.category for one in found.selected} == {"ambiguous_write", "ambiguous_read"}


def test_what_is_too_narrow_to_be_a_projection_is_not_selected() -> None:
    narrow = [one for one in classify_model(Tiny(TinyConfig(32))).sublayers if not one.selected]
    assert [one.name for one in narrow] == ["body.0.router", "body.1.router"]
    assert [(one.role, one.evidence, one.shape) for one in narrow] == [
        ("read", "trace", (1, 32))
    ] * 2
    at_the_limit = classify_model(Tiny(TinyConfig(16)))
    assert all(one.selected for one in at_the_limit.sublayers)


def test_the_only_key_and_value_head_of_many_queries_is_selected_however_narrow() -> None:
    sizes = {**PLAIN, "hidden_size": 160, "num_attention_heads": 20, "num_key_value_heads": 1}
    found = classify_model(meta_model(small_config("nemotron", **sizes)))
    assert {one.shape for one in found.sublayers if one.family in ("k", "v")} == {(8, 160)}
    assert all(one.selected for one in found.sublayers)


def test_a_gate_as_wide_as_a_head_is_not_selected() -> None:
    found = classify_model(Tiny(TinyConfig(32, head_dim=1)))
    assert found.dims.d_head == 1
    narrow = [one.name for one in found.sublayers if not one.selected]
    assert narrow == ["body.0.router", "body.1.router"]


def test_of_lists_of_a_layer_each_the_blocks_are_that_with_the_most_sublayers() -> None:
    model = Tiny(TinyConfig())
    model.embed.add_module("scales", nn.ModuleList([nn.Linear(4, 4) for _ in range(2)]))
    found = classify_model(model)
    assert found.architecture.block_pattern == r"^body\.(\d+)\."
    assert {one.name for one in found.selected} == {
        f"body.{i}.{name}_proj" for i in range(2) for name in "oq"
    }


def test_experts_in_a_layout_of_their_own_are_said_to_stay_as_they_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}
    classify_model(meta_model(small_config("llama4_text", **PLAIN, **experts, **heads)))
    _, warning = (record for record in caplog.records if record.name.startswith("sharebasis"))
    assert warning.getMessage() == (
        "feed_forward.experts.gate_up_proj, feed_forward.experts.down_proj in these blocks are the "
        "weights of no Linear and stay as they are."
    )


def test_what_does_not_run_is_recorded_and_not_selected() -> None:
    model = Tiny(TinyConfig())
    model.body[1].add_module("idle_proj", nn.Linear(32, 48))
    found = classify_model(model)
    (idle,) = (one for one in found.sublayers if one.evidence != "trace")
    assert (idle.name, idle.role, idle.selected) == ("body.1.idle_proj", "read", False)
    assert found.architecture.weight_types.keys() == {"o_proj", "q_proj"}


def test_a_model_that_cannot_be_run_is_classified_by_shape_and_name_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = classified(caplog, fails=True)
    assert [(one.name, one.role, one.evidence) for one in found.sublayers] == [
        ("body.0.o_proj", "write", "name"),
        ("body.0.q_proj", "read", "name"),
        ("body.0.router", "read", "shape"),
        ("body.1.o_proj", "write", "name"),
        ("body.1.q_proj", "read", "name"),
        ("body.1.router", "read", "shape"),
    ]
    warnings = [record.getMessage() for record in caplog.records if "run through" in record.msg]
    assert len(warnings) == 1
    for said in ("this tiny model", "TypeError: not like this", "by shape and name alone"):
        assert said in warnings[0]


def test_classifying_leaves_a_model_as_it_was() -> None:
    model = random_model("mixtral", 288)
    before = {
        name: (module, dict(module._forward_pre_hooks)) for name, module in model.named_modules()
    }
    numbers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classify_model(model)
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    for name, (module, hooks) in before.items():
        assert after[name] is module
        assert (dict(module._forward_pre_hooks), len(module._forward_hooks)) == (hooks, 0)
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_a_model_with_numbers_is_classified_like_one_without(family: str) -> None:
    with_numbers = classify_model(random_model(family, 288))
    assert with_numbers == classify_model(meta_model(small_config(family)))


def test_a_model_without_a_list_of_blocks_is_refused_with_what_to_give() -> None:
    config = TinyConfig()
    model = Tiny(config)
    config.num_hidden_layers = 5
    with pytest.raises(SelectionError) as error:
        classify_model(model)
    for said in (
        "'tiny' is not known",
        "has no list of 5 blocks",
        "model.weight_types and model.block_pattern",
        "add a row to ARCHITECTURES in sharebasis/architecture.py",
    ):
        assert said in str(error.value)


def test_blocks_without_linear_sublayers_are_refused() -> None:
    model = Tiny(TinyConfig())
    for block in model.body:
        for name in ("o_proj", "q_proj", "router"):
            setattr(block, name, nn.Identity())
    with pytest.raises(SelectionError) as error:
        classify_model(model)
    for said in (
        "this model has no linear sublayers in blocks",
        r"^body\.(\d+)\.",
        "ARCHITECTURES",
    ):
        assert said in str(error.value)
