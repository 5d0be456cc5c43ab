"""Distillation: a compressed model learns to predict what the original predicts; the loop."""

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
from sharebasis.stages.recover.outcome import Evaluation, Recovery

log = logging.getLogger(__name__)

MAX_EAGER_WINDOW = 512
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
    """Train the factors to predict what the original predicts; they hold the best ones afterwards.

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
        kept: masks of some factors, by their names; other entries stay zero.

    Raises:
        RecoveryError: the loss is not finite.
    """
    training = _Training(original, compressed, factors, windows, settings, seed, kept or {})
    training.resume(checkpoint)
    with progress("recover", settings.steps, "steps", training.step) as advance:
        training.evaluate_if_due()
        while training.step < settings.steps and not training.stalled:
            training.take_step()
            advance()
            training.evaluate_if_due()
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
        if compressed.device.type == "cpu" and settings.window <= MAX_EAGER_WINDOW:
            # torch's fused attention takes over twice as long as plain products in bfloat16 there.
            for model in (original, compressed):
                model.set_attn_implementation("eager")
        windows = windows.to(compressed.device)
        self._windows, self._held_out = windows.split([settings.windows, settings.held_out])
        self._factors = factors
        self._best = {name: factor.detach().clone() for name, factor in factors.items()}
        masks = {factors[name]: mask for name, mask in kept.items()}
        self._optimizer = Muon(list(factors.values()), masks)
        self._evaluations: list[Evaluation] = []
        self.step = 0

    @property
    def stalled(self) -> bool:
        """Whether none of the last `patience` evaluations was better than those before."""
        recent = self._evaluations[-self._settings.patience :]
        return len(self._evaluations) > len(recent) and self._best_evaluation not in recent

    @property
    def _best_evaluation(self) -> Evaluation:
        return min(self._evaluations, key=lambda evaluation: evaluation.divergence)

    def take_step(self) -> None:
        loss = self._loss(self._batch())
        if not loss.isfinite():
            raise RecoveryError(
                f"The loss of step {self.step + 1} is {loss.item()}. Lower "
                f"recover.learning_rate ({self._settings.learning_rate}), or set "
                "recover.dtype=float32."
            )
        loss.backward()
        rate = learning_rate(self.step, self._settings, self._evaluations[0].divergence)
        self._optimizer.step(self.step, rate)
        self.step += 1

    def _batch(self) -> Tensor:
        """The windows of a step: in every epoch in another order, and in every other epoch
        from half a window on, so that tokens come after others than in the epoch before."""
        (n, length), size = self._windows.shape, self._settings.batch
        text, starts = self._windows.flatten(), []
        for i in range(self.step * size, (self.step + 1) * size):
            epoch, place = divmod(i, n)
            generator = torch.Generator().manual_seed(self._seed + epoch)
            first = int(torch.randperm(n, generator=generator)[place]) * length
            starts.append(min(first + epoch % 2 * (length // 2), len(text) - length))
        return torch.stack([text[start : start + length] for start in starts])

    def _loss(self, windows: Tensor) -> Tensor:
        hidden = self._settings.hidden
        with torch.no_grad(), self._arithmetic():
            of_original = _run(self._original, windows, hidden > 0)
        with self._arithmetic():
            of_compressed = _run(self._compressed, windows, hidden > 0)
        loss = divergence(of_original.logits, of_compressed.logits)
        if hidden:
            loss = loss + hidden * hidden_distance(
                of_original.hidden_states, of_compressed.hidden_states
            )
        return loss

    def _arithmetic(self) -> AbstractContextManager[None]:
        dtype = DTYPES[self._settings.dtype]
        return torch.autocast(self._compressed.device.type, dtype, enabled=dtype != torch.float32)

    def evaluate_if_due(self) -> None:
        """Evaluate on the held-out windows, unless this step was evaluated before a kill."""
        settings = self._settings
        due = self.step % settings.look_every == 0 or self.step == settings.steps
        if not due or any(evaluation.step == self.step for evaluation in self._evaluations):
            return
        with torch.no_grad(), self._arithmetic():
            divergences = [
                divergence(
                    _run(self._original, chunk).logits, _run(self._compressed, chunk).logits
                ).item()
                * len(chunk)
                for chunk in self._held_out.split(settings.batch)
            ]
        evaluation = Evaluation(self.step, sum(divergences) / len(self._held_out))
        loss = evaluation.divergence
        log.info("recover: step %d, held-out divergence %.4f nats", self.step, loss)
        self._evaluations.append(evaluation)
        if self._best_evaluation is evaluation:
            for name, factor in self._factors.items():
                self._best[name].copy_(factor.detach())

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, factor in self._factors.items():
                factor.copy_(self._best[name])
                factor.grad = None  # of those whose turn did not come again

    def result(self) -> Recovery:
        tokens = self.step * self._settings.batch * self._windows.shape[1]
        return Recovery(self.step, self._best_evaluation.step, tokens, tuple(self._evaluations))

    def state(self) -> tuple[Mapping[str, Any], Iterator[tuple[str, Tensor]]]:
        """For a checkpoint."""
        record = {
            "step": self.step,
            "looks": [asdict(evaluation) for evaluation in self._evaluations],
        }
        return record, self._tensors()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, factor in self._factors.items():
            yield f"{name}.factor", factor.detach()
            yield f"{name}.best", self._best[name]
            yield f"{name}.momentum", self._optimizer.momentum(factor)
            if factor.grad is not None:  # none is not zero: without one, Muon leaves a matrix alone
                yield f"{name}.gradient", factor.grad

    def resume(self, checkpoint: Checkpoint) -> None:
        if (saved := checkpoint.resume()) is None:
            return
        record, reader = saved
        self.step = record["step"]
        self._evaluations = [Evaluation(**evaluation) for evaluation in record["looks"]]
        for name, factor in self._factors.items():
            factor.data.copy_(reader.read(f"{name}.factor"))
            self._best[name].copy_(reader.read(f"{name}.best"))
            self._optimizer.restore(factor, reader.read(f"{name}.momentum"))
            if f"{name}.gradient" in reader.files:
                factor.grad = reader.read(f"{name}.gradient").to(factor.device)
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
