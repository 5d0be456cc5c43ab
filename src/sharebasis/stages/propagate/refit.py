"""A group's factors, fitted again to what its parts are given by now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from sharebasis.compressed.index import CompressedGroup, CompressedPart, NarrowedMlp
from sharebasis.config.fit import FitSettings
from sharebasis.config.methods import METHODS
from sharebasis.config.refine import PropagateSettings
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.linalg import neuron_pruning, optimal_brain_surgeon
from sharebasis.linalg.drift_regression import PairedMoment, regressed
from sharebasis.linalg.low_rank import decompose
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.objective import Problem
from sharebasis.model.surgery import weight_of
from sharebasis.moments.store import MomentStore

Tensors = dict[str, Tensor]
"""Factors in plain form, and dense weights, by the names that the index has for them."""


UNSEEN = 1e-10
"""Of the largest eigenvalue: directions whose inputs are smaller are not learned from."""


@dataclass(frozen=True, slots=True)
class Refitter:
    """Fits groups again, at the same rank and in the same metric of outputs."""

    original: nn.Module
    """The dense model."""
    moments: MomentStore
    """Of the gradients."""
    settings: PropagateSettings
    fit: FitSettings
    """Metric and damping of the fit before."""
    mlps: Sequence[NarrowedMlp] = ()
    """Those that lack neurons."""

    def tensors(
        self, group: CompressedGroup, pair: PairedMoment, linears: Mapping[str, ShareLinear]
    ) -> Tensors:
        """New factors of a group, or new weights of one that is stored without a basis.

        Weights that lack entries go on lacking them.

        Args:
            group: whose parts all read one input, each of them under one name.
            pair: of that input.
            linears: what its parts are now, by the names of their coefficients.

        Raises:
            CalibrationError: a moment is not usable.
        """
        targets = [self._target(part, pair) for part in group.parts]
        inputs = pair.compressed.damped(self.fit.damping_inputs)
        if group.basis is None:
            found = {}
            for part, target in zip(group.parts, targets, strict=True):
                now = linears[part.coefficient]
                if (kept := now.kept) is not None:
                    (gradients,) = self._gradients(group)
                    problem = Problem(target, inputs, gradients)
                    target = optimal_brain_surgeon.refit(problem, now.dense().detach(), kept)
                found[part.coefficient] = target
            return found
        pairs = zip(targets, self._gradients(group), strict=True)
        problems = [Problem(target.double(), inputs, gradients) for target, gradients in pairs]
        basis, stacked = decompose(problems).truncated(group.rank)
        found = {group.basis: basis}
        coefficients = stacked.split([len(part.rows) for part in group.parts])
        for part, own in zip(group.parts, coefficients, strict=True):
            found[part.coefficient] = own
        return found

    def updated(
        self,
        group: CompressedGroup,
        basis: Float[Tensor, "rank d_in"],
        coefficients: Mapping[str, Float[Tensor, "_ rank"]],
        inputs: Float64[Tensor, "d_in d_in"],
    ) -> Tensors:
        """The coefficients that are best for the basis that a group has, and that basis.

        A = W C Bᵀ (B C Bᵀ)⁻¹, for the moment C of what the group is given by now and the weight W
        as it was; in directions of B that C does not reach, A stays.

        Args:
            group: with a basis on the input side.
            basis: B.
            coefficients: A, by the names of their tensors.
            inputs: C, Σ x̂ x̂ᵀ over all sublayers of the group.

        Source: the update of Basis Sharing, arXiv:2410.03765, after SVD-LLM, arXiv:2403.07378.
        """
        assert group.basis is not None
        own = basis.double()
        seen = own @ inputs
        inverse = torch.linalg.pinv(seen @ own.T, rtol=UNSEEN, hermitian=True)
        found = {group.basis: own}
        for part in group.parts:
            before = coefficients[part.coefficient].double()
            lacking = self.target(part).double() - before @ own
            found[part.coefficient] = before + lacking @ seen.T @ inverse
        return found

    def target(self, part: CompressedPart) -> Float[Tensor, "rows d_in"]:
        """What a part should be if its inputs were those of the original."""
        return self._without_drift(part, self._weight(part))

    def bias(self, part: CompressedPart, fitted: Tensor, pair: PairedMoment) -> Tensor:
        """Of a part's rows, b + W E[x] - Ŵ E[x̂]: what is put out has the mean that it had.

        Args:
            part: of a sublayer that has a bias.
            fitted: Ŵ, its rows.
            pair: of its input.
        """
        own = self.original.get_submodule(part.sublayer).bias
        assert isinstance(own, Tensor)
        mean = self._weight(part).double() @ pair.mean
        mean = mean - fitted.double() @ pair.compressed.mean
        return self._rows(part, own) + mean

    def _target(self, part: CompressedPart, pair: PairedMoment) -> Tensor:
        own, weight = self.settings, self._weight(part)
        first = self._without_drift(part, weight)
        if pair.drift is None:
            return regressed(weight, pair, own.amount, start=first, damping=own.damping)
        drift = own.stream * part.rows.take(pair.drift)
        return regressed(weight, pair, own.stream, drift, first, own.damping)

    def _weight(self, part: CompressedPart) -> Tensor:
        """Of the original, of all its neurons if it is a down."""
        return self._rows(part, weight_of(self.original.get_submodule(part.sublayer)).detach())

    def _rows(self, part: CompressedPart, every: Tensor) -> Tensor:
        """Those of a part, of something that the original has for every output."""
        mlp = self._narrowed(part)
        return part.rows.take(every if mlp is None else every[torch.tensor(mlp.rows)])

    def _without_drift(self, part: CompressedPart, weight: Tensor) -> Tensor:
        """What the target would be if inputs were those of the original."""
        kept = self.neurons_in(part.sublayer)
        if kept is None:
            return weight
        inputs = self.moments.read(self.moments.site(part.sublayer)).to(weight.device)
        damped = inputs.damped(self.fit.damping_inputs)
        return neuron_pruning.refit(Problem(weight.double(), damped, None), kept.to(weight.device))

    def neurons_in(self, sublayer: str) -> Tensor | None:
        """The numbers of those that a sublayer reads, if there are fewer than there were."""
        kept = (mlp.kept for mlp in self.mlps if sublayer == mlp.down)
        return next(map(torch.tensor, kept), None)

    def _narrowed(self, part: CompressedPart) -> NarrowedMlp | None:
        """The MLP for whose neurons a part reads, if there are fewer than there were."""
        return next((mlp for mlp in self.mlps if part.sublayer in mlp.reads), None)

    def _gradients(self, group: CompressedGroup) -> Sequence[Moment | None]:
        metric = METHODS[self.fit.method].gradients
        if not self.fit.two_sided or metric == "none":
            return [None] * len(group.parts)
        found = [self._gradient(part) for part in group.parts]
        return [own.diagonal() for own in found] if metric == "diagonal" else found

    def _gradient(self, part: CompressedPart) -> Moment:
        whole = self.moments.gradient(part.sublayer)
        whole = whole.to(next(self.original.parameters()).device)
        damping, mlp, device = self.fit.damping_gradients, self._narrowed(part), whole.sum.device
        if mlp is None:
            return whole.at(part.rows.numbers.to(device)).damped(damping)
        block = mlp.original(part.rows)
        own = whole if block is None else whole.at(block.numbers.to(device))
        left = mlp.rows if block is None else mlp.kept
        return own.damped(damping).at(torch.tensor(left, device=device))


def install(
    group: CompressedGroup, tensors: Mapping[str, Tensor], linears: Mapping[str, ShareLinear]
) -> None:
    """Give a running model what was fitted for a group.

    Args:
        group: of its index.
        tensors: those of the group, and perhaps others.
        linears: the model's parts by the names of their coefficients.
    """
    for part in group.parts:
        linear = linears[part.coefficient]
        like = next(linear.parameters())
        own = tensors[part.coefficient].to(like)
        if group.basis is None:
            linear.weight = nn.Parameter(own, requires_grad=False)
        else:
            linear.refactor(tensors[group.basis].to(like), own)


def refittable(
    groups: Iterable[CompressedGroup], readers: Iterable[str]
) -> Sequence[CompressedGroup]:
    """Groups whose parts all read one input, each under one name, on whose side the basis is.

    Args:
        groups: of a model.
        readers: sublayers that read the input.
    """
    own = set(readers)
    return [
        group
        for group in groups
        if all(part.sublayer in own for part in group.parts)
        and len({part.coefficient for part in group.parts}) == len(group.parts)
        and group.side == "input"
    ]
