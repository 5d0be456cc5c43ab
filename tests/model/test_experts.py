"""Experts as Linears compute what transformers' stacks compute, in the stacks' own memory."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SIZES, random_model, small_config
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import use_experts_implementation

from sharebasis.model.experts import is_stacked, slices, unstack
from sharebasis.model.hub import meta_model
from sharebasis.model.surgery import unstacked

TOKENS = torch.randint(288, (2, 24), generator=torch.Generator().manual_seed(3))
NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": ["full_attention", "moe"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
"""Not in the table; its experts have no gate."""
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "gpt_oss": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "nemotron_h": NEMOTRON_H,
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def _model(family: str) -> PreTrainedModel:
    return random_model(family, 288, **FAMILIES[family])


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def _stacked_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_stacked(module)}


def test_every_family_with_experts_is_here() -> None:
    with_experts = {name for name in SIZES if _stacked_modules(meta_model(small_config(name)))}
    assert with_experts == set(FAMILIES) - {"nemotron_h"}


# Models of transformers


def test_unstacked_experts_compute_what_transformers_computes(family: str) -> None:
    model = _model(family)
    before = _logits(model)
    stacks = unstack(model)
    assert len(stacks) >= 1
    assert not _stacked_modules(model)
    scale = before.abs().max().item()
    torch.testing.assert_close(_logits(model), before, rtol=0, atol=1e-5 * scale)
    with torch.no_grad():  # the Linears are what is used
        model.get_submodule(next(iter(stacks))).down_proj[0].weight.mul_(2)
    assert (_logits(model) - before).abs().max().item() > 1e-2 * scale


def test_every_expert_has_linears_in_the_memory_of_the_stacks(family: str) -> None:
    model = _model(family)
    stacks = {
        name: dict(module.named_parameters(recurse=False))
        for name, module in _stacked_modules(model).items()
    }
    n_numbers = sum(parameter.numel() for parameter in model.parameters())
    assert unstack(model).keys() == stacks.keys()
    for name, own in stacks.items():
        for stack, parameter in own.items():
            linears = model.get_submodule(f"{name}.{stack.removesuffix('_bias')}")
            assert len(linears) == len(parameter) == 4
            for linear in linears:
                assert type(linear) is nn.Linear
                assert tuple(linear.weight.shape) == (linear.out_features, linear.in_features)
                view = linear.bias if stack.endswith("_bias") else linear.weight
                assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert sum(parameter.numel() for parameter in model.parameters()) == n_numbers


def test_slices_name_what_unstacking_makes_and_give_its_tensors(family: str) -> None:
    model = _model(family)
    before, places = dict(model.state_dict()), slices(model)
    unstack(model)
    after = model.state_dict()
    assert places.keys() == after.keys() - before.keys()
    assert {place.stack for place in places.values()} == before.keys() - after.keys()
    for name, place in places.items():
        assert torch.equal(place.of(before[place.stack]), after[name]), name
        assert f".{place.expert}." in name
    assert slices(model) == {}


def test_a_model_has_its_own_modules_back_afterwards(family: str) -> None:
    model = _model(family)
    before, logits = dict(model.named_modules()), _logits(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    with unstacked(model):
        assert not _stacked_modules(model)
    with pytest.raises(KeyError), unstacked(model):
        raise KeyError
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert torch.equal(_logits(model), logits)


def test_models_without_memory_are_unstacked_alike_and_every_expert_runs(family: str) -> None:
    model = meta_model(small_config(family, **FAMILIES[family]))
    real = _model(family)
    stacks = unstack(model)
    unstack(real)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    for name in stacks:
        experts, ran = model.get_submodule(name), set()
        linears = {module for module in experts.modules() if isinstance(module, nn.Linear)}
        for linear in linears:
            linear.register_forward_hook(lambda module, *_, ran=ran: ran.add(module))
        x = torch.empty(5, 32, device="meta")
        choices = torch.empty(5, 2, dtype=torch.long, device="meta")
        y = experts(x, choices, torch.empty(5, 2, device="meta"))
        assert (y.shape, y.is_meta) == (x.shape, True)
        assert len(linears) == 8
        assert ran == linears


def test_a_model_without_experts_stays_as_it_is_and_so_does_an_unstacked_one() -> None:
    model = random_model("llama", 288)
    before = dict(model.named_modules())
    assert unstack(model) == {}
    assert all(module is before[name] for name, module in model.named_modules())
    assert slices(model) == {}
    model = random_model("mixtral", 288)
    unstack(model)
    before = dict(model.named_modules())
    assert unstack(model) == {}
    assert all(module is before[name] for name, module in model.named_modules())


# Every layout that transformers has a name for


D, D_MLP, N = 12, 7, 6


class Experts(nn.Module):
    """Stacks of random numbers in one of transformers' layouts."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = N, nn.SiLU()
        first = "gate_up_proj" if config.has_gate else "up_proj"
        widths = {first: (2 * D_MLP if config.has_gate else D_MLP, D), "down_proj": (D, D_MLP)}
        for name, shape in widths.items():
            stored = shape[::-1] if config.is_transposed else shape
            setattr(self, name, nn.Parameter(torch.randn(N, *stored)))
            if config.has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(N, shape[0])))
        if config.has_post_expert_norm:
            self.post_expert_norm = nn.LayerNorm(D)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError  # one of transformers' own takes its place


LAYOUTS = {
    "plain": {},
    "transposed": {"is_transposed": True},
    "biased": {"has_bias": True},
    "no gate": {"has_gate": False},
    "post norm": {"has_post_expert_norm": True},
    "all but plain": {
        "is_transposed": True,
        "has_bias": True,
        "has_gate": False,
        "has_post_expert_norm": True,
    },
}
FLAGS = ("is_transposed", "has_bias", "has_post_expert_norm")


def _experts(layout: str) -> nn.Module:
    flags = {"has_gate": True, **dict.fromkeys(FLAGS, False), **LAYOUTS[layout]}
    decorated = use_experts_implementation(**flags)(type("MyExperts", (Experts,), {}))
    own: Any = decorated
    return own(SimpleNamespace(_experts_implementation="batched_mm", **flags))


def _routing(n_tokens: int = 30, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, choices and their weights; nobody chooses the last expert."""
    choices = torch.rand(n_tokens, N - 1).argsort(dim=1)[:, :k]
    return torch.randn(n_tokens, D), choices, torch.rand(n_tokens, k)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_any_layout_of_experts_computes_what_transformers_kernel_computes(layout: str) -> None:
    model = nn.ModuleDict({"experts": _experts(layout)})
    inputs = _routing()
    expected = model["experts"](*inputs)
    assert unstack(model).keys() == {"experts"}
    found = model["experts"](*inputs)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)
    again = copy.deepcopy(model)["experts"](*inputs)
    assert torch.equal(again, found)


@torch.no_grad()
def test_an_expert_that_nobody_chose_does_not_run() -> None:
    model = nn.ModuleDict({"experts": _experts("plain")})
    unstack(model)
    ran = []
    for i, linear in enumerate(model["experts"].down_proj):
        linear.register_forward_hook(lambda *_, i=i: ran.append(i))
    model["experts"](*_routing())
    assert ran == list(range(N - 1))


@torch.no_grad()
def test_sums_of_a_narrow_type_are_rounded_once() -> None:
    model = nn.ModuleDict({"experts": _experts("no gate")}).bfloat16()
    x, choices, weights = _routing(k=5)
    x, weights = x.bfloat16(), weights.bfloat16()
    unstack(model)
    up, down = model["experts"].up_proj, model["experts"].down_proj
    total = torch.zeros(len(x), D)
    for expert in range(N):
        for token, place in (choices == expert).nonzero().tolist():
            y = functional.linear(x[token], up[expert].weight)
            y = functional.linear(functional.silu(y), down[expert].weight)
            total[token] += (y * weights[token, place]).float()
    found = model["experts"](x, choices, weights)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, total.bfloat16())


def test_a_module_that_only_looks_like_experts_is_left_alone() -> None:
    class Lookalike(nn.Module):
        def __init__(self, own: object) -> None:
            super().__init__()
            self.down_proj = own

    stack = nn.Parameter(torch.randn(2, 3, 4))
    unmarked, marked = Lookalike(stack), Lookalike(nn.Linear(3, 4))
    marked.is_transposed = marked.has_gate = marked.has_bias = False
    model = nn.ModuleDict({"unmarked": unmarked, "marked": marked})
    assert unstack(model) == {}
    assert model["unmarked"] is unmarked
