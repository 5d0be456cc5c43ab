"""artifacts/compressed and text -> artifacts/propagated: weights that make up for earlier errors.

Block by block: what the original's and what the compressed model's sublayers are given on the
same text goes into a regression (`sharebasis.linalg.drift_regression`), whose target is factorized
at the rank and in the form that `fit` chose. Then both blocks' outputs are the inputs of the
next ones.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sharebasis.architecture.sublayers import Classification, Sublayer
from sharebasis.compressed.loader import open_compressed
from sharebasis.compressed.rewrite import rewrite
from sharebasis.config.data import DataSettings
from sharebasis.config.fit import FitSettings
from sharebasis.config.refine import PropagateSettings
from sharebasis.data.windows import cut, read_windows
from sharebasis.io.atomic import writing
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.identity import identity_of
from sharebasis.io.manifest import MANIFEST
from sharebasis.io.records import save_record
from sharebasis.model.blocks import Blocks, block_names
from sharebasis.model.held_out import divergence_on, is_better
from sharebasis.model.hub import DTYPES, load_model
from sharebasis.moments.store import MomentStore
from sharebasis.runtime import matmul
from sharebasis.stages.propagate.block_regression import Propagator, pass_blocks
from sharebasis.stages.propagate.outcome import PROPAGATION, Propagation
from sharebasis.stages.propagate.refit import Refitter
from sharebasis.stages.propagate.refitted import Refitted
from sharebasis.stages.propagate.update import update

log = logging.getLogger(__name__)


def propagation_identity(
    weights: Path,
    compressed: Path,
    windows: Tensor,
    settings: PropagateSettings,
    fit: FitSettings,
    **others: object,
) -> dict[str, object]:
    """All that the new factors depend on, for `Checkpoint`.

    Args:
        weights: artifacts/weights, which its manifest stands for.
        compressed: artifacts/compressed, which stands for the moments, too.
        windows: token ids.
        settings: of the stage.
        fit: metric, damping and exceptions.
        others: whatever else changes the numbers.
    """
    models = {"weights": weights / MANIFEST, "compressed": compressed}
    metric = [fit.method, fit.two_sided, fit.damping_inputs, fit.damping_gradients]
    of_fit = {"metric": metric, "exclude": fit.exclude}
    return {**identity_of(settings, windows, **models), **of_fit, **others}


def propagation_windows(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, settings: PropagateSettings, seed: int
) -> Int64[Tensor, "windows window"]:
    """The windows to refit on and then those held out, from the start of the calibration text.

    Raises:
        TextError: there is too little of it.
    """
    text = cut(data, "calibration", settings.windows + settings.held_out, settings.window)
    return read_windows(tokenizer, text, "calibration", seed, "propagate")


def _may_change(sublayer: Sublayer, fit: FitSettings) -> bool:
    excluded = any(re.fullmatch(pattern, sublayer.name) for pattern in fit.exclude)
    return sublayer.expert is None and not excluded


@torch.no_grad()
def propagate(
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
    """Refit a compressed model as `settings.by` says and write it anew; whole or not at all.

    It stores as many numbers as before, and is what it was where held-out windows like that
    better. Memory holds both models; block by block, also the hidden states of both for the whole
    text and what the original's sublayers of one block are given.

    Block by block, a group is refitted if all its parts read one input, and what layers share stays
    as it is; so do, always, what `fit.exclude` names, what is tied to another weight, and experts,
    to which the two models may send different tokens. The remaining neurons of a pruned MLP are
    refitted to put out what all of them did.

    Args:
        weights: artifacts/weights.
        classification: of its sublayers.
        compressed: artifacts/compressed.
        moments: artifacts/moments, for those of the gradients.
        windows: from `propagation_windows`.
        settings: of the stage.
        fit: metric, damping and exceptions of the fit before, and the size of shards.
        checkpoint: where a run that was killed goes on from.
        target: artifacts/propagated.
        device: for both models.

    Raises:
        PropagationError: the blocks cannot be run one by one.
        CalibrationError, WeightsError, StoreError, ResourceError: what is read is not usable, or
            does not fit.
    """
    original = load_model(weights, settings.dtype, device)
    model = open_compressed(compressed, DTYPES[settings.dtype], device)
    for edit in model.edits:
        edit.follow(original, model.index, model.reader)
    text, held_out = windows.to(device).split([settings.windows, settings.held_out])
    sublayers = [sublayer for sublayer in classification.selected if _may_change(sublayer, fit)]
    refitter = Refitter(original, moments, settings, fit, model.edits)
    distances: list[float] = []
    with matmul.FastestLinear():
        if settings.by == "update":
            before = divergence_on(held_out, original, model.model)
            names = [sublayer.name for sublayer in sublayers]
            refitted = update(model, names, refitter, text, settings.batch, checkpoint)
        else:
            blocks = Blocks(original, block_names(original, classification), text, settings.batch)
            propagator = Propagator(original, model, blocks, sublayers, refitter, settings)
            state = pass_blocks(propagator, text, held_out, checkpoint)
            before, refitted, distances = state.before, state.refitted, state.distances
        after = divergence_on(held_out, original, model.model)
    if not is_better(before, after):
        refitted = Refitted()
    n_refitted, n_groups = len(refitted.forms), len(model.index.groups)
    result = Propagation(n_refitted, n_groups - n_refitted, tuple(distances), before, after)
    with writing(target) as out:
        rewrite(out, compressed, model.index, refitted.forms, refitted.biases, fit.shard_bytes)
        save_record(out / PROPAGATION, result)
    checkpoint.remove()
    return result
