"""Where a compressed model goes wrong: its error, split over heads and MLPs.

Component c of the original turns its input x into f(x), that of the compressed model its input x̂
into f̂(x̂). Its error is its own and what it inherits:

    f̂(x̂) - f(x) = [f̂(x) - f(x)] + [f̂(x̂) - f̂(x)]

The first is its own weights' doing, on the input that the original has there. The second would be
there with its weights as they were; what later components make of an earlier one's error is counted
in it, so that shares are of the direct way to the logits. f̂(x) comes from a third pass, of the
compressed model with its stream forced to the original's before every sublayer.

Behind the last norm, whose scale is σ,

    n(x̂) - n(x) = w ⊙ C (x̂ - x) / σ + w ⊙ C x̂ (1/σ̂ - 1/σ),    x̂ - x = Σ_c [f̂_c(x̂_c) - f_c(x_c)],

so that the change of the scale is one more term, and the error of the logits is a sum to the last
number (`error_split` says what it costs). What an unembedding of its own adds is a term as well; it
is rounding unless somebody has changed it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.architecture.sublayers import Classification
from sharebasis.residual.cache import ActivationCache, Observer
from sharebasis.residual.capture import FINAL
from sharebasis.residual.head_views import sublayers_of
from sharebasis.residual.norm import Norm, along, along_heads
from sharebasis.runtime.progress import progress
from sharebasis.stages.attribute.attribution import (
    NORM,
    UNEMBEDDING,
    Attribution,
    AttributionSums,
)
from sharebasis.stages.attribute.error_split import (
    CHUNK,
    Costs,
    costs,
    depth_costs,
)


@torch.no_grad()
def attribute(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    windows: Int64[Tensor, "windows window"],
    batch: int = 2,
    lens_predictions: int = 256,
    sublayers: Classification | None = None,
) -> Attribution:
    """Split the error of a compressed model over its components.

    A batch is run three times (original, compressed, compressed on the original's streams); of
    everything but sums no more than a batch is held at a time.

    Args:
        original: dense.
        compressed: of the same family and sizes.
        windows: token ids, one sequence a row; the last position of each predicts nothing.
        batch: windows a forward pass.
        lens_predictions: about how many of the predictions, evenly spread, are read off at
            every depth.
        sublayers: of both; None finds them.

    Raises:
        StreamError: the residual stream of the model is not a plain sum.
    """
    sublayers = sublayers_of(original) if sublayers is None else sublayers
    models = Observer(original, sublayers), Observer(compressed, sublayers)
    sums = AttributionSums(len(models[0].layers))
    n, n_first = windows[:, 1:].numel(), windows[:batch, 1:].numel()
    step = min(max(1, n // lens_predictions), n_first)  # one of a batch at least
    with progress("attribute", windows.numel(), "tokens") as advance:
        for chunk in windows.split(batch):
            _add(sums, models, chunk, step)
            advance(chunk.numel())
    return sums.result()


def _add(
    sums: AttributionSums, models: tuple[Observer, Observer], tokens: Tensor, step: int
) -> None:
    """One batch; every `step`-th of its predictions is read off at every depth."""
    original, compressed = models
    last = sums.n_layers - 1
    kept = _kept(last)
    old, new = original(tokens, kept)[1], compressed(tokens, kept)[1]
    forced = compressed(tokens, _kept(last, forced=True), forced=old)[1]
    targets = tokens[:, 1:].to(original.model.device).flatten()
    z, z_hat = (_predictions(cache["hook_raw_logits"]) for cache in (old, new))
    head = original.unembedding
    error_costs = costs(z, z_hat, targets, head.w_u, head.b_u, head.multiplier, head.cap)
    sums.total += error_costs.total.double().sum(1).cpu()
    sums.linear += error_costs.linear.double().sum(1).cpu()
    sums.n_predictions += len(targets)
    _add_components(sums, _Passes(old, new, forced), models, error_costs)
    read_off = torch.arange(step // 2, len(targets), step, device=targets.device)
    for part in read_off.split(CHUNK):
        final = head.capped(z[part].float() * head.multiplier).softmax(-1)
        _add_lens(sums, models, (old, new), final, targets[part], part)


def _kept(last: int, forced: bool = False) -> Any:
    """What has to be kept of a pass: predicate of names."""
    ends = ["attn.hook_z", "hook_mlp_out", "hook_attn_factor", "hook_embed", "hook_pos_embed"]
    if not forced:
        ends += ["hook_resid_pre", "hook_resid_mid", "hook_raw_logits"]
    names = {f"blocks.{last}.hook_resid_post", f"{FINAL}.hook_scale"}
    return lambda key: key in names or key.endswith(tuple(ends))


def _predictions(x: Float[Tensor, "batch pos *d"]) -> Float[Tensor, "predictions ..."]:
    """All but the last position, one after the other."""
    return x[:, :-1].flatten(0, 1)


@dataclass(frozen=True, slots=True)
class _Passes:
    """The caches of the three passes."""

    old: ActivationCache
    new: ActivationCache
    forced: ActivationCache
    """Of the compressed model on the original's streams."""

    def __iter__(self) -> Iterator[ActivationCache]:
        return iter((self.old, self.new, self.forced))


def _add_components(
    sums: AttributionSums,
    passes: _Passes,
    models: tuple[Observer, Observer],
    error_costs: Costs,
) -> None:
    old, new, _ = passes
    norm = old.norms[FINAL]
    scale = _predictions(old["scale"])
    directions = norm.pull_back(error_costs.directions) / scale
    for label in ("embed", "pos_embed"):
        if label in old:
            error = along(_predictions(new[label] - old[label]), directions)
            sums.add(label, error, torch.zeros_like(error))
    for i in range(sums.n_layers):
        _add_attention(sums, passes, models, directions, i)
        if ("mlp_out", i) in old:
            y, y_hat, y_forced = (along(_predictions(x["mlp_out", i]), directions) for x in passes)
            sums.add(f"L{i} MLP", y_forced - y, y_hat - y_forced, i)
    _add_end(sums, passes, models[0], error_costs, norm, scale)


def _add_attention(
    sums: AttributionSums,
    passes: _Passes,
    models: tuple[Observer, Observer],
    directions: Float[Tensor, "m predictions d_model"],
    i: int,
) -> None:
    """Every head of a layer, and what its bias adds where there is one."""
    old, new = ((views.W_O, views.b_O) for views in (model.layers[i] for model in models))
    heads, biases = [], []
    for cache, (w_o, b_o) in zip(passes, (old, new, new), strict=True):
        key = f"blocks.{i}.hook_attn_factor"
        factor = _predictions(cache[key]) if key in cache else None
        heads.append(along_heads(_predictions(cache["z", i]), w_o, directions, factor))
        if b_o is not None:
            added = b_o.expand(directions.shape[1:])
            biases.append(along(added if factor is None else added * factor, directions))
    y, y_hat, y_forced = heads
    for h in range(y.shape[-1]):
        sums.add(f"L{i}H{h}", (y_forced - y)[..., h], (y_hat - y_forced)[..., h], i, h)
    if biases:
        y, y_hat, y_forced = biases
        sums.add(f"L{i} attention bias", y_forced - y, y_hat - y_forced, i)


def _add_end(
    sums: AttributionSums,
    passes: _Passes,
    original: Observer,
    error_costs: Costs,
    norm: Norm,
    scale: Float[Tensor, "predictions 1"],
) -> None:
    """The change of the last norm's scale, and of what comes after it."""
    x_hat = _predictions(passes.new["resid_post", -1])
    module = passes.old.final_module()
    scale_hat = norm.scale(x_hat, module(x_hat[None])[0])
    seen = along(norm.linear(x_hat, torch.ones_like(scale)), error_costs.directions)
    change = seen * (1 / scale_hat - 1 / scale)[:, 0]
    sums.add(NORM, torch.zeros_like(change), change)
    # With the original's norm and unembedding, the compressed model's logits would be these.
    there = seen / scale_hat[:, 0] + error_costs.directions @ norm.bias + error_costs.of_bias
    sums.add(UNEMBEDDING, error_costs.of_compressed - there, torch.zeros_like(there))


def _add_lens(
    sums: AttributionSums,
    models: tuple[Observer, Observer],
    caches: Sequence[ActivationCache],
    final: Float[Tensor, "n d_vocab"],
    targets: Int64[Tensor, " n"],
    read_off: Int64[Tensor, " n"],
) -> None:
    """Loss and KL at every depth, for some of the predictions."""
    sums.depths = sums.depths or [[0.0] * 4 for _ in range(sums.n_layers + 1)]
    sums.n_lens += len(read_off)
    entropy = torch.special.entr(final).sum().item()
    for k, (model, cache) in enumerate(zip(models, caches, strict=True)):
        for i in range(sums.n_layers + 1):
            name = ("resid_pre", i) if i < sums.n_layers else ("resid_post", -1)
            stream = _predictions(cache[name])[read_off]
            logits = model.unembedding.logits(cache.final_module()(stream[None])[0])
            loss, cross = depth_costs(logits, final, targets)
            sums.depths[i][k] += loss
            sums.depths[i][2 + k] += cross - entropy
