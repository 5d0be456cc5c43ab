"""ShareLinear and SplitLinear: a linear sublayer on its way from dense to shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

import torch
from jaxtyping import Bool, Float, Int, Int16, Int64
from torch import Tensor, nn
from torch.nn import functional

from sharebasis.config.types import Side
from sharebasis.errors import StateError
from sharebasis.forms.mask import unpack, whole
from sharebasis.runtime import matmul

Tracker = Callable[[Tensor], None]


class State(StrEnum):
    """What a ShareLinear holds and does."""

    ORIGINAL = "original"
    """The original weight."""
    CALIBRATING = "calibrating"
    """The original weight; every input goes to a tracker."""
    COMPRESSED = "compressed"
    """A coefficient after a basis, or before it, or a weight that lacks entries; the original
    weight is released."""


class ShareLinear(nn.Module):
    """One part of a linear sublayer: y = x Wᵀ, or, once compressed, y = (x Bᵀ) Aᵀ if the basis is
    on the input side and y = (x Aᵀ) Bᵀ if it is on the output side.

    The weight is a view of the original one as long as there is one; a basis is one
    Parameter that every part of a group registers, so it exists once in memory.

        ORIGINAL <-> CALIBRATING
            |            |
            +------------+--> COMPRESSED
    """

    weight: nn.Parameter | None
    basis: nn.Parameter | None
    coefficient: nn.Parameter | None
    order: Tensor | None
    """Interpolative form: where each output lies, pivots before the others."""
    mask: Tensor | None
    """Of a weight that lacks entries: which ones it has, as of `mask.pack`."""

    def __init__(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", _frozen(weight))
        self.register_parameter("basis", None)
        self.register_parameter("coefficient", None)
        self.register_buffer("order", None, persistent=False)
        self.register_buffer("mask", None, persistent=False)
        self._own = slice(0, 0)
        self._side: Side = "input"
        self._state = State.ORIGINAL
        self._tracker: Tracker | None = None
        self._gradient_tracker: Tracker | None = None

    @property
    def state(self) -> State:
        return self._state

    def calibrate(self, tracker: Tracker, gradient_tracker: Tracker | None = None) -> None:
        """Send every input to `tracker` from now on.

        Args:
            tracker: is given every input.
            gradient_tracker: is given the gradient of every output, in a backward pass.

        Raises:
            StateError: not in state ORIGINAL.
        """
        self._leave(State.ORIGINAL, to=State.CALIBRATING)
        self._tracker, self._gradient_tracker = tracker, gradient_tracker

    def stop_calibrating(self) -> None:
        """Go back to ORIGINAL.

        Raises:
            StateError: not in state CALIBRATING.
        """
        self._leave(State.CALIBRATING, to=State.ORIGINAL)
        self._tracker = self._gradient_tracker = None

    def compress(
        self,
        basis: Float[Tensor, "_ _"] | nn.Parameter,
        coefficient: Float[Tensor, "_ _"] | nn.Parameter,
        pivots: Int[Tensor, " n"] | None = None,
        first: int = 0,
        side: Side = "input",
    ) -> None:
        """Replace the weight by `coefficient @ basis`, or `basis @ coefficient`, and release it.

        In interpolative form (`sharebasis.linalg.interpolative`) some rows of the weight are rows
        of the factor that sees the inputs, and the other factor is of the other rows only.

        Args:
            basis: pass the same Parameter to every part that shares it. (rank, d_in), or, on
                the output side, (d_out, rank), or (d_out - n, rank) with `pivots`.
            coefficient: of this part, (d_out, rank), or (d_out - n, rank) with `pivots`; on the
                output side (rank, d_in). Likewise the same for sublayers that share their weight.
            pivots: rows of the weight that are rows `first`, `first` + 1, ... of the factor that
                sees the inputs.
            first: see `pivots`.
            side: where the basis lies.

        Raises:
            StateError: already compressed, or the shapes do not fit the weight.
        """
        rank = (basis if side == "input" else coefficient).shape[0]
        n_pivots = 0 if pivots is None else len(pivots)
        shapes = [(rank, self.in_features), (self.out_features - n_pivots, rank)]
        wanted = shapes if side == "input" else shapes[::-1]
        given = tuple(basis.shape), tuple(coefficient.shape)
        if given != tuple(wanted):
            raise StateError(
                f"A weight of shape ({self.out_features}, {self.in_features}) needs basis and "
                f"coefficient of shapes {wanted[0]} and {wanted[1]}, not {given[0]} and {given[1]}."
            )
        self._leave(State.ORIGINAL, State.CALIBRATING, to=State.COMPRESSED)
        self.weight = self._tracker = self._gradient_tracker = None
        self.basis, self.coefficient, self._side = _frozen(basis), _frozen(coefficient), side
        if pivots is not None:
            self._own = slice(first, first + n_pivots)
            self.order = _order(pivots.long(), self.out_features)

    def leave_out(self, values: Float[Tensor, " n_kept"], mask: Int16[Tensor, " _"]) -> None:
        """Replace the weight by one that lacks entries, and release it.

        In memory, and in products, there are zeros in their place.

        Args:
            values: of the entries that there are, row by row.
            mask: which ones those are, as of `mask.pack`.

        Raises:
            StateError: already compressed, or there are not as many values.
        """
        kept = unpack(mask, (self.out_features, self.in_features))
        if len(values) != kept.sum():
            raise StateError(
                f"A mask of {kept.sum()} entries does not go with {len(values)} values."
            )
        self._leave(State.ORIGINAL, State.CALIBRATING, to=State.COMPRESSED)
        self._tracker = self._gradient_tracker = None
        self.weight, self.mask = _frozen(whole(values.detach(), kept)), mask

    @property
    def kept(self) -> Bool[Tensor, "d_out d_in"] | None:
        """Which entries a weight has that lacks others."""
        if self.mask is None:
            return None
        return unpack(self.mask, (self.out_features, self.in_features))

    def factors(self) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
        """The two factors in plain form, that which sees the inputs first: basis and coefficient,
        or, with a basis on the output side, coefficient and basis.

        Raises:
            StateError: not in state COMPRESSED.
        """
        if (found := self._factors) is None:
            raise StateError(f"ShareLinear({self.extra_repr()}) has no factors.")
        inner, outer = found
        if self.order is None:
            return inner, outer
        unit = torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        rows = torch.cat([unit[self._own], outer])
        return inner, rows.index_select(0, self.order)

    def refactor(self, basis: Float[Tensor, "_ _"], coefficient: Float[Tensor, "_ _"]) -> None:
        """Take other factors on the same side, in plain form.

        Raises:
            StateError: it has no factors.
        """
        self.factors()
        self.basis, self.coefficient, self.order = _frozen(basis), _frozen(coefficient), None

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The weight: the original one, or what the factors stand for."""
        if (found := self._factors) is None:
            assert self.weight is not None
            return self.weight
        inner, outer = found
        rows = outer @ inner
        if self.order is None:
            return rows
        return torch.cat([inner[self._own], rows]).index_select(0, self.order)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if (found := self._factors) is not None:
            inner, outer = found
            z = matmul.linear(x, inner)
            y = matmul.linear(z, outer)
            if self.order is None:
                return y
            return torch.cat([z[..., self._own], y], dim=-1).index_select(-1, self.order)
        assert self.weight is not None
        if self._tracker is not None:
            self._tracker(x)
            if self._gradient_tracker is not None and x.requires_grad:
                return matmul.observed_linear(x, self.weight, self._gradient_tracker)
            return matmul.linear(x, self.weight)
        return functional.linear(x, self.weight)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        rank = "" if (found := self._factors) is None else f", rank={len(found[0])}"
        return f"{shape}{rank}, state={self._state}"

    @property
    def _factors(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """The one that sees the inputs, and the other."""
        if self.basis is None or self.coefficient is None:
            return None
        if self._side == "input":
            return self.basis, self.coefficient
        return self.coefficient, self.basis

    def _leave(self, *allowed: State, to: State) -> None:
        if self._state not in allowed:
            raise StateError(
                f"ShareLinear({self.extra_repr()}) cannot become {to}: that needs state "
                f"{' or '.join(allowed)}."
            )
        self._state = to


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
        self.register_parameter("bias", None if bias is None else _frozen(bias))
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


def _order(pivots: Tensor, d_out: int) -> Tensor:
    """Where each row lies when the pivots come first and the others follow in their order."""
    others = torch.ones(d_out, dtype=torch.bool, device=pivots.device)
    others[pivots] = False
    return torch.cat([pivots, others.nonzero().flatten()]).argsort()


def _frozen(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)
