"""Views are the model's own memory, whatever its layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_model, small_config
from torch import nn
from transformers import LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from viewing import CASES, D_VOCAB, assert_same, everything, model_of

from sharebasis.residual.head_views import head_views

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
