"""A model's modules become records: what was seen, what is left out, and what cannot be run."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import random_model, small_config
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.model_family import Architecture, model_family
from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.errors import SelectionError
from sharebasis.gauge.freedom import freedom_of
from sharebasis.gauge.units import Freedom
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import meta_model

PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


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


def test_a_row_that_is_added_at_run_time_is_all_that_a_family_needs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = {"gate_up_order": "up_gate", "interleave": "row"}
    row = model_family("body", "o_proj", "q_proj", o_proj=layout, positions="learned")
    monkeypatch.setitem(ARCHITECTURES, "tiny", row)
    found = classified(caplog)
    assert not caplog.records
    assert found.architecture == Architecture(row.block_pattern, row.weight_types)
    assert [part.name for part in split_selected(found, "qkv")] == [
        f"body.{i}.{part}" for i in range(2) for part in ("o_proj[up]", "o_proj[gate]", "q_proj")
    ]
    assert freedom_of(TinyConfig(), found.dims, 0, ()).heads
    monkeypatch.delitem(ARCHITECTURES, "tiny")
    assert freedom_of(TinyConfig(), found.dims, 0, ()) == Freedom()


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
        "add a row to ARCHITECTURES in sharebasis/architecture/families.py",
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
