"""What `import sharebasis` offers, on demand, and the examples that say how it is used."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import pytest
import torch
from conftest import RunPython, random_model
from torch import nn

import sharebasis
from sharebasis.errors import StateError
from sharebasis.forms.low_rank import LowRank
from sharebasis.forms.share_linear import State
from sharebasis.forms.split_linear import SplitLinear
from sharebasis.model import classify, wrapping
from sharebasis.residual import cache, head_views

TOKENS = torch.randint(1, 280, (2, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "module",
    [
        "sharebasis",
        "sharebasis.architecture.families",
        "sharebasis.architecture.model_family",
        "sharebasis.architecture.sublayers",
        "sharebasis.model.classify",
        "sharebasis.model.wrapping",
        "sharebasis.residual.cache",
        "sharebasis.residual.head_views",
    ],
)
def test_the_examples_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted >= 2
    assert results.failed == 0


def test_every_public_name_is_what_its_module_defines() -> None:
    assert {"ShareLinear", "load_compressed", "__all__"} <= set(dir(sharebasis))
    assert sharebasis.__all__ == sorted(sharebasis.__all__)
    for name in sharebasis.__all__:
        public: Any = getattr(sharebasis, name)
        assert public.__doc__
        assert public.__module__.startswith("sharebasis.")
    assert sharebasis.classify is classify.classify_model
    assert sharebasis.wrap is wrapping.wrap
    assert sharebasis.run_with_cache is cache.run_with_cache
    assert sharebasis.head_views is head_views.head_views
    with pytest.raises(AttributeError, match="'sharebasis' has no attribute 'wrp'"):
        _ = sharebasis.wrp  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("statement", "loads"),
    [
        ("import sharebasis; dir(sharebasis)", False),
        ("from sharebasis import *", True),  # or the probe would not notice
        ("import sharebasis.errors", False),
        ("import sharebasis.config.schema", False),
        ("import sharebasis.architecture.families", False),
    ],
)
def test_what_is_not_used_is_not_loaded(run_python: RunPython, statement: str, loads: bool) -> None:
    run = run_python(
        f"""
        import sys
        {statement}
        print(sorted({{"torch", "transformers"}} & set(sys.modules)))
        """
    )
    assert run.stdout.strip() == ("['torch', 'transformers']" if loads else "[]"), run.stderr


@pytest.mark.parametrize("strategy", ["none", "qkv", "heads"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "codegen", "qwen3_moe"])
@torch.no_grad()
def test_a_model_is_wrapped_and_has_its_own_modules_back(family: str, strategy: Any) -> None:
    model = random_model(family, 288)
    before, logits = dict(model.named_modules()), model(input_ids=TOKENS).logits
    modules = sharebasis.wrap(model, strategy)
    assert {module for module in model.modules() if isinstance(module, SplitLinear)} == {
        *modules.values()
    }
    torch.testing.assert_close(model(input_ids=TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    part = next(iter(modules.values())).parts[0]
    assert part.state is State.ORIGINAL
    zeros = LowRank(torch.zeros(1, part.in_features), (torch.zeros(part.out_features, 1),))
    part.compress(zeros.modules()[0])
    assert not torch.allclose(model(input_ids=TOKENS).logits, logits, atol=1e-2)
    sharebasis.unwrap(model)
    after: dict[str, nn.Module] = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(model(input_ids=TOKENS).logits, logits)


def test_parts_are_heads_if_that_is_asked_for() -> None:
    model = random_model("llama", 288)
    modules = sharebasis.wrap(model, "heads")
    config = model.config
    q, k = (modules[f"model.layers.0.self_attn.{x}_proj"] for x in "qk")
    assert len(q.parts) == config.num_attention_heads
    assert len(k.parts) == config.num_key_value_heads


def test_a_model_is_wrapped_once_and_unwrapped_once() -> None:
    model = random_model("gpt2", 288)
    with pytest.raises(StateError, match="is not wrapped"):
        sharebasis.unwrap(model)
    sharebasis.wrap(model)
    with pytest.raises(StateError, match="unwrap it first"):
        sharebasis.wrap(model)
    sharebasis.unwrap(model)
    sharebasis.wrap(model, "qkv")


def test_sublayers_by_category_are_all_of_them_once() -> None:
    model = random_model("deepseek_v3", 288)
    found = sharebasis.classify(model)
    categories = found.by_category()
    assert list(categories) == ["read", "write", "neither"]
    sublayers = [x for own in categories.values() for family in own.values() for x in family]
    assert sorted(x.name for x in sublayers) == sorted(x.name for x in found.sublayers)
    assert all(
        (x.role, x.family) == (role, family)
        for role, own in categories.items()
        for family, of_family in own.items()
        for x in of_family
    )
    assert {"gate", "up"} <= categories["read"].keys()
    assert {"o", "down"} <= categories["write"].keys()
