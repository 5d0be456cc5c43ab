"""A weight, cut into parts."""

from sharebasis.architecture.dims import Dims
from sharebasis.architecture.families import Architecture
from sharebasis.architecture.parts import split_sublayer
from sharebasis.architecture.selection import LinearModule, classify
from sharebasis.config.model import WeightTypeSettings

D, D_HEAD = 24, 6
HEADS = Dims(d_model=D, n_layers=2, n_heads=4, n_kv_heads=4, d_head=D_HEAD)
GROUPED = Dims(d_model=D, n_layers=2, n_heads=4, n_kv_heads=2, d_head=D_HEAD)


def sublayer(name="attn.c_attn", rows=3 * D):
    """A sublayer of layer 3, of a weight type called `mine`."""
    types = {"mine": WeightTypeSettings(pattern=".*")}
    modules = [LinearModule(f"h.3.{name}", "Linear", (rows, D), bias=False)]
    return classify(modules, Architecture(r"h\.(\d+)\.", types), D)[0]


def split(strategy, dims=HEADS, name="attn.c_attn", rows=3 * D, **settings):
    return split_sublayer(
        sublayer(name, rows), WeightTypeSettings(pattern=".*", **settings), strategy, dims
    )


def facts(parts):
    return [(part.label, part.family, part.rows.start, part.rows.stop) for part in parts]
