"""From the stream behind the last norm to logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from sharebasis.runtime import matmul


@dataclass(frozen=True, slots=True)
class Unembedding:
    """From the last norm's output to logits: cap(multiplier · (x W_U + b_U))."""

    w_u: Float[Tensor, "d_model d_vocab"]
    b_u: Float[Tensor, " d_vocab"] | None
    multiplier: float
    cap: float | None
    """Gemma's: logits are cap · tanh(logits / cap)."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Unembedding:
        module: Any = model.get_output_embeddings()
        config = model.config.get_text_config(decoder=True)
        divisor = getattr(config, "logits_scaling", None) or 1.0
        bias = getattr(module, "bias", None)
        return cls(
            module.weight.detach().T,
            None if bias is None else bias.detach(),
            (getattr(config, "logit_scale", None) or 1.0) / divisor,
            getattr(config, "final_logit_softcapping", None),
        )

    def directions(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """Of the stream after the last norm, along which a token's logit is measured."""
        return self.w_u.T[tokens] * self.multiplier

    def bias(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        if self.b_u is None:
            return torch.zeros_like(tokens, dtype=self.w_u.dtype)
        return self.b_u[tokens] * self.multiplier

    def before_cap(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits that are linear in the last norm's output."""
        logits = matmul.linear(x, self.w_u.T)
        return (logits if self.b_u is None else logits + self.b_u) * self.multiplier

    def logits(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return self.capped(self.before_cap(x))

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
