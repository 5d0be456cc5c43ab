"""Coefficients of a compressed model for the inputs that it has itself.

A compressed model is run once as it is. Then every group's coefficients are made the best ones
for its basis and what the group was given in that run. That is the update of Basis Sharing
(arXiv:2410.03765), after SVD-LLM's (arXiv:2403.07378): bases and targets stay, and all groups
change at once, so that those in front change what those behind were updated for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add

from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.compressed.index import CompressedGroup, CompressedIndex
from sharebasis.compressed.loader import linears_by_group
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.moments import Moment, MomentAccumulator
from sharebasis.model.blocks import PROBE_TOKENS, run_blocks
from sharebasis.model.hooks import tracked
from sharebasis.model.sites import find_sites
from sharebasis.moments.gather import gather
from sharebasis.runtime.devices import require_memory
from sharebasis.stages.propagate.refit import Refitter, Tensors, install, refittable


def update(
    model: PreTrainedModel,
    index: CompressedIndex,
    sublayers: Iterable[str],
    refitter: Refitter,
    text: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
) -> Tensors:
    """New coefficients, which the model is given, and their bases.

    Left as they are: what has no basis, or one on the side of outputs (its coefficients are the
    best for all inputs), and what is tied to another weight. Memory holds the moments of the
    inputs, too.

    Args:
        model: compressed, from `load_compressed`.
        index: of its directory.
        sublayers: those to update.
        refitter: knows what they were.
        text: token ids.
        batch: windows a forward pass.
        checkpoint: of the moments, where a run that was killed goes on from.

    Raises:
        CalibrationError: an input is not finite.
        ResourceError: the moments do not fit into memory.
    """
    groups = [one for one in refittable(index.groups, sublayers) if one.basis is not None]
    inputs = _own_inputs(model, groups, text, batch, checkpoint)
    return _updated(model, index, groups, inputs, refitter)


def _own_inputs(
    model: PreTrainedModel,
    groups: Sequence[CompressedGroup],
    text: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
) -> Mapping[str, Moment]:
    """The moments of what a compressed model's sublayers are given, by their names."""
    names = dict.fromkeys(part.sublayer for group in groups for part in group.parts)
    if not names:
        return {}
    sites = find_sites(model, names, lambda: run_blocks(model, text[:1, :PROBE_TOKENS]))
    require_memory(sum(8 * site.d**2 for site in sites), "The moments", model.device)
    own = {site.name: MomentAccumulator(site.name, site.d, model.device) for site in sites}
    with tracked({model.get_submodule(name): one.update for name, one in own.items()}):
        gather(lambda chunk, _: run_blocks(model, chunk), own, text, batch, checkpoint, "propagate")
    found = {site: one.moment() for site, one in own.items()}
    return {reader: found[site.name] for site in sites for reader in site.readers}


def _updated(
    model: PreTrainedModel,
    index: CompressedIndex,
    groups: Sequence[CompressedGroup],
    inputs: Mapping[str, Moment],
    refitter: Refitter,
) -> Tensors:
    """What `update` returns."""
    found: Tensors = {}
    wanted = {group.name for group in groups}
    for group, linears in linears_by_group(model, index):
        if group.name not in wanted:
            continue
        factors = {name: linear.factors() for name, linear in linears.items()}
        basis = next(iter(factors.values()))[0]
        coefficients = {name: coefficient for name, (_, coefficient) in factors.items()}
        pooled = reduce(add, (inputs[part.sublayer].total for part in group.parts))
        tensors = refitter.updated(group, basis, coefficients, pooled)
        install(group, tensors, linears)
        found |= {name: tensor.float().cpu() for name, tensor in tensors.items()}
    return found
