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

from sharebasis.compressed.index import StoredGroup
from sharebasis.compressed.loader import LoadedModel
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.moments import Moment, MomentAccumulator
from sharebasis.model.blocks import PROBE_TOKENS, run_blocks
from sharebasis.model.hooks import tracked
from sharebasis.model.sites import find_sites
from sharebasis.moments.gather import gather
from sharebasis.runtime.devices import require_memory
from sharebasis.stages.propagate.refit import Refitter, refittable
from sharebasis.stages.propagate.refitted import Refitted


def update(
    model: LoadedModel,
    sublayers: Iterable[str],
    refitter: Refitter,
    text: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
) -> Refitted:
    """New coefficients, which the model is given, and their bases.

    Left as they are: what has no basis, or one on the side of outputs (its coefficients are the
    best for all inputs), and what is tied to another weight. Memory holds the moments of the
    inputs, too.

    Args:
        model: compressed.
        sublayers: those to update.
        refitter: knows what they were.
        text: token ids.
        batch: windows a forward pass.
        checkpoint: of the moments, where a run that was killed goes on from.

    Raises:
        CalibrationError: an input is not finite.
        ResourceError: the moments do not fit into memory.
    """
    candidates = refittable(model.index.groups, sublayers)
    groups = [group for group in candidates if group.rank is not None]
    inputs = _inputs(model, groups, text, batch, checkpoint)
    refitted = Refitted()
    for group in groups:
        pooled = reduce(add, (inputs[part.sublayer] for part in group.parts))
        problems = refitter.undrifted(group, pooled)
        updated = model.stored(group).editable().update(problems)
        if updated is not None:
            refitted.add(model, group, updated)
    return refitted


def _inputs(
    model: LoadedModel,
    groups: Sequence[StoredGroup],
    text: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
) -> Mapping[str, Moment]:
    """The moments of what a compressed model's sublayers are given, by their names."""
    names = dict.fromkeys(part.sublayer for group in groups for part in group.parts)
    if not names:
        return {}
    compressed, device = model.model, model.model.device
    sites = find_sites(compressed, names, lambda: run_blocks(compressed, text[:1, :PROBE_TOKENS]))
    require_memory(sum(8 * site.d**2 for site in sites), "The moments", device)
    accumulators = {site.name: MomentAccumulator(site.name, site.d, device) for site in sites}
    with tracked(
        {compressed.get_submodule(name): sums.update for name, sums in accumulators.items()}
    ):
        gather(
            lambda chunk, _: run_blocks(compressed, chunk),
            accumulators,
            text,
            batch,
            checkpoint,
            "propagate",
        )
    moments = {site: sums.moment() for site, sums in accumulators.items()}
    return {reader: moments[site.name] for site in sites for reader in site.readers}
