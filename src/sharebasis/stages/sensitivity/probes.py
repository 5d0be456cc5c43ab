"""What the model diverges by when one cell of it alone is compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.linalg.divergence import divergence
from sharebasis.model.blocks import LateStart
from sharebasis.runtime.progress import progress
from sharebasis.stages.sensitivity.corrections import Cell
from sharebasis.stages.sensitivity.draft import Draft, Linears, compressed


@torch.no_grad()
def probe(
    model: PreTrainedModel,
    linears: Linears,
    draft: Draft,
    cells: Sequence[Cell],
    windows: Int64[Tensor, "windows window"],
    batch: int,
    blocks: Mapping[int, str],
) -> Sequence[float]:
    """KL(original ‖ original with one cell compressed) of every cell, nats a prediction.

    A cell costs a forward pass over the windows, from its first block on; memory holds the model,
    its largest cell and two batches of logits.

    Args:
        model: dense.
        linears: its parts, wrapped.
        draft: what a cell becomes.
        cells: of its groups.
        windows: token ids, one sequence a row.
        batch: windows a forward pass.
        blocks: HF name of the block of every layer.
    """
    late, sums = LateStart(model, blocks), [0.0] * len(cells)
    starts = {cell.layers[0] for cell in cells}
    starts = late.exact(starts, partial(_logits, model, windows[:1]))
    with progress("sensitivity", len(cells) * windows.numel(), "tokens") as advance:
        for chunk in windows.split(batch):
            original, outputs = late.record(starts, partial(_logits, model, chunk))
            for i, cell in enumerate(cells):
                with (
                    compressed(linears, draft, cell.groups),
                    late.start_at(cell.layers[0], outputs),
                ):
                    sums[i] += len(chunk) * divergence(original, _logits(model, chunk)).item()
                advance(chunk.numel())
    return [total / len(windows) for total in sums]


def _logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """The last position of a window predicts nothing and is left out."""
    logits: Tensor = model(input_ids=windows.to(model.device), use_cache=False).logits
    return logits[:, :-1]
