"""SplitLinear: a linear sublayer as its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sharebasis.forms.form import parameter
from sharebasis.forms.share_linear import ShareLinear


class SplitLinear(nn.Module):
    """One sublayer as its parts: puts their outputs together and adds the bias."""

    parts: Sequence[ShareLinear]
    bias: nn.Parameter | None
    order: Tensor | None

    def __init__(
        self,
        parts: Sequence[ShareLinear],
        bias: Float[Tensor, " d_out"] | None = None,
        order: Int64[Tensor, " d_out"] | None = None,
    ) -> None:
        """Args:
        parts: that cover every output once.
        bias: of the whole sublayer.
        order: where each output lies among the parts' outputs; None: just there.
        """
        super().__init__()
        self.use(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)
        self.register_parameter("bias", None if bias is None else parameter(bias))
        self.register_buffer("order", order, persistent=False)

    def use(self, parts: Sequence[ShareLinear]) -> None:
        """Be made of these parts; another sublayer may be made of them, too."""
        self.parts = nn.ModuleList(parts)  # type: ignore[assignment]

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The dense weight that the parts stand for, put together at every access.

        Some models look at the weight of a sublayer that they do not call.
        """
        weights = torch.cat([part.dense() for part in self.parts])
        return weights if self.order is None else weights.index_select(0, self.order)

    @property
    def state(self) -> str:
        """The state of the parts, joined by `+` where they differ."""
        return "+".join(sorted({part.state for part in self.parts}))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        outputs = [part(x) for part in self.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if self.order is not None:
            y = y.index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, state={self.state}"
        )
