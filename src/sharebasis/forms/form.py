"""What a form is: how the weights of a group are stored, multiplied, refitted and trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from sharebasis.config.types import Side
from sharebasis.linalg.objective import Problem


@dataclass(frozen=True, slots=True)
class RoleTensors:
    """The tensors of a form by their roles, which are also the last parts of their names."""

    shared: Mapping[str, Tensor]
    """What all parts use: a basis, say."""
    parts: tuple[Mapping[str, Tensor], ...]
    """What each part has for itself."""
    side: Side = "input"
    """Where a basis lies: input, W_i = A_i B; output, W_i = B A_i."""


class FormModule(nn.Module, ABC):
    """The product of one part with its inputs, x -> x Wᵀ."""

    kind: ClassVar[str]
    """Of the form."""
    rank: int | None = None
    """Of the weight, where it is a product of factors."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """W."""


class Form(ABC):
    """The weights of the parts of a group, in one way to store them. Frozen.

    A form is *editable* if its numbers can be refitted or trained one by one. One that is not is
    turned into an editable one (`editable`), and what became of that back into it (`of`).
    """

    kind: ClassVar[str]
    """Its name in `sharebasis.json`."""

    keeps_weights: ClassVar[bool] = False
    """Whether weights that nothing else has changed are the original's in this form."""

    @property
    def rank(self) -> int | None:
        """Of the stacked weights, where they are a product of factors."""
        return None

    @classmethod
    @abstractmethod
    def load(cls, tensors: RoleTensors, shapes: Sequence[tuple[int, int]]) -> Form:
        """A form, of what was stored.

        Args:
            tensors: as `tensors` gave them; those of floating point may be Parameters, which the
                modules then use as they are.
            shapes: (d_out, d_in) of each part.
        """

    @abstractmethod
    def tensors(self) -> RoleTensors:
        """What is stored; integers in the dtype that files hold."""

    @abstractmethod
    def modules(self) -> Sequence[FormModule]:
        """A module for each part; what they share is one Parameter."""

    def dense(self) -> Sequence[Float[Tensor, "d_out d_in"]]:
        """The weight of each part."""
        return [module.dense() for module in self.modules()]

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor]) -> Form:
        """The same form of other numbers.

        Args:
            function: applied to every tensor of floating point.
        """

    @classmethod
    def n_in_memory(cls, shapes: Sequence[tuple[int, int]]) -> int | None:
        """Numbers that a loaded form holds for parts of some shapes; None: those that it stores."""
        return None

    def editable(self) -> Form:
        """The same weights, to be refitted or trained."""
        return self

    @classmethod
    def of(cls, edited: Form) -> Form:
        """What became of an `editable()`, in this form."""
        return edited

    def change_inputs(self, part: int, change: Callable[[Tensor], Tensor]) -> Form:
        """With the inputs of one part in another basis.

        Args:
            part: which one.
            change: (n, d_in) -> (n, d_in), the factor of W that sees the inputs.
        """
        raise NotImplementedError(f"A form of the kind {self.kind} stays in the basis it is in.")

    @abstractmethod
    def refit(self, problems: Sequence[Problem]) -> Form:
        """Weights of least loss in this form, at the same rank; of an editable one.

        Args:
            problems: the target of each part, and the moments in which its error counts.
        """

    def update(self, problems: Sequence[Problem]) -> Form | None:
        """The form with coefficients of least loss, where what the parts share stays.

        Returns:
            None where there are no such coefficients.
        """
        return None

    @abstractmethod
    def trainable(self, edited: bool) -> Form | None:
        """The same weights in float32, as Parameters; None if there is nothing to train.

        Args:
            edited: whether an edit has made another weight of the original one.
        """

    def parameters(self) -> RoleTensors:
        """What `trainable` made, of a form that it returned."""
        return self.tensors()

    @property
    def support(self) -> Bool[Tensor, "d_out d_in"] | None:
        """The mask of a Parameter, outside which it stays zero; None: it has none."""
        return None


def parameter(tensor: Tensor) -> nn.Parameter:
    """A Parameter that is not trained, or the one that the tensor is."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def trained(tensor: Tensor) -> nn.Parameter:
    """A Parameter of its own in float32, to be trained."""
    return nn.Parameter(tensor.detach().float().contiguous())
