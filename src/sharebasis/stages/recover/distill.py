"""A compressed model learns to say what the original says: the loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.config.refine import RecoverSettings
from sharebasis.errors import RecoveryError
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.linalg.divergence import divergence, hidden_distance
from sharebasis.model.hub import DTYPES
from sharebasis.runtime.progress import progress
from sharebasis.stages.recover.muon import Muon
from sharebasis.stages.recover.outcome import Look, Recovery

log = logging.getLogger(__name__)

SHORT = 512
"""Tokens of a window up to which the weights of attention, window² a head, fit into memory."""

Factors = Mapping[str, nn.Parameter]
"""What is trained, by the names of its tensors."""


def distill(
    original: PreTrainedModel,
    compressed: PreTrainedModel,
    factors: Factors,
    windows: Int64[Tensor, "windows window"],
    settings: RecoverSettings,
    seed: int,
    checkpoint: Checkpoint,
    kept: Mapping[str, Tensor] | None = None,
) -> Recovery:
    """Train the factors to say what the original says; they hold the best ones afterwards.

    Bases stay shared and ranks stay as they are, so the model stores as many numbers as
    before. Stops when the held-out windows no longer gain. The optimizer is Muon: it moves
    every direction of a factor by as much, where AdamW, at a rate that is safe for the strong
    directions of a balanced factor, hardly moves the weak ones.

    Args:
        original: dense, in eval mode, on the device of `compressed`.
        compressed: that uses the factors.
        factors: matrices that require gradients.
        windows: of one text, each beginning where the one before ends; `settings.windows` to train
            on and then `settings.held_out`.
        settings: of the training.
        seed: of the order of the windows.
        checkpoint: where a run that was killed goes on from.
        kept: of some factors, which entries they have; the others stay zero.

    Raises:
        RecoveryError: the loss is not finite.
    """
    training = _Training(original, compressed, factors, windows, settings, seed, kept or {})
    training.resume(checkpoint)
    with progress("recover", settings.steps, "steps", training.step) as advance:
        training.look_if_due()
        while training.step < settings.steps and not training.stalled:
            training.take_step()
            advance()
            training.look_if_due()
            if checkpoint.due:
                checkpoint.save(*training.state())
    training.restore_best()
    return training.result()


class _Training:
    """The state of a training, which a checkpoint holds."""

    def __init__(
        self,
        original: PreTrainedModel,
        compressed: PreTrainedModel,
        factors: Factors,
        windows: Tensor,
        settings: RecoverSettings,
        seed: int,
        kept: Mapping[str, Tensor],
    ) -> None:
        self._original, self._compressed = original, compressed
        self._settings, self._seed = settings, seed
        if compressed.device.type == "cpu" and settings.window <= SHORT:
            # torch's fused attention takes over twice as long as plain products in bfloat16 there.
            for model in (original, compressed):
                model.set_attn_implementation("eager")
        windows = windows.to(compressed.device)
        self._windows, self._held_out = windows.split([settings.windows, settings.held_out])
        self._factors = factors
        self._best = {name: own.detach().clone() for name, own in self._factors.items()}
        masks = {factors[name]: own for name, own in kept.items()}
        self._optimizer = Muon(list(factors.values()), masks)
        self._looks: list[Look] = []
        self.step = 0

    @property
    def stalled(self) -> bool:
        """Whether the last `patience` looks have found nothing better."""
        recent = self._looks[-self._settings.patience :]
        return len(self._looks) > len(recent) and self._best_look not in recent

    @property
    def _best_look(self) -> Look:
        return min(self._looks, key=lambda look: look.divergence)

    def take_step(self) -> None:
        loss = self._loss(self._batch())
        if not loss.isfinite():
            raise RecoveryError(
                f"The loss of step {self.step + 1} is {loss.item()}. Lower "
                f"recover.learning_rate ({self._settings.learning_rate}), or set "
                "recover.dtype=float32."
            )
        loss.backward()
        rate = learning_rate(self.step, self._settings, self._looks[0].divergence)
        self._optimizer.step(self.step, rate)
        self.step += 1

    def _batch(self) -> Tensor:
        """The windows of a step: every time round the text in another order, and every other time
        from half a window on, so that tokens come after others than the time before."""
        (n, length), size = self._windows.shape, self._settings.batch
        text, starts = self._windows.flatten(), []
        for i in range(self.step * size, (self.step + 1) * size):
            times, place = divmod(i, n)
            generator = torch.Generator().manual_seed(self._seed + times)
            first = int(torch.randperm(n, generator=generator)[place]) * length
            starts.append(min(first + times % 2 * (length // 2), len(text) - length))
        return torch.stack([text[start : start + length] for start in starts])

    def _loss(self, windows: Tensor) -> Tensor:
        hidden = self._settings.hidden
        with torch.no_grad(), self._arithmetic():
            theirs = _run(self._original, windows, hidden > 0)
        with self._arithmetic():
            ours = _run(self._compressed, windows, hidden > 0)
        loss = divergence(theirs.logits, ours.logits)
        if hidden:
            loss = loss + hidden * hidden_distance(theirs.hidden_states, ours.hidden_states)
        return loss

    def _arithmetic(self) -> AbstractContextManager[None]:
        dtype = DTYPES[self._settings.dtype]
        return torch.autocast(self._compressed.device.type, dtype, enabled=dtype != torch.float32)

    def look_if_due(self) -> None:
        """Look at the held-out windows, unless this step's look was taken before a kill."""
        settings = self._settings
        due = self.step % settings.look_every == 0 or self.step == settings.steps
        if not due or any(look.step == self.step for look in self._looks):
            return
        with torch.no_grad(), self._arithmetic():
            found = [
                divergence(
                    _run(self._original, chunk).logits, _run(self._compressed, chunk).logits
                ).item()
                * len(chunk)
                for chunk in self._held_out.split(settings.batch)
            ]
        look = Look(self.step, sum(found) / len(self._held_out))
        log.info("recover: step %d, held-out divergence %.4f nats", look.step, look.divergence)
        self._looks.append(look)
        if self._best_look is look:
            for name, own in self._factors.items():
                self._best[name].copy_(own.detach())

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, own in self._factors.items():
                own.copy_(self._best[name])
                own.grad = None  # of those whose turn did not come again

    def result(self) -> Recovery:
        tokens = self.step * self._settings.batch * self._windows.shape[1]
        return Recovery(self.step, self._best_look.step, tokens, tuple(self._looks))

    def state(self) -> tuple[Mapping[str, Any], Iterator[tuple[str, Tensor]]]:
        """For a checkpoint."""
        record = {"step": self.step, "looks": [asdict(look) for look in self._looks]}
        return record, self._tensors()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, own in self._factors.items():
            yield f"{name}.factor", own.detach()
            yield f"{name}.best", self._best[name]
            yield f"{name}.momentum", self._optimizer.momentum(own)
            if own.grad is not None:  # none is not zero: without one, Muon leaves a matrix alone
                yield f"{name}.gradient", own.grad

    def resume(self, checkpoint: Checkpoint) -> None:
        if (found := checkpoint.resume()) is None:
            return
        record, reader = found
        self.step = record["step"]
        self._looks = [Look(**look) for look in record["looks"]]
        for name, own in self._factors.items():
            own.data.copy_(reader.read(f"{name}.factor"))
            self._best[name].copy_(reader.read(f"{name}.best"))
            self._optimizer.restore(own, reader.read(f"{name}.momentum"))
            if f"{name}.gradient" in reader.files:
                own.grad = reader.read(f"{name}.gradient").to(own.device)
        log.info("Going on from step %d, the last checkpoint.", self.step)


def learning_rate(step: int, settings: RecoverSettings, divergence: float) -> float:
    """A linear rise over the warm-up, then half a cosine to zero at the last step.

    In proportion to the divergence, as Muon's steps are as long as its rate says, however small the
    gradient: those that suit a model far off lead one that is nearly right astray. (That it
    is not the root of the divergence, which would be how far there is to go, was measured.)

    Args:
        step: from 0.
        settings: of the training.
        divergence: of the compressed model before the first step, in nats.
    """
    highest = settings.learning_rate * max(divergence, 0.0)
    rise = settings.warmup * settings.steps
    if step < rise:
        return highest * (step + 1) / (rise + 1)
    done = (step - rise) / (settings.steps - rise)
    return highest * (1 + math.cos(math.pi * done)) / 2


def _run(model: PreTrainedModel, windows: Tensor, hidden: bool = False) -> Any:
    return model(input_ids=windows, use_cache=False, output_hidden_states=hidden)
