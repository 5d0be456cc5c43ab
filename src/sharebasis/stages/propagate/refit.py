"""The problems whose solutions are new weights of a compressed model, for its present inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sharebasis.compressed.edits import Edit, first_answer
from sharebasis.compressed.index import StoredGroup, StoredPart
from sharebasis.config.fit import FitSettings
from sharebasis.config.methods import METHODS
from sharebasis.config.refine import PropagateSettings
from sharebasis.linalg import neuron_pruning
from sharebasis.linalg.drift_regression import PairedMoment, regressed
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.objective import Problem
from sharebasis.model.surgery import weight_of
from sharebasis.moments.store import MomentStore


@dataclass(frozen=True, slots=True)
class Refitter:
    """Says what weights to fit, in the same metric of outputs as before; forms do it."""

    original: nn.Module
    """The dense model."""
    moments: MomentStore
    """Of the gradients."""
    settings: PropagateSettings
    fit: FitSettings
    """Metric and damping of the fit before."""
    edits: Sequence[Edit] = ()
    """Of the compressed model."""

    def problems(self, group: StoredGroup, inputs: PairedMoment) -> Sequence[Problem]:
        """The targets of a group's parts, which make up for the drift of their inputs.

        Args:
            group: whose parts all read one input, each of them under one name.
            inputs: of that input.

        Raises:
            CalibrationError: a moment is not usable.
        """
        moment = inputs.compressed.damped(self.fit.damping_inputs)
        return [
            Problem(self._regressed(part, inputs), moment, self._gradients(part))
            for part in group.parts
        ]

    def undrifted(self, group: StoredGroup, inputs: Moment) -> Sequence[Problem]:
        """The targets of a group's parts as they were, for inputs that are others.

        Args:
            group: likewise.
            inputs: of all its sublayers.
        """
        return [Problem(self.target(part).double(), inputs, None) for part in group.parts]

    def target(self, part: StoredPart) -> Float[Tensor, "rows d_in"]:
        """What a part should be if its inputs were those of the original."""
        return self._without_drift(part, self._weight(part))

    def bias(self, part: StoredPart, fitted: Tensor, inputs: PairedMoment) -> Tensor:
        """Of a part's rows, b + W E[x] - Ŵ E[x̂]: what is put out has the mean that it had.

        Args:
            part: of a sublayer that has a bias.
            fitted: Ŵ, its rows.
            inputs: of its sublayer.
        """
        bias = self.original.get_submodule(part.sublayer).bias
        assert isinstance(bias, Tensor)
        mean = self._weight(part).double() @ inputs.mean
        mean = mean - fitted.double() @ inputs.compressed.mean
        return self._rows(part, bias) + mean

    def kept_columns(self, sublayer: str) -> Int64[Tensor, " columns"] | None:
        """The numbers of the inputs that a sublayer reads, where neurons were pruned."""
        return first_answer(self.edits, lambda edit: edit.kept_columns(sublayer))

    def _regressed(self, part: StoredPart, inputs: PairedMoment) -> Tensor:
        settings, weight = self.settings, self._weight(part)
        start, damping = self._without_drift(part, weight), settings.damping
        if inputs.drift is None:
            return regressed(weight, inputs, settings.amount, start=start, damping=damping)
        drift = settings.stream * part.rows.take(inputs.drift)
        return regressed(weight, inputs, settings.stream, drift, start, damping)

    def _weight(self, part: StoredPart) -> Tensor:
        """Of the original, with all its columns."""
        return self._rows(part, weight_of(self.original.get_submodule(part.sublayer)).detach())

    def _rows(self, part: StoredPart, tensor: Tensor) -> Tensor:
        """Those of a part, of something that the original has for every output."""
        kept = self._kept_rows(part)
        return part.rows.take(tensor if kept is None else tensor[kept])

    def _without_drift(self, part: StoredPart, weight: Tensor) -> Tensor:
        """What the target would be if inputs were those of the original."""
        kept = self.kept_columns(part.sublayer)
        if kept is None:
            return weight
        inputs = self.moments.read(self.moments.site(part.sublayer)).to(weight.device)
        problem = Problem(weight.double(), inputs.damped(self.fit.damping_inputs), None)
        return neuron_pruning.refit(problem, kept.to(weight.device))

    def _kept_rows(self, part: StoredPart) -> Int64[Tensor, " rows"] | None:
        return first_answer(self.edits, lambda edit: edit.kept_rows(part.sublayer))

    def _gradients(self, part: StoredPart) -> Moment | None:
        metric = METHODS[self.fit.method].gradients
        if not self.fit.two_sided or metric == "none":
            return None
        gradient = self._gradient(part)
        return gradient.diagonal() if metric == "diagonal" else gradient

    def _gradient(self, part: StoredPart) -> Moment:
        gradient = self.moments.gradient(part.sublayer)
        gradient = gradient.to(next(self.original.parameters()).device)
        damping, device = self.fit.damping_gradients, gradient.sum.device
        kept = self._kept_rows(part)
        if kept is None:
            return gradient.at(part.rows.numbers.to(device)).damped(damping)
        block = first_answer(self.edits, lambda edit: edit.original_block(part))
        if block is None:
            return gradient.damped(damping).at(kept.to(device))
        within = torch.searchsorted(block.numbers, kept[part.rows.numbers])
        return gradient.at(block.numbers.to(device)).damped(damping).at(within.to(device))


def refittable(groups: Iterable[StoredGroup], readers: Iterable[str]) -> Sequence[StoredGroup]:
    """Groups whose parts all read one input, each under one name, on whose side the basis is.

    Args:
        groups: of a model.
        readers: sublayers that read the input.
    """
    names = set(readers)
    return [
        group
        for group in groups
        if group.side == "input"
        and all(len(part.sublayers) == 1 and part.sublayer in names for part in group.parts)
    ]
