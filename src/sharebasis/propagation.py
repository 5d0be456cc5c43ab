"""artifacts/compressed and text -> artifacts/propagated: factors that reckon with earlier errors.

Block by block: what the original's and what the compressed model's sublayers are given on the
same text goes into a regression (`sharebasis.regression`), whose target is factorized at the rank
and in the form that `fit` chose. Then both blocks' outputs are the inputs of the next ones.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharebasis import compressed_index, kernels, store
from sharebasis.capture import find_sites, first_call, forced, watched
from sharebasis.checkpoint import Checkpoint, identity_of
from sharebasis.compressed import linears_by_tensor, load_compressed
from sharebasis.compressed_index import CompressedGroup, CompressedIndex
from sharebasis.compressed_writer import rewrite
from sharebasis.errors import PropagationError
from sharebasis.held_out import divergence_on, is_better
from sharebasis.hub import DTYPES, MANIFEST, load_model
from sharebasis.moment_store import MomentStore
from sharebasis.moments import Site
from sharebasis.outcomes import PROPAGATION, Propagation
from sharebasis.progress import progress
from sharebasis.refit import Refitter, Tensors, install, refittable
from sharebasis.regression import PairAccumulator, PairedMoment, token_weights
from sharebasis.replay import Blocks, embed
from sharebasis.settings import DataSettings, FitSettings, PropagateSettings
from sharebasis.share_linear import ShareLinear
from sharebasis.sublayer import Classification, Sublayer
from sharebasis.tensor_store import TensorReader
from sharebasis.texts import cut, read_windows
from sharebasis.turned_original import turn_original
from sharebasis.update import update

log = logging.getLogger(__name__)


@dataclass
class Streams:
    """The hidden states of the original and of the compressed model at one depth, on the CPU."""

    original: Float[Tensor, "windows window d_model"]
    compressed: Float[Tensor, "windows window d_model"]

    @property
    def distance(self) -> float:
        """Median over tokens of ‖h - ĥ‖² / ‖h‖²."""
        one, other = self.original.float(), self.compressed.float()
        return ((one - other).square().sum(-1) / one.square().sum(-1)).median().item()


@dataclass
class _Progress:
    """How far a run is."""

    before: float | None
    """Divergence on held-out windows."""
    distances: list[float]
    found: Tensors
    """New ones, of the blocks that were passed."""
    streams: Streams

    def save(self, checkpoint: Checkpoint) -> None:
        """The streams count as tensors, too."""
        both = [("original", self.streams.original), ("compressed", self.streams.compressed)]
        record = {"before": self.before, "distances": self.distances}
        checkpoint.save(record, [*both, *self.found.items()])


@dataclass(frozen=True)
class _Run:
    """What the original does in a block: by name, batch by batch, what sublayers are given."""

    inputs: Mapping[str, Sequence[Tensor]]
    outputs: Tensor
    """Of the block."""


Drift = Callable[[int, Tensor], Tensor]
"""The number and the hidden states of a batch -> δ of every token."""


@dataclass(frozen=True)
class Propagator:
    """Two models, and what it takes to go through their blocks."""

    original: PreTrainedModel
    compressed: PreTrainedModel
    """From `load_compressed`, of `index`; is given the new factors at once."""
    index: CompressedIndex
    blocks: Blocks
    sublayers: Sequence[Sublayer]
    """Those to refit."""
    refitter: Refitter
    settings: PropagateSettings

    @property
    def writers(self) -> set[str]:
        """The sublayers that write to the residual stream."""
        return {one.name for one in self.sublayers if one.role == "write"}

    def pass_block(self, i: int, streams: Streams) -> Tensors:
        """Refit the groups of a block, one input after the other, and take both streams past it."""
        found: Tensors = {}
        groups = self._groups(i, streams.original)
        run = self._run_original(i, groups, streams.original)
        streams.original = run.outputs
        linears = linears_by_tensor(self.compressed, self.index)
        for site, own in groups.items():
            pair = self._gather(i, site, run, streams.compressed)
            for group in own:
                tensors = self.refitter.tensors(group, pair, linears)
                found |= {name: tensor.float().cpu() for name, tensor in tensors.items()}
                install(group, found, linears)
                if self.settings.mean and pair.drift is None:
                    found |= self._biases(group, pair, linears)
        block = self.compressed.get_submodule(self.blocks.names[i])
        streams.compressed = torch.cat(
            [self._run(i, block, chunk).cpu() for chunk in self._cut(streams.compressed)]
        )
        return found

    def _biases(
        self, group: CompressedGroup, pair: PairedMoment, linears: Mapping[str, ShareLinear]
    ) -> Tensors:
        """New biases of the sublayers of a group that have one, which they are given at once."""
        found: Tensors = {}
        for part in group.parts:
            bias = self.compressed.get_submodule(part.sublayer).bias
            if isinstance(bias, Tensor):
                fitted = linears[part.coefficient].dense()
                rows = part.rows.numbers.to(bias.device)
                bias[rows] = self.refitter.bias(part, fitted, pair).to(bias)
                found[f"{part.sublayer}.bias"] = bias.float().cpu().clone()
        return found

    def _groups(self, i: int, hidden: Tensor) -> Mapping[Site, Sequence[CompressedGroup]]:
        """Inputs in a block, in the order in which they come up, and the groups that read them."""
        block, chunk = self.original.get_submodule(self.blocks.names[i]), self._cut(hidden)[0]
        prefix, run = f"{self.blocks.names[i]}.", partial(self._run, i, block, chunk)
        own = [one.name for one in self.sublayers if one.name.startswith(prefix)]
        with watched({name: self.original.get_submodule(name) for name in own}) as seen:
            run()
        sites = find_sites(self.original, list(seen), run)
        found = {site: refittable(self.index.groups, site.readers) for site in sites}
        return {site: groups for site, groups in found.items() if groups}

    def _run_original(self, i: int, sites: Iterable[Site], hidden: Tensor) -> _Run:
        block = self.original.get_submodule(self.blocks.names[i])
        modules = {site.name: self.original.get_submodule(site.name) for site in sites}
        inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
        outputs = []
        for chunk in self._cut(hidden):
            with watched(modules) as seen:
                outputs.append(self._run(i, block, chunk).cpu())
            for name, own in inputs.items():
                own.append(seen[name].cpu())
        return _Run(inputs, torch.cat(outputs))

    def _gather(self, i: int, site: Site, run: _Run, hidden: Tensor) -> PairedMoment:
        """Of the original's inputs and what the compressed model has there now."""
        block = self.compressed.get_submodule(self.blocks.names[i])
        module, device = self.compressed.get_submodule(site.name), self.compressed.device
        accumulator = PairAccumulator(
            site.name, site.d, self.refitter.neurons_in(site.name), device
        )
        drift = self._drift_of(i, site, run, hidden) if self.settings.stream else None
        for j, chunk in enumerate(self._cut(hidden)):
            # Some models flatten batch and window in between.
            x = run.inputs[site.name][j].to(device).reshape(*chunk.shape[:2], -1)
            weights = token_weights(x, self.settings.skip, self.settings.clip)
            if drift is None:
                (other, *_), _ = first_call(module, partial(self._run, i, block, chunk))
                away = None
            else:
                with watched({site.name: module}) as seen:
                    away = drift(j, chunk)
                other = seen[site.name]
            accumulator.update(x, other.reshape(*chunk.shape[:2], -1), weights, away)
        return accumulator.moment()

    def _drift_of(self, i: int, site: Site, run: _Run, hidden: Tensor) -> Drift | None:
        """How to find out what a residual stream lacks when a sublayer writes to it.

        The compressed block runs with that sublayer and all that write after it forced to say
        what they do in the original; what its output lacks then, the stream lacked before. None
        if the sublayer does not write, or the block does not simply add up what it writes.
        """
        writers = [name for name in run.inputs if name in self.writers]
        if site.name not in writers:
            return None
        writers = writers[writers.index(site.name) :]
        block = self.compressed.get_submodule(self.blocks.names[i])
        device, outputs = self.compressed.device, self._cut(run.outputs)

        def say(j: int, chunk: Tensor, extra: Tensor | None = None) -> Tensor:
            """The block's output in batch `j`, with something more written to the stream."""
            said = {
                self.compressed.get_submodule(name): self.original.get_submodule(name)(
                    run.inputs[name][j].to(device)
                )
                for name in writers
            }
            if extra is not None:
                own = said[self.compressed.get_submodule(site.name)]
                own += extra.reshape(own.shape)  # some models flatten batch and window
            with forced(said):
                return self._run(i, block, chunk)

        chunk = self._cut(hidden)[0]
        plain = say(0, chunk)
        extra = plain.flip(1)
        # In float32, as the squares of float16 overflow.
        answer, extra = (say(0, chunk, extra) - plain).float(), extra.float()
        scale = (answer * extra).sum() / extra.square().sum()
        if not (answer - scale * extra).norm() < 1e-2 * answer.norm():
            return None
        return lambda j, chunk: (outputs[j].to(device) - say(j, chunk)) / scale

    def _run(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        return self.blocks.run(i, block, hidden.to(self.compressed.device))

    def _cut(self, hidden: Tensor) -> Sequence[Tensor]:
        return hidden.split(self.settings.batch)


def block_names(model: PreTrainedModel, classification: Classification) -> Sequence[str]:
    """The HF names of all blocks, those of no sublayer too, in the order of their numbers.

    Raises:
        PropagationError: they are not the children of one module.
    """
    parents = {sublayer.block.rpartition(".")[0] for sublayer in classification.selected}
    if len(parents) != 1:
        raise PropagationError(
            f"The blocks lie in several modules, {', '.join(sorted(parents))}, and cannot be run "
            "one after the other. Set propagate=none."
        )
    (parent,) = parents
    return [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]


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
    own = {"metric": metric, "exclude": fit.exclude}
    return {**identity_of(settings, windows, **models), **own, **others}


def propagation_windows(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, settings: PropagateSettings, seed: int
) -> Int64[Tensor, "windows window"]:
    """The windows to refit on and then those held out, from the start of the calibration text.

    Raises:
        TextError: there is too little of it.
    """
    own = cut(data, "calibration", settings.windows + settings.held_out, settings.window)
    return read_windows(tokenizer, own, "calibration", seed, "propagate")


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
    to which the two models may send different tokens. In an MLP that lacks neurons, those that are
    left learn anew to say what all of them said.

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
    index = store.load_record(compressed / compressed_index.FILE, CompressedIndex)
    original = load_model(weights, settings.dtype, device)
    model = load_compressed(compressed, DTYPES[settings.dtype], device)
    turn_original(original, index, TensorReader(compressed, index.files))
    text, held_out = windows.to(device).split([settings.windows, settings.held_out])
    sublayers = [one for one in classification.selected if _may_change(one, fit)]
    refitter = Refitter(original, moments, settings, fit, index.mlps)
    distances: list[float] = []
    with kernels.FastestLinear():
        if settings.by == "update":
            before = divergence_on(held_out, original, model)
            names = [one.name for one in sublayers]
            found = update(model, index, names, refitter, text, settings.batch, checkpoint)
        else:
            blocks = Blocks(original, block_names(original, classification), text, settings.batch)
            own = Propagator(original, model, index, blocks, sublayers, refitter, settings)
            state = pass_blocks(own, text, held_out, checkpoint)
            before, found, distances = state.before, state.found, state.distances
        after = divergence_on(held_out, original, model)
    if not is_better(before, after):
        found = {}
    refitted = sum(group.parts[0].coefficient in found for group in index.groups)
    left = len(index.groups) - refitted
    result = Propagation(refitted, left, tuple(distances), before, after)
    with store.writing(target) as out:
        rewrite(out, compressed, index, found, fit.shard_bytes)
        store.save_record(out / PROPAGATION, result)
    checkpoint.remove()
    return result


def pass_blocks(
    propagator: Propagator,
    text: Int64[Tensor, "windows window"],
    held_out: Int64[Tensor, "others window"],
    checkpoint: Checkpoint,
) -> _Progress:
    """Refit one block after the other, from the first or where a run was killed."""
    names = propagator.blocks.names
    state = _resumed(propagator, checkpoint) or _first(propagator, text, held_out)
    with progress("propagate", len(names), "blocks", len(state.distances)) as advance:
        for i in range(len(state.distances), len(names)):
            state.found |= propagator.pass_block(i, state.streams)
            state.distances.append(state.streams.distance)
            advance()
            if checkpoint.due:
                state.save(checkpoint)
    return state


def _first(propagator: Propagator, text: Tensor, held_out: Tensor) -> _Progress:
    """Before the first block."""
    first, batch = propagator.blocks.names[0], propagator.settings.batch
    hidden = [embed(propagator.original, first, chunk).cpu() for chunk in text.split(batch)]
    streams = Streams(torch.cat(hidden), torch.cat(hidden))
    before = divergence_on(held_out, propagator.original, propagator.compressed)
    return _Progress(before, [], {}, streams)


def _resumed(propagator: Propagator, checkpoint: Checkpoint) -> _Progress | None:
    """Where a run was killed; the compressed model is given what that had found."""
    if (state := checkpoint.resume()) is None:
        return None
    record, reader = state
    found = dict(reader.stream())
    streams = Streams(found.pop("original"), found.pop("compressed"))
    linears = linears_by_tensor(propagator.compressed, propagator.index)
    for group in propagator.index.groups:
        if group.parts[0].coefficient in found:
            install(group, found, linears)
    for name in found:
        if name.endswith(".bias"):
            propagator.compressed.get_parameter(name).copy_(found[name])
    log.info("Going on behind block %d, the last checkpoint.", len(record["distances"]))
    return _Progress(record["before"], list(record["distances"]), found, streams)
