"""sharebasis: make a transformer smaller by letting layers share what they have in common.

The pipeline is in the stages; this is what there is to do with a model in memory. Any decoder of
transformers will do, here one of random weights:

    >>> import sharebasis, torch
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> config = LlamaConfig(
    ...     hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, vocab_size=96,
    ... )
    >>> model = AutoModelForCausalLM.from_config(config).eval()

What its linear sublayers do to the residual stream:

    >>> found = sharebasis.classify(model)
    >>> {role: list(families) for role, families in found.by_category().items()}
    {'read': ['q', 'k', 'v', 'gate', 'up'], 'write': ['o', 'down']}

Each of them as parts, whose weights can be replaced by a basis that several of them share and a
coefficient that is a part's own:

    >>> parts = {name: module.parts[0] for name, module in sharebasis.wrap(model).items()}
    >>> shared = sharebasis.LowRank(torch.randn(4, 32), (torch.randn(48, 4), torch.randn(48, 4)))
    >>> for i, form in enumerate(shared.modules()):
    ...     parts[f"model.layers.{i}.mlp.up_proj"].compress(form)
    >>> parts["model.layers.1.mlp.up_proj"]
    ShareLinear(in_features=32, out_features=48, form=low_rank, rank=4, state=compressed)
    >>> sharebasis.unwrap(model)

Weights by head, and a forward pass taken apart:

    >>> sharebasis.head_views(model)[0].W_Q.shape  # (heads, d_model, d_head)
    torch.Size([4, 32, 8])
    >>> logits, cache = sharebasis.run_with_cache(model, torch.arange(6)[None])
    >>> torch.allclose(cache.decompose_resid().sum(0), cache["resid_post", -1], atol=1e-5)
    True

What the pipeline has made is loaded as a model of the original's class:

    >>> model = sharebasis.load_compressed("artifacts/compressed")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharebasis.compressed.loader import load_compressed
    from sharebasis.forms.low_rank import LowRank
    from sharebasis.forms.share_linear import ShareLinear
    from sharebasis.forms.split_linear import SplitLinear
    from sharebasis.model.classify import classify_model as classify
    from sharebasis.model.wrapping import unwrap, wrap
    from sharebasis.residual.cache import run_with_cache
    from sharebasis.residual.head_views import head_views

__all__ = [
    "LowRank",
    "ShareLinear",
    "SplitLinear",
    "classify",
    "head_views",
    "load_compressed",
    "run_with_cache",
    "unwrap",
    "wrap",
]

_HOMES = {
    "LowRank": "forms.low_rank",
    "ShareLinear": "forms.share_linear",
    "SplitLinear": "forms.split_linear",
    "classify": "model.classify",
    "head_views": "residual.head_views",
    "load_compressed": "compressed.loader",
    "run_with_cache": "residual.cache",
    "unwrap": "model.wrapping",
    "wrap": "model.wrapping",
}
"""Public name -> the module that defines it."""
_NAMES = {"classify": "classify_model"}
"""Public name -> what it is called there, if that is another name."""


def __getattr__(name: str) -> Any:
    # On demand, so that a part of the package can be imported without torch and transformers,
    # and a stage depends on no more code than it runs.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), _NAMES.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
