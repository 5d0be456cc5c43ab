"""ShareLinear: a part of a linear sublayer on its way from dense to compressed."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from jaxtyping import Float
from torch import Tensor, nn

from sharebasis.errors import StateError
from sharebasis.forms.dense import DenseModule
from sharebasis.forms.form import FormModule
from sharebasis.runtime import matmul

Tracker = Callable[[Tensor], None]


class State(StrEnum):
    """What a ShareLinear holds and does."""

    ORIGINAL = "original"
    """The original weight."""
    CALIBRATING = "calibrating"
    """The original weight; every input goes to a tracker."""
    COMPRESSED = "compressed"
    """A form that was made of it; the original weight is released."""


class ShareLinear(nn.Module):
    """One part of a linear sublayer: x -> x Wᵀ, in whatever form W is.

    The weight is a view of the original one as long as there is one.

        ORIGINAL --> CALIBRATING
            |            |
            +------------+--> COMPRESSED
    """

    def __init__(self, weight: Float[Tensor, "d_out d_in"]) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.form: FormModule = DenseModule(weight)
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
        if self._state is not State.ORIGINAL:
            raise StateError(f"{self!r} cannot be calibrated: that needs state {State.ORIGINAL}.")
        self._state = State.CALIBRATING
        self._tracker, self._gradient_tracker = tracker, gradient_tracker

    def compress(self, form: FormModule) -> None:
        """Hold a form of the weight in the place of what is held now, which is released.

        Args:
            form: of the shape of the weight; a compressed part takes another one, too.

        Raises:
            StateError: the shapes differ.
        """
        if form.shape != (self.out_features, self.in_features):
            raise StateError(f"{self!r} cannot hold a form of a weight of shape {form.shape}.")
        self._state, self.form = State.COMPRESSED, form
        self._tracker = self._gradient_tracker = None

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """The weight: the original one, or what the form stands for."""
        return self.form.dense()

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if self._tracker is None:
            y: Tensor = self.form(x)
            return y
        self._tracker(x)
        if self._gradient_tracker is not None and x.requires_grad:
            return matmul.observed_linear(x, self.dense(), self._gradient_tracker)
        return matmul.linear(x, self.dense())

    def __repr__(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        rank = "" if self.form.rank is None else f", rank={self.form.rank}"
        return f"ShareLinear({sizes}, form={self.form.kind}{rank}, state={self._state})"
