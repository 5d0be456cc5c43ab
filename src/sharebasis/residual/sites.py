"""Where in a hub model there is something to capture: from its classification to module names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.fused import Projection, projections_in
from sharebasis.architecture.sublayers import Classification, Sublayer
from sharebasis.errors import SelectionError, StreamError
from sharebasis.linalg.rows import Rows
from sharebasis.model import experts
from sharebasis.residual.weight_source import by_head

Branch = Literal["attn", "mlp"]
BRANCHES: Mapping[str, Branch] = {
    "q": "attn",
    "k": "attn",
    "v": "attn",
    "o": "attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}


@dataclass(frozen=True, slots=True)
class Output:
    """What an activation is of a sublayer's output."""

    key: str
    """Without the layer: `attn.hook_q`."""
    take: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LayerSites:
    """Where in one block things are, by HF name of modules."""

    block: str
    writers: Mapping[str, Branch]
    readers: Mapping[str, Branch]
    outputs: Mapping[str, tuple[Output, ...]]
    o: str | None
    """The only sublayer of attention that writes; None if there are none or several."""
    down: str | None
    """The same of the MLP."""
    n_heads: int


@dataclass(frozen=True, slots=True)
class Sites:
    """Where in a model things are, by HF name of modules."""

    embed: str
    layers: tuple[LayerSites, ...]
    unembed: str


def find_sites(model: PreTrainedModel, classification: Classification) -> Sites:
    """Name what writes to the stream, what reads it, and what heads and neurons are made of.

    Args:
        model: dense, wrapped or compressed.
        classification: its sublayers.

    Raises:
        SelectionError: it has no embeddings, or a writer is of neither attention nor MLP.
        StreamError: it runs a block several times.
    """
    embed, unembed = model.get_input_embeddings(), model.get_output_embeddings()
    if embed is None or unembed is None:
        raise SelectionError(
            f"This {model.config.model_type} model has no embedding or no unembedding; load it as "
            "a causal language model."
        )
    names = {id(module): name for name, module in model.named_modules()}
    layers: dict[int, list[Sublayer]] = {}
    for sublayer in classification.sublayers:
        layers.setdefault(sublayer.layer, []).append(sublayer)
    blocks = {id(model.get_submodule(sublayers[0].block)) for sublayers in layers.values()}
    if len(blocks) < len(layers):
        raise StreamError(
            f"{len(layers)} layers are {len(blocks)} blocks, some of which run several times; "
            "what each layer adds to the residual stream cannot be told."
        )
    stacks = experts.slices(model)
    return Sites(
        names[id(embed)],
        tuple(
            _layer_sites(classification, of_layer, stacks) for _, of_layer in sorted(layers.items())
        ),
        names[id(unembed)],
    )


def _layer_sites(
    classification: Classification,
    sublayers: Sequence[Sublayer],
    stacks: Mapping[str, experts.Slice],
) -> LayerSites:
    def module(sublayer: Sublayer) -> str:
        place = stacks.get(f"{sublayer.name}.weight")
        return sublayer.name if place is None else place.stack.rpartition(".")[0]

    writers: dict[str, Branch] = {}
    for sublayer in sublayers:
        if sublayer.role == "write":
            writers[module(sublayer)] = _branch(sublayer)
    readers: dict[str, Branch] = {}
    outputs: dict[str, tuple[Output, ...]] = {}
    n_heads = classification.dims.n_heads
    for sublayer in sublayers:
        if module(sublayer) != sublayer.name:
            readers[module(sublayer)] = "mlp"
            continue
        projections = projections_in(classification, sublayer)
        n_heads = next((x.n_heads for x in projections if x.family == "q"), n_heads)
        if sublayer.role != "read":
            continue
        branch = BRANCHES.get(projections[0].family) or _beside(sublayer, writers)
        if branch is not None:
            readers[sublayer.name] = branch
        if sublayer.expert is None and "expert" not in sublayer.name:
            outputs[sublayer.name] = _outputs(
                sublayer, projections, _is_gated(classification, sublayers)
            )
    only = {
        branch: of_branch[0] if len(of_branch) == 1 else None
        for branch in ("attn", "mlp")
        for of_branch in [[name for name, x in writers.items() if x == branch]]
    }
    down = only["mlp"] if not any(x.expert is not None for x in sublayers) else None
    return LayerSites(sublayers[0].block, writers, readers, outputs, only["attn"], down, n_heads)


def _branch(writer: Sublayer) -> Branch:
    if branch := BRANCHES.get(writer.family):
        return branch
    raise SelectionError(
        f"{writer.name} writes to the residual stream, but its name does not tell whether it "
        "belongs to attention or to the MLP; say family 'o' or 'down' of its weight type in a row "
        "of ARCHITECTURES (docs/families.md)."
    )


def _beside(reader: Sublayer, writers: Mapping[str, Branch]) -> Branch | None:
    """The branch of the writer in the same module, as far as that tells."""
    parent = reader.name.rpartition(".")[0]
    branches = {x for name, x in writers.items() if name.rpartition(".")[0] == parent}
    return branches.pop() if len(branches) == 1 else None


def _is_gated(classification: Classification, sublayers: Sequence[Sublayer]) -> bool:
    return any(
        projection.family == "gate"
        for sublayer in sublayers
        for projection in projections_in(classification, sublayer)
    )


def _outputs(
    sublayer: Sublayer, projections: Sequence[Projection], gated: bool
) -> tuple[Output, ...]:
    mlp = {"gate": "mlp.hook_pre", "up": "mlp.hook_pre_linear" if gated else "mlp.hook_pre"}
    outputs = []
    for projection in projections:
        if projection.family in ("q", "k", "v") and projection.n_heads:
            outputs.append(
                Output(
                    f"attn.hook_{projection.family}", _heads_of(projection.rows, projection.n_heads)
                )
            )
        elif projection.family in mlp:
            outputs.append(Output(mlp[projection.family], _rows_of(sublayer, projection)))
    return tuple(outputs)


def _heads_of(rows: Rows, n_heads: int) -> Callable[[Tensor], Tensor]:
    return lambda x: by_head(x.movedim(-1, 0), rows, n_heads).movedim(0, -2)


def _rows_of(sublayer: Sublayer, projection: Projection) -> Callable[[Tensor], Tensor]:
    def rows(x: Tensor) -> Tensor:
        return projection.rows_in(sublayer, x.shape[-1]).take(x.movedim(-1, 0)).movedim(0, -1)

    return rows
