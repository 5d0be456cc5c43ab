"""Hooks around a forward pass that keep what it computes, under TransformerLens's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sharebasis.errors import StreamError
from sharebasis.model.block_call import block_call, hidden_output, is_float
from sharebasis.model.hooks import attached
from sharebasis.residual.norm import Norm
from sharebasis.residual.norm_probe import TOLERANCE, norm_factor, probe_norm
from sharebasis.residual.residual_sums import BlockSums, Kind, StreamSums, storage_key, total_of
from sharebasis.residual.sites import Branch, LayerSites, Sites

FINAL = "ln_final"
_LN: Mapping[Branch, str] = {"attn": "ln1", "mlp": "ln2"}


@dataclass(slots=True)
class Captured:
    """What one forward pass computed."""

    logits: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By key; of the batch and positions of the tokens."""
    norms: dict[str, Norm] = field(default_factory=dict)
    """`blocks.3.ln1`, `ln_final` -> the norm there."""
    final_norm: str = ""
    """HF name of the last one."""


def capture(
    model: nn.Module,
    sites: Sites,
    run: Callable[[], Tensor],
    wanted: Callable[[str], bool],
    forced: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Captured:
    """Run a model and keep activations.

    Args:
        model: that holds the sites.
        sites: of `model`.
        run: called without arguments, runs tokens through `model` and returns the logits.
        wanted: whether to keep what has this key.
        forced: keys of `hook_resid_pre` and `hook_resid_mid` -> what the stream is made to be
            there, so that every component works on inputs that are given.
        device: where what is kept goes; None leaves it where it was computed.

    Raises:
        StreamError: the stream is not the sum of what was seen to be added to it.
    """
    pass_ = _Pass(sites, wanted, forced or {}, device)
    with attached(pass_.hooks(model)), pass_.sums:
        pass_.captured.logits = run()
    return pass_.captured


class _Pass:
    """The hooks of one forward pass."""

    def __init__(
        self,
        sites: Sites,
        wanted: Callable[[str], bool],
        forced: Mapping[str, Tensor],
        device: torch.device | str | None,
    ) -> None:
        self.sites, self.wanted, self.forced, self.device = sites, wanted, forced, device
        self.sums = StreamSums()
        self.captured = Captured(torch.empty(0))
        self._normed: dict[int, tuple[str, nn.Module, Tensor, Tensor]] = {}
        self._written: dict[str, Tensor] = {}

    def hooks(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Put the hooks in; each is yielded."""
        at = model.get_submodule
        yield at(self.sites.embed).register_forward_hook(self._embedded)
        for i, layer in enumerate(self.sites.layers):
            yield at(layer.block).register_forward_pre_hook(self._enter(i), with_kwargs=True)
            for name in layer.readers:
                yield at(name).register_forward_pre_hook(self._reads(i, layer.readers[name]))
            for name in {*layer.writers, *layer.outputs}:
                yield at(name).register_forward_hook(self._after(i, name))
            for key, only in (("attn.hook_z", layer.o), ("mlp.hook_post", layer.down)):
                if only is not None:
                    yield at(only).register_forward_pre_hook(self._before(i, key, layer))
            yield at(layer.block).register_forward_hook(self._leave(i))
        linear = {self.sites.unembed, self.sites.embed}
        linear = linear.union(*({*x.writers, *x.readers, *x.outputs} for x in self.sites.layers))
        for name, module in model.named_modules():
            if name not in linear and not any(True for _ in module.children()):
                yield module.register_forward_hook(self._norm(name))
        yield at(self.sites.unembed).register_forward_pre_hook(self._reads(None, None))
        yield at(self.sites.unembed).register_forward_hook(self._unembedded)

    def keep(self, key: str, x: Callable[[], Tensor]) -> None:
        if self.wanted(key):
            self.captured.tensors[key] = x() if self.device is None else x().to(self.device)

    # Embeddings, and what comes after the blocks

    def _embedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.sums.written(output, "embed")

    def _unembedded(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.keep("hook_raw_logits", lambda: output)

    # Blocks

    def _enter(self, i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            x, call = block_call(args, kwargs)
            if i == 0:
                self._keep_embeddings(x)
            stream = self.forced.get(f"blocks.{i}.hook_resid_pre")
            if stream is not None:
                x = stream.to(x.device).view(x.shape).clone()
            mid = self.forced.get(f"blocks.{i}.hook_resid_mid")
            self.sums.enter(x, None if mid is None else mid.to(x.device))
            self._normed.clear()
            self._written.clear()
            self.keep(f"blocks.{i}.hook_resid_pre", lambda: x)
            return call.arguments(x)

        return hook

    def _keep_embeddings(self, x: Tensor) -> None:
        components = self.sums.embedded(x)
        keys: tuple[tuple[str, Kind], ...] = (
            ("hook_embed", "embed"),
            ("hook_pos_embed", "pos_embed"),
        )
        for key, kind in keys:
            values = [part.value.expand(x.shape) for part in components if kind in part.kinds]
            if values:
                self.keep(key, partial(total_of, values))

    def _leave(self, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = hidden_output(output)
            block = self.sums.leave(x)
            if f"blocks.{i}.hook_resid_mid" not in self.forced:
                _require_sum(block, self.sites.layers[i].block)
            shape = block.before.shape
            self.keep(f"blocks.{i}.hook_resid_post", lambda: x)
            if block.mid is not None:
                mid = block.mid.view(shape)
                self.keep(f"blocks.{i}.hook_resid_mid", lambda: mid)
            branches: tuple[Branch, ...] = ("attn", "mlp")
            for branch in branches:
                added = block.of(branch)
                if added is not None:
                    self.keep(f"blocks.{i}.hook_{branch}_out", partial(_itself, added))
                only = self.sites.layers[i].o if branch == "attn" else self.sites.layers[i].down
                if added is not None and only in self._written:
                    written = self._written[only].view(shape)
                    self._keep_factor(f"blocks.{i}.hook_{branch}_factor", written, added)

        return hook

    def _keep_factor(self, key: str, written: Tensor, added: Tensor) -> None:
        if not torch.equal(written, added):
            self.keep(key, lambda: norm_factor(written, added, key))

    # Sublayers

    def _before(self, i: int, key: str, layer: LayerSites) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = self._in_batch(args[0])
            z = x.unflatten(-1, (layer.n_heads, -1)) if key == "attn.hook_z" else x
            self.keep(f"blocks.{i}.{key}", lambda: z)

        return hook

    def _in_batch(self, x: Tensor) -> Tensor:
        """(tokens, d) -> (batch, position, d), where a family flattens them."""
        assert self.sums.block is not None
        return x.view(*self.sums.block.before.shape[:-1], x.shape[-1])

    def _after(self, i: int, name: str) -> Callable[..., None]:
        layer = self.sites.layers[i]

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for activation in layer.outputs.get(name, ()):
                rows = partial(activation.take, self._in_batch(output))
                self.keep(f"blocks.{i}.{activation.key}", rows)
            if name in layer.writers:
                x = hidden_output(output)
                self._written[name] = x.clone()  # some families go on in the same memory
                self.sums.written(x, layer.writers[name])

        return hook

    # Norms

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not (args and is_float(args[0]) and is_float(output)):
                return
            x = args[0]
            if (
                x.shape == output.shape
                and self.sums.is_stream(x)
                and storage_key(x) != storage_key(output)
            ):
                self._normed[storage_key(output)] = name, module, x, output

        return hook

    def _reads(self, i: int | None, branch: Branch | None) -> Callable[..., None]:
        place = FINAL if branch is None else f"blocks.{i}.{_LN[branch]}"

        def hook(_reader: nn.Module, args: tuple[Tensor, ...]) -> None:
            normed = self._normed.get(storage_key(args[0]))
            if normed is None or place in self.captured.norms:
                return
            name, module, x, y = normed
            if branch is None:
                self.captured.final_norm = name
            norm = probe_norm(module, x, place)
            self.captured.norms[place] = norm
            shape = (
                x.shape if i is None or self.sums.block is None else self.sums.block.before.shape
            )
            scale = norm.scale(x, y)
            self.keep(f"{place}.hook_scale", lambda: scale.view(*shape[:-1], 1))
            self.keep(f"{place}.hook_normalized", lambda: (norm.centre(x) / scale).view(shape))
            self.keep(f"{place}.hook_out", lambda: y.view(shape))

        return hook


def _require_sum(block: BlockSums, name: str) -> None:
    strange = [x for x in block.components if x.kinds not in ({"attn"}, {"mlp"})]
    error = block.error()
    if error <= TOLERANCE and not strange:
        return
    problem = (
        f"{len(strange)} of the things that {name} adds to the residual stream come neither from "
        "its attention nor from its MLP alone"
        if strange
        else f"what goes into {name} and what its sublayers were seen to add do not make up what "
        f"comes out of it (off by {error:.0f} units of rounding)"
    )
    raise StreamError(
        f"This model's stream is not a plain sum: {problem}. A block whose norm comes after the "
        "sum (as in BERT or OPT-350m) cannot be taken apart so."
    )


def _itself(x: Tensor) -> Tensor:
    return x
