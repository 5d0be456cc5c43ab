"""Modules by name and shape, and what is selected of them."""

from sharebasis.architecture.families import Architecture
from sharebasis.architecture.selection import LinearModule, classify
from sharebasis.config.model import WeightTypeSettings

D, D_MLP, D_KV = 32, 48, 16


def module(name, shape=(D, D), type="Linear"):  # noqa: A002
    return LinearModule(name, type, shape, bias=False)


MODULES = (
    module("model.layers.0.self_attn.q_proj"),
    module("model.layers.0.mlp.up_proj", (D_MLP, D)),
    module("model.layers.11.self_attn.q_proj"),
    module("model.layers.11.mlp.up_proj", (D_MLP, D)),
    module("lm_head", (100, D)),
)
BLOCKS = r"layers\.(\d+)\."


def classified(patterns, blocks=BLOCKS, modules=MODULES, **settings):
    types = {
        name: WeightTypeSettings(pattern=pattern, **settings) for name, pattern in patterns.items()
    }
    return classify(modules, Architecture(blocks, types), D)
