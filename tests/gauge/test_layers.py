"""Exact gauge elements are executable: applied to a model, they leave its logits alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import SIZES, MakeDirectory, random_model, small_config
from gauges import EXACT, layers_of, random_element
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.gauge.alignment import align, distances
from sharebasis.gauge.layers import Layers
from sharebasis.gauge.tensors import ModelTensors
from sharebasis.gauge.units import Attention, Freedom, Layer
from sharebasis.model.checkpoint_weights import DenseWeights
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, meta_model

TOKENS = torch.randint(1, 280, (2, 24), generator=torch.Generator().manual_seed(3))
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SIZES},
    "olmo, clipped": ("olmo", {"clip_qkv": 0.3}),
    "mpt, clipped": ("mpt", {"attn_config": {"clip_qkv": 0.3}}),
    "phi, normed": ("phi", {"qk_layernorm": True}),
    "stablelm, normed": ("stablelm", {"qk_layernorm": True}),
    "cohere, normed": ("cohere", {"use_qk_norm": True}),
    "falcon, rotary": ("falcon, old layout", {"alibi": False}),
}


def model_of(variant: str) -> PreTrainedModel:
    name, changes = VARIANTS[variant]
    model = random_model(name, 288, **changes).double()
    model.config._experts_implementation = "eager"  # the others have no float64
    return model


def scramble(model: PreTrainedModel, freedom: Freedom | None = None) -> list[tuple[Layer, Layer]]:
    """Change every layer by a random gauge element; each layer before and after."""
    layers, changed = layers_of(model), []
    for number in layers.numbers:
        before = layers.read(number)
        own = freedom or layers.freedom(number)
        units = {name: random_element(unit, own) for name, unit in before.units.items()}
        layers.write(model, number, Layer(units, before.rest))
        changed.append((before, layers.read(number)))
    return changed


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def change(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_random_gauge_element_changes_no_logit_and_is_removed_again(variant: str) -> None:
    model = model_of(variant)
    before = logits(model)
    layers = layers_of(model)
    for number, (clean, mixed) in zip(layers.numbers, scramble(model), strict=True):
        found = distances(mixed, clean, layers.freedom(number), "exact")
        assert max(found.aligned.values()) < EXACT
        assert max(found.unaligned.values()) > 0.5
    # Softmax and norms amplify rounding; gpt_bigcode and mpt keep parts in float32.
    assert change(before, logits(model)) < 1e-6


@pytest.mark.parametrize(
    "variant", ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi", "olmo2", "gpt_oss", "falcon"]
)
def test_aligning_one_layer_to_another_changes_no_logit(variant: str) -> None:
    model = model_of(variant)
    before, layers = logits(model), layers_of(model)
    first, last = layers.numbers[0], layers.numbers[-1]
    layer, other = layers.read(last), layers.read(first)
    found = align(layer, other, layers.freedom(last), "exact")
    layers.write(model, last, found(layer))
    assert change(before, logits(model)) < 1e-6
    assert found.gauges.keys() <= layer.units.keys()


@pytest.mark.parametrize("variant", ["llama", "qwen2", "gpt_neox", "phi", "gpt2"])
def test_in_float32_logits_change_by_rounding_alone(variant: str) -> None:
    model = model_of(variant).float()
    before = logits(model)
    scramble(model)
    assert change(before, logits(model)) < 1e-4


@pytest.mark.parametrize(
    ("variant", "too_free"),
    {
        "llama": Freedom("all", (), "none"),
        "gptj": Freedom("all", (), "none"),
        "gpt_neox": Freedom("all", (), "none"),
        "qwen3": Freedom("all", ((0, 6), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11)), "none"),
        "phi, normed": Freedom("signs", (), "none"),
        "olmo, clipped": Freedom("none", (), "all"),
        "bloom": Freedom(heads=True),
        "gpt_oss": Freedom(neuron_scales=True),
    }.items(),
)
def test_what_a_family_does_not_allow_changes_its_logits(variant: str, too_free: Freedom) -> None:
    model = model_of(variant)
    before = logits(model)
    scramble(model, too_free)
    assert change(before, logits(model)) > 1e-4


def test_every_family_of_the_table_is_scrambled_here() -> None:
    families = {SIZES[name].get("model_type", name) for name, _ in VARIANTS.values()}
    assert {name for name, row in ARCHITECTURES.items() if row.positions} <= families


def test_a_family_whose_positions_nobody_has_told_keeps_the_order_of_neurons_alone() -> None:
    model = model_of("deepseek_v3")
    freedom = layers_of(model).freedom(0)
    assert freedom == Freedom()


@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", "gpt_oss", "falcon", "codegen"])
def test_a_checkpoint_and_a_model_in_memory_give_the_same_layers(
    make_directory: MakeDirectory, name: str
) -> None:
    directory = make_directory(name)
    model, config = random_model(name, 288), load_config(directory)
    found = classify_model(meta_model(config))
    stored = Layers(DenseWeights(directory), found, config)
    in_memory = Layers(ModelTensors(model), found, model.config)
    assert stored.numbers == in_memory.numbers == [0, 1, 2]
    for number in stored.numbers:
        assert stored.freedom(number) == in_memory.freedom(number)
        ours, theirs = stored.read(number), in_memory.read(number)
        assert ours.units.keys() == theirs.units.keys()
        assert ours.families.keys() == theirs.families.keys()
        for family, own in ours.families.items():
            assert all(map(torch.equal, own, theirs.families[family]))


def test_an_attention_has_its_biases_gains_and_sinks() -> None:
    def attention(name: str) -> Attention:
        unit = layers_of(model_of(name)).read(0).units["attention"]
        assert isinstance(unit, Attention)
        return unit

    qwen2, olmo2, sinks = attention("qwen2"), attention("olmo2"), attention("gpt_oss")
    assert qwen2.q_bias is not None
    assert qwen2.q_norm is None
    assert olmo2.q_bias is None
    assert olmo2.q_norm is not None
    assert sinks.sinks is not None
    assert "q_norm" in layers_of(model_of("qwen3")).read(0).rest
    assert small_config("qwen3").head_dim == 12
