"""Propagation block by block."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Sublayer
from sharebasis.compressed.index import StoredGroup
from sharebasis.compressed.loader import LoadedModel
from sharebasis.config.refine import PropagateSettings
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.drift_regression import PairAccumulator, PairedMoment, token_weights
from sharebasis.model.blocks import Blocks, embed
from sharebasis.model.held_out import divergence_on
from sharebasis.model.hooks import first_call, forced, watched
from sharebasis.model.sites import Site, find_sites
from sharebasis.runtime.progress import progress
from sharebasis.stages.propagate.refit import Refitter, refittable
from sharebasis.stages.propagate.refitted import Refitted
from sharebasis.stages.propagate.streams import Progress, Streams

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """What the original does in a block."""

    inputs: Mapping[str, Sequence[Tensor]]
    """Of sublayers, by name, batch by batch."""
    outputs: Tensor
    """Of the block."""


Drift = Callable[[int, Tensor], Tensor]
"""The number and the hidden states of a batch -> δ of every token."""


@dataclass(frozen=True)
class Propagator:
    """Two models, and what it takes to go through their blocks."""

    original: PreTrainedModel
    loaded: LoadedModel
    """Compressed; is given the new weights at once."""
    blocks: Blocks
    sublayers: Sequence[Sublayer]
    """Those to refit."""
    refitter: Refitter
    settings: PropagateSettings

    @property
    def writers(self) -> set[str]:
        """The sublayers that write to the residual stream."""
        return {sublayer.name for sublayer in self.sublayers if sublayer.role == "write"}

    @property
    def compressed(self) -> PreTrainedModel:
        """The model that runs."""
        return self.loaded.model

    def pass_block(self, i: int, streams: Streams, refitted: Refitted) -> None:
        """Refit the groups of a block, one input after the other, and take both streams past it."""
        groups = self._groups(i, streams.original)
        run = self._run_original(i, groups, streams.original)
        streams.original = run.outputs
        for site, of_site in groups.items():
            inputs = self._gather(i, site, run, streams.compressed)
            for group in of_site:
                form = self.loaded.stored(group)
                refitted.add(self.loaded, group, form.refit(self.refitter.problems(group, inputs)))
                if self.settings.mean and inputs.drift is None:
                    self._keep_means(group, inputs, refitted)
        block = self.compressed.get_submodule(self.blocks.names[i])
        streams.compressed = torch.cat(
            [self._run(i, block, chunk).cpu() for chunk in self._cut(streams.compressed)]
        )

    def _keep_means(self, group: StoredGroup, inputs: PairedMoment, refitted: Refitted) -> None:
        """New biases of the sublayers of a group that have one, which they are given at once."""
        for part, linear in zip(group.parts, self.loaded.linears(group), strict=True):
            bias = self.compressed.get_submodule(part.sublayer).bias
            if isinstance(bias, Tensor):
                rows = part.rows.numbers.to(bias.device)
                bias[rows] = self.refitter.bias(part, linear.dense(), inputs).to(bias)
                refitted.biases[f"{part.sublayer}.bias"] = bias.float().cpu().clone()

    def _groups(self, i: int, hidden: Tensor) -> Mapping[Site, Sequence[StoredGroup]]:
        """Inputs in a block, in the order in which they come up, and the groups that read them."""
        block, chunk = self.original.get_submodule(self.blocks.names[i]), self._cut(hidden)[0]
        prefix, run = f"{self.blocks.names[i]}.", partial(self._run, i, block, chunk)
        names = [s.name for s in self.sublayers if s.name.startswith(prefix)]
        with watched({name: self.original.get_submodule(name) for name in names}) as seen:
            run()
        sites = find_sites(self.original, list(seen), run)
        by_site = {site: refittable(self.loaded.index.groups, site.readers) for site in sites}
        return {site: groups for site, groups in by_site.items() if groups}

    def _run_original(self, i: int, sites: Iterable[Site], hidden: Tensor) -> _Run:
        block = self.original.get_submodule(self.blocks.names[i])
        modules = {site.name: self.original.get_submodule(site.name) for site in sites}
        inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
        outputs = []
        for chunk in self._cut(hidden):
            with watched(modules) as seen:
                outputs.append(self._run(i, block, chunk).cpu())
            for name, of_module in inputs.items():
                of_module.append(seen[name].cpu())
        return _Run(inputs, torch.cat(outputs))

    def _gather(self, i: int, site: Site, run: _Run, hidden: Tensor) -> PairedMoment:
        """Of the original's inputs and what the compressed model has there now."""
        block = self.compressed.get_submodule(self.blocks.names[i])
        module, device = self.compressed.get_submodule(site.name), self.compressed.device
        accumulator = PairAccumulator(
            site.name, site.d, self.refitter.kept_columns(site.name), device
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
        """How to measure the drift of a residual stream where a sublayer writes to it.

        The compressed block runs with that sublayer and all that write after it forced to put
        out what they do in the original; what its output lacks then, the stream lacked before. None
        if the sublayer does not write, or the block does not simply add up what it writes.
        """
        writers = [name for name in run.inputs if name in self.writers]
        if site.name not in writers:
            return None
        writers = writers[writers.index(site.name) :]
        block = self.compressed.get_submodule(self.blocks.names[i])
        device, outputs = self.compressed.device, self._cut(run.outputs)

        def block_output(j: int, chunk: Tensor, extra: Tensor | None = None) -> Tensor:
            """The block's output in batch `j`, with something more written to the stream."""
            forced_outputs = {
                self.compressed.get_submodule(name): self.original.get_submodule(name)(
                    run.inputs[name][j].to(device)
                )
                for name in writers
            }
            if extra is not None:
                output = forced_outputs[self.compressed.get_submodule(site.name)]
                output += extra.reshape(output.shape)  # some models flatten batch and window
            with forced(forced_outputs):
                return self._run(i, block, chunk)

        chunk = self._cut(hidden)[0]
        plain = block_output(0, chunk)
        extra = plain.flip(1)
        # In float32, as the squares of float16 overflow.
        response, extra = (block_output(0, chunk, extra) - plain).float(), extra.float()
        scale = (response * extra).sum() / extra.square().sum()
        if not (response - scale * extra).norm() < 1e-2 * response.norm():
            return None
        return lambda j, chunk: (outputs[j].to(device) - block_output(j, chunk)) / scale

    def _run(self, i: int, block: nn.Module, hidden: Tensor) -> Tensor:
        return self.blocks.run(i, block, hidden.to(self.compressed.device))

    def _cut(self, hidden: Tensor) -> Sequence[Tensor]:
        return hidden.split(self.settings.batch)


def pass_blocks(
    propagator: Propagator,
    text: Int64[Tensor, "windows window"],
    held_out: Int64[Tensor, "others window"],
    checkpoint: Checkpoint,
) -> Progress:
    """Refit one block after the other, from the first or where a run was killed."""
    names = propagator.blocks.names
    state = _resumed(propagator, checkpoint) or _first(propagator, text, held_out)
    with progress("propagate", len(names), "blocks", len(state.distances)) as advance:
        for i in range(len(state.distances), len(names)):
            propagator.pass_block(i, state.streams, state.refitted)
            state.distances.append(state.streams.distance)
            advance()
            if checkpoint.due:
                state.save(checkpoint, propagator.loaded.index)
    return state


def _first(propagator: Propagator, text: Tensor, held_out: Tensor) -> Progress:
    """Before the first block."""
    first, batch = propagator.blocks.names[0], propagator.settings.batch
    hidden = [embed(propagator.original, first, chunk).cpu() for chunk in text.split(batch)]
    streams = Streams(torch.cat(hidden), torch.cat(hidden))
    before = divergence_on(held_out, propagator.original, propagator.compressed)
    return Progress(before, [], Refitted(), streams)


def _resumed(propagator: Propagator, checkpoint: Checkpoint) -> Progress | None:
    """Where a run was killed; the compressed model is given the weights of its checkpoint."""
    if (state := checkpoint.resume()) is None:
        return None
    record, reader = state
    tensors = dict(reader.stream())
    streams = Streams(tensors.pop("original"), tensors.pop("compressed"))
    refitted = Refitted.resumed(propagator.loaded, tensors)
    log.info("Going on behind block %d, the last checkpoint.", len(record["distances"]))
    return Progress(record["before"], list(record["distances"]), refitted, streams)
