"""A model's weights by head, under the names and in the shapes that TransformerLens gives them.

Norms are not folded in, nothing is centred, and grouped keys and values are not repeated.
"""

# W_Q and its like are what everybody calls them.
# ruff: noqa: N802

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.fused import projections_in
from sharebasis.architecture.roles import Role
from sharebasis.architecture.sublayers import Classification
from sharebasis.config.types import Family
from sharebasis.errors import SelectionError
from sharebasis.model.classify import classify_model
from sharebasis.residual.weight_source import SublayerTensors, WeightSource, require_whole_heads

_SIDE: Mapping[Family, Role] = {
    "q": "read",
    "k": "read",
    "v": "read",
    "o": "write",
    "gate": "read",
    "up": "read",
    "down": "write",
}
"""Which end of a family's weight the residual stream is at."""
_MLP = ("gate", "up", "down")


def head_views(
    model: PreTrainedModel, classification: Classification | None = None
) -> tuple[LayerViews, ...]:
    """The weights of every layer, by head: `head_views(model)[3].W_Q`.

    Each is looked up when it is asked for, and is a view: it shares the memory of the model's
    parameter, so that a change of one is a change of the other. Copied are

    - what a fused weight has in several places with several heads in each: W_Q and b_Q of
      Falcon's newer layout, where every key-value head serves several query heads, and all of
      q, k and v of CodeGen, whose heads take turns in four groups;
    - what it has in several places that are more than a row and less than a head (none of the
      families of the table);
    - a wrapped sublayer, whose parts are put together, and a compressed one, whose factors are
      multiplied, at every access.

    Args:
        model: dense, wrapped or compressed, on any device. Ask anew after modules were put in
            or out.
        classification: its sublayers; None classifies a model of the same class and config.

    Raises:
        SelectionError, SplitError: the model's sublayers cannot be found or cut.

    Example:
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)
        >>> model = AutoModelForCausalLM.from_config(config)
        >>> layer = head_views(model)[1]
        >>> layer.W_Q.shape, layer.W_O.shape, layer.W_in.shape
        (torch.Size([4, 32, 8]), torch.Size([4, 8, 32]), torch.Size([32, 128]))
        >>> _ = layer.W_V[2].detach().zero_()  # what is written to a view is in the model
        >>> model.transformer.h[1].attn.c_attn.weight[:, 64 + 16 : 64 + 24].any().item()
        False
    """
    classification = sublayers_of(model) if classification is None else classification
    tensors = SublayerTensors(model)
    sources: dict[int, list[WeightSource]] = {i: [] for i in range(classification.dims.n_layers)}
    for sublayer in classification.sublayers:
        for projection in projections_in(classification, sublayer):
            source = WeightSource(sublayer, projection, tensors)
            sources.setdefault(sublayer.layer, []).append(source)
    return tuple(
        LayerViews(i, of_layer, classification.dims.n_heads) for i, of_layer in sources.items()
    )


def sublayers_of(model: PreTrainedModel) -> Classification:
    """The sublayers that a model had before anybody wrapped or compressed it.

    Raises:
        SelectionError: they cannot be found.
    """
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config))
    return classify_model(plain)


class MlpViews:
    """The weights of one MLP.

    W_gate and b_gate are None where there is no gate; a bias is None where there is none.
    Anything else that the MLP does not have as one matrix is a SelectionError.
    """

    def __init__(self, place: str, sources: Iterable[WeightSource]) -> None:
        """Args:
        place: which MLP, for messages.
        sources: of its weights.
        """
        self._place = place
        self._sources = tuple(sources)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return self._one("up").weight.T

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"] | None:
        return self._one("gate").weight.T if self._of("gate") else None

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return self._one("down").weight.T

    @property
    def b_in(self) -> Float[Tensor, " d_mlp"] | None:
        return self._one("up").bias

    @property
    def b_gate(self) -> Float[Tensor, " d_mlp"] | None:
        return self._one("gate").bias if self._of("gate") else None

    @property
    def b_out(self) -> Float[Tensor, " d_model"] | None:
        return self._one("down").bias

    def _of(self, family: Family) -> Sequence[WeightSource]:
        return [source for source in self._sources if source.family == family]

    def _one(self, family: Family) -> WeightSource:
        """The one source of a family that touches the residual stream where it has to.

        What does not run (a decoder's attention to an encoder that is not there) does not count
        where something runs.

        Raises:
            SelectionError: there is none, or there are several.
        """
        roles = (_SIDE[family], "ambiguous_unknown")
        candidates = [source for source in self._of(family) if source.sublayer.role in roles]
        running = [source for source in candidates if "trace" in source.sublayer.says]
        if len(running or candidates) == 1:
            return (running or candidates)[0]
        does = "reads" if _SIDE[family] == "read" else "writes to"
        raise SelectionError(
            f"A view needs one sublayer of family {family!r} that {does} the residual stream, and "
            f"{self._place} has {len(candidates) or 'none'}. What it has: {self._contents()}."
        )

    def _contents(self) -> str:
        sublayers = (
            f"{source.sublayer.name} ({source.family}, {source.sublayer.role})"
            for source in self._sources
        )
        return ", ".join(dict.fromkeys(sublayers)) or "nothing"


class LayerViews(MlpViews):
    """The weights of one layer: those of its attention, and of its MLP unless it has experts.

    A bias is None where there is none. Anything else that the layer does not have as one
    matrix is a SelectionError: the W_in of a layer of experts; W_K and W_V of latent attention,
    between whose latent and the residual stream there is a norm. It has W_UQ, W_UK and W_UV,
    which go up from the latent (DeepSeek-V2, arXiv:2405.04434).
    """

    experts: tuple[MlpViews, ...]
    """Of a mixture, by number; none in a dense layer."""
    shared_experts: MlpViews | None
    """The MLP that runs beside the experts for every token."""

    def __init__(self, layer: int, sources: Iterable[WeightSource], n_heads: int) -> None:
        """Args:
        layer: its number.
        sources: of its weights.
        n_heads: query heads, if nothing among the sources says it.
        """
        place = f"layer {layer}"
        by_expert: dict[int, list[WeightSource]] = {}
        dense: list[WeightSource] = []
        for source in sources:
            expert = source.sublayer.expert
            (dense if expert is None else by_expert.setdefault(expert, [])).append(source)
        shared = [source for source in dense if by_expert and source.family in _MLP]
        super().__init__(place, [source for source in dense if source not in shared])
        self.experts = tuple(
            MlpViews(f"expert {i} of {place}", of_expert)
            for i, of_expert in sorted(by_expert.items())
        )
        # A gate alone is a router.
        is_mlp = any(source.family == "down" for source in shared)
        self.shared_experts = MlpViews(f"shared experts of {place}", shared) if is_mlp else None
        queries = (source.projection.n_heads for source in dense if source.family == "q")
        self._n_heads = next(queries, n_heads)

    @property
    def W_Q(self) -> Float[Tensor, "n_heads d_model d_head"]:
        return self._one("q").weight_by_head()

    @property
    def W_K(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:
        return self._one("k").weight_by_head()

    @property
    def W_V(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:
        return self._one("v").weight_by_head()

    @property
    def W_O(self) -> Float[Tensor, "n_heads d_head d_model"]:
        o = self._one("o")
        require_whole_heads(o.sublayer, "columns", o.sublayer.shape[1], self._n_heads)
        return o.weight.T.unflatten(0, (self._n_heads, -1))

    @property
    def W_UQ(self) -> Float[Tensor, "n_heads d_latent d_head"]:
        """With the part that is rotated, which comes last."""
        return self._up("q").weight_by_head()

    @property
    def W_UK(self) -> Float[Tensor, "n_heads d_latent d_nope"]:
        """Without the part that is rotated, which all heads share."""
        return self._up("k").weight_by_head()

    @property
    def W_UV(self) -> Float[Tensor, "n_heads d_latent d_v"]:
        return self._up("v").weight_by_head()

    @property
    def b_Q(self) -> Float[Tensor, "n_heads d_head"] | None:
        return self._one("q").bias_by_head()

    @property
    def b_K(self) -> Float[Tensor, "n_kv_heads d_head"] | None:
        return self._one("k").bias_by_head()

    @property
    def b_V(self) -> Float[Tensor, "n_kv_heads d_head"] | None:
        return self._one("v").bias_by_head()

    @property
    def b_O(self) -> Float[Tensor, " d_model"] | None:
        return self._one("o").bias

    def _up(self, family: Family) -> WeightSource:
        """The one source of a family that reads a latent."""
        candidates = [x for x in self._of(family) if x.sublayer.role == "neither"]
        if len(candidates) == 1:
            return candidates[0]
        raise SelectionError(
            f"A view needs one sublayer of family {family!r} that reads a latent, and "
            f"{self._place} has {len(candidates) or 'none'}. What it has: {self._contents()}."
        )

    def _of(self, family: Family) -> Sequence[WeightSource]:
        if self.experts and family in _MLP:
            beside = " and .shared_experts" if self.shared_experts else ""
            raise SelectionError(
                f"{self._place} has {len(self.experts)} experts and no {family} of its own; ask "
                f"its .experts[i]{beside} for W_in, W_gate, W_out and their biases."
            )
        return super()._of(family)
