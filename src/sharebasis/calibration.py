"""Run text through a model and gather the moments of what its sublayers read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sharebasis.capture import find_sites
from sharebasis.checkpoint import Checkpoint, digest_of
from sharebasis.errors import CalibrationError
from sharebasis.experts import unstack
from sharebasis.hub import MANIFEST
from sharebasis.moment_store import (
    Accumulators,
    gradient_site,
    packed,
    read_moment,
    tokens_of,
    trimmed_of,
)
from sharebasis.moments import MomentAccumulator, Site
from sharebasis.progress import progress
from sharebasis.resources import require_memory
from sharebasis.rows import Rows
from sharebasis.settings import EVERY_TOKEN, Labels, OutlierSettings
from sharebasis.share_linear import State
from sharebasis.sublayer import Sublayer
from sharebasis.surgery import wrap

log = logging.getLogger(__name__)

ALL_COUNT = OutlierSettings(EVERY_TOKEN, EVERY_TOKEN)
"""Every token counts, however long it is."""

SEEDS_APART = 1_000_003
"""Batches draw by seeds that follow each other; a generator on a CPU looks at 32 bits of one."""

PROBE_TOKENS = 4
"""Enough to see which sublayers read the same tensor."""


def calibrate(
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    windows: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
    gradients: Labels | None = None,
    outliers: OutlierSettings = ALL_COUNT,
    seed: int = 0,
) -> tuple[Sequence[Site], Accumulators]:
    """Gather the moment of every distinct input of the selected sublayers.

    Args:
        model: dense, in eval mode; its sublayers are wrapped in place.
        sublayers: whose inputs are tracked.
        windows: token ids, one sequence a row.
        batch: windows a forward pass.
        checkpoint: where a run that was killed goes on from.
        gradients: gather those of the gradients of outputs, too (`run_backward`).
        outliers: what becomes of tokens that are far longer than others.
        seed: of the tokens that the model draws; which ones, the batch and the device say, too.

    Raises:
        CalibrationError: a sublayer never ran.
        ResourceError: the moments do not fit into memory.
    """
    windows = windows.to(model.device)
    probe = windows[:1, :PROBE_TOKENS]
    wanted = gradients is not None
    sites, accumulators = start_calibrating(model, sublayers, probe, wanted, outliers)

    def run(chunk: Tensor, start: int) -> None:
        if gradients is None:
            run_blocks(model, chunk)
        else:
            run_backward(model, chunk, gradients, (seed * SEEDS_APART + start) % 2**32)

    gather(run, accumulators, windows, batch, checkpoint, "calibrate")
    unseen = [site.name for site in sites if accumulators[site.name].n_tokens == 0]
    if unseen:
        log.warning(
            "No token of the calibration text went to %d of %d inputs, %s among them; what reads "
            "them will be fitted without whitening. More text may reach them.",
            len(unseen),
            len(sites),
            unseen[0],
        )
    return sites, accumulators


def gather(
    run: Callable[[Int64[Tensor, "windows window"], int], None],
    accumulators: Accumulators,
    windows: Int64[Tensor, "windows window"],
    batch: int,
    checkpoint: Checkpoint,
    stage: str,
) -> None:
    """Run a text past trackers, a batch at a time.

    Args:
        run: is given a batch and the number of its first window.
        accumulators: what the trackers feed, by site name.
        windows: token ids, on the device of the model.
        batch: windows a forward pass.
        checkpoint: of the sums, where a run that was killed goes on from.
        stage: for the progress bar.
    """
    done, tokens = _resume(checkpoint, accumulators), windows.shape[1]
    with progress(stage, windows.numel(), "tokens", done * tokens) as advance:
        for start in range(done, len(windows), batch):
            chunk = windows[start : start + batch]
            run(chunk, start)
            advance(chunk.numel())
            if checkpoint.due:
                counts = {
                    "n_tokens": tokens_of(accumulators),
                    "n_trimmed": trimmed_of(accumulators),
                }
                checkpoint.save({"windows": start + len(chunk), **counts}, packed(accumulators))


def _resume(checkpoint: Checkpoint, accumulators: Accumulators) -> int:
    """Load the sums of a killed run; return how many windows they hold, 0 if there is none."""
    if (found := checkpoint.resume()) is None:
        return 0
    record, reader = found
    for name, accumulator in accumulators.items():
        moment = read_moment(reader, name, record["n_tokens"][name])
        accumulator.load(moment, record["n_trimmed"].get(name, 0))
    log.info("Going on from window %d, the last checkpoint.", record["windows"])
    return int(record["windows"])


def run_identity(
    weights: Path,
    sublayers: Iterable[Sublayer],
    windows: Int64[Tensor, "windows window"],
    **settings: object,
) -> dict[str, object]:
    """All that the moments depend on, for `Checkpoint`.

    Args:
        weights: artifacts/weights, which its manifest stands for.
        sublayers: whose inputs are tracked.
        windows: token ids.
        settings: whatever else changes the numbers.
    """
    return {
        "weights": digest_of(weights / MANIFEST),
        "sublayers": [sublayer.name for sublayer in sublayers],
        "windows": digest_of(windows),
        **settings,
    }


def start_calibrating(
    model: PreTrainedModel,
    sublayers: Sequence[Sublayer],
    probe: Int64[Tensor, "windows window"],
    gradients: bool = False,
    outliers: OutlierSettings = ALL_COUNT,
) -> tuple[Sequence[Site], Accumulators]:
    """Wrap the sublayers and set every part to CALIBRATING.

    The first reader of a site feeds its accumulator; the others are given the same tensor
    in the same pass and have nothing to add.

    Args:
        model: its sublayers are wrapped in place.
        sublayers: whose inputs are tracked.
        probe: a few token ids, run once to see which sublayers read the same tensor.
        gradients: track the gradients of outputs, too; each output has a moment of its own.
        outliers: what becomes of tokens that are far longer than others.

    Raises:
        CalibrationError: a sublayer did not run.
        ResourceError: the moments do not fit into memory.
    """
    unstack(model)
    rows = {sublayer.name: [Rows(0, sublayer.shape[0])] for sublayer in sublayers}
    experts = {sublayer.name for sublayer in sublayers if sublayer.expert is not None}
    sites = find_sites(model, rows, lambda: run_blocks(model, probe), idle=experts)
    outputs = {one.name: one.shape[0] for one in sublayers if gradients and not one.tied_to}
    widths = [*(site.d for site in sites), *outputs.values()]
    require_memory(sum(8 * d**2 for d in widths), "The moments", model.device)
    modules = wrap(model, rows)
    accumulators = {
        site.name: MomentAccumulator(site.name, site.d, model.device, outliers.inputs)
        for site in sites
    }
    of_output = {
        name: MomentAccumulator(gradient_site(name), d, model.device, outliers.gradients)
        for name, d in outputs.items()
    }
    tied = {one.name: one.tied_to or one.name for one in sublayers}
    for site in sites:
        for reader in site.readers:
            (part,) = modules[reader].parts
            if part.state is State.CALIBRATING:  # a module of several names
                continue
            update = accumulators[site.name].update if reader == site.name else _already_counted
            gradient = of_output[tied[reader]].update if gradients else None
            part.calibrate(update, gradient)
    return sites, accumulators | {one.site: one for one in of_output.values()}


def run_blocks(model: PreTrainedModel, windows: Int64[Tensor, "windows window"]) -> None:
    """Run all but the head, whose logits nobody reads and which are the largest product."""
    with torch.no_grad():
        model.base_model(input_ids=windows, use_cache=False)


def run_backward(
    model: PreTrainedModel,
    windows: Int64[Tensor, "windows window"],
    labels: Labels,
    seed: int,
) -> None:
    """Run a forward and a backward pass of the summed loss of every next token.

    Args:
        model: parameters need no gradient; that of the embeddings' output is asked for.
        windows: token ids.
        labels: text takes the next token of the window, model one drawn from what the model
            says (the true Fisher information in place of the empirical one).
        seed: of the draw.

    Raises:
        CalibrationError: there is nothing to draw from, as the logits are not finite.
    """
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.requires_grad_()
    )
    try:
        with torch.enable_grad():
            logits = model(input_ids=windows, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = windows[:, 1:].flatten()
            if labels == "model":
                targets = _draw(logits.detach(), seed)
            cross_entropy(logits.float(), targets, reduction="sum").backward()
    finally:
        handle.remove()


def _draw(logits: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(logits.device).manual_seed(seed)
    probabilities = logits.float().softmax(-1)
    if not probabilities.sum().isfinite():
        raise CalibrationError(
            "The model's logits are NaN or infinite. It overflows in this dtype, try "
            "model.dtype=float32; or its weights are damaged."
        )
    return torch.multinomial(probabilities, 1, generator=generator).flatten()


def _already_counted(_: Tensor) -> None:
    """The tracker of a sublayer whose input another reader of the site counts."""
