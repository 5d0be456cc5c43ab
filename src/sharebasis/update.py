"""artifacts/compressed and text -> artifacts/propagated: coefficients for the model's own inputs.

A compressed model is run once as it is. Then every group's coefficients are made the best ones
for its basis and what the group was given in that run. That is the update of Basis Sharing
(arXiv:2410.03765), after SVD-LLM's (arXiv:2403.07378): bases and targets stay, and all groups
change at once, so that those in front change what those behind were updated for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis import compressed_index, kernels, store
from sharebasis.calibration import PROBE_TOKENS, gather, run_blocks
from sharebasis.capture import find_sites, tracked
from sharebasis.checkpoint import Checkpoint
from sharebasis.compressed import linears_by_group, load_compressed
from sharebasis.compressed_index import CompressedGroup, CompressedIndex
from sharebasis.compressed_writer import rewrite
from sharebasis.held_out import divergence_on, is_better
from sharebasis.hub import DTYPES, load_model
from sharebasis.moment_store import MomentStore
from sharebasis.moments import Moment, MomentAccumulator
from sharebasis.outcomes import PROPAGATION, Propagation
from sharebasis.refit import Refitter, Tensors, install, updatable
from sharebasis.resources import require_memory
from sharebasis.settings import FitSettings, PropagateSettings
from sharebasis.sublayer import Classification


@torch.no_grad()
def update(
    weights: Path,
    classification: Classification,
    compressed: Path,
    moments: MomentStore,
    windows: Int64[Tensor, "windows window"],
    settings: PropagateSettings,
    fit: FitSettings,
    checkpoint: Checkpoint,
    target: Path,
    device: torch.device,
) -> Propagation:
    """Update a compressed model's coefficients and write it anew; whole or not at all.

    It stores as many numbers as before, and is what it was where held-out windows like that
    better. Left as they are: what has no basis, or one on the side of outputs (its coefficients
    are the best for all inputs), what is tied to another weight, and experts. Memory holds both
    models, and the moments of the compressed one's inputs.

    Args:
        weights: artifacts/weights.
        classification: of its sublayers.
        compressed: artifacts/compressed.
        moments: artifacts/moments, for MLPs that lack neurons.
        windows: from `propagation_windows`.
        settings: of the stage.
        fit: damping of the fit before, and the size of shards.
        checkpoint: where a run that was killed goes on from.
        target: artifacts/propagated.
        device: for both models.

    Raises:
        CalibrationError, WeightsError, StoreError, ResourceError: what is read is not usable, or
            does not fit.
    """
    index = store.load_record(compressed / compressed_index.FILE, CompressedIndex)
    original = load_model(weights, settings.dtype, device)
    model = load_compressed(compressed, DTYPES[settings.dtype], device)
    text, held_out = windows.to(device).split([settings.windows, settings.held_out])
    own = {one.name for one in classification.selected if one.expert is None}
    groups = updatable(index.groups, own)
    with kernels.FastestLinear():
        inputs = _own_inputs(model, groups, text, settings.batch, checkpoint)
        before = divergence_on(held_out, original, model)
        refitter = Refitter(original, moments, settings, fit, index.mlps)
        found = _updated(model, index, groups, inputs, refitter)
        after = divergence_on(held_out, original, model)
    if not is_better(before, after):
        found, groups = {}, []
    result = Propagation(len(groups), len(index.groups) - len(groups), (), before, after)
    with store.writing(target) as out:
        rewrite(out, compressed, index, found, fit.shard_bytes)
        store.save_record(out / PROPAGATION, result)
    checkpoint.remove()
    return result


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
    """New coefficients, which the model is given, and their bases."""
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
