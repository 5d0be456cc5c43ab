"""artifacts/moments -> the metric in which a method measures what a group loses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, reduce
from operator import add

import torch
from torch import Tensor

from sharebasis.architecture.groups import Group
from sharebasis.architecture.parts import Part
from sharebasis.config.fit import FitSettings
from sharebasis.config.methods import METHODS
from sharebasis.linalg.factorize import Decomposition, decompose_reads
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.shared_basis import Member
from sharebasis.moments.store import MomentStore, gradient_site

NOTHING = 1e-20
"""Second moment of what is always zero, as if it counted a little: inputs that are (those of an
output matrix, say, whose values are zero), and gradients of outputs that no loss depends on (those
of an expert, say, which the last token of a window alone went to)."""


class Metric:
    """The moments in which a group's loss is measured."""

    def __init__(
        self,
        moments: MomentStore | None,
        twins: Mapping[str, tuple[str, ...]],
        settings: FitSettings,
        device: torch.device,
    ) -> None:
        self._twins, self._settings, self._device = twins, settings, device
        self._own = METHODS[settings.method]
        self._moments = None if settings.method == "svd" else moments
        self._pool = lru_cache(maxsize=1)(self._read_pool)
        self._each = lru_cache(maxsize=1)(self._read_each)

    def decompose(self, group: Group, originals: Sequence[Tensor]) -> tuple[Decomposition, bool]:
        """The factors, and whether calibration has seen what the group reads."""
        if self._moments is None:
            return decompose_reads(originals, None), True
        inputs, gradients = self._inputs(group), None
        if inputs is None:
            return decompose_reads(originals, None), False
        if self._settings.two_sided:
            gradients = [self._gradient(part) for part in group.parts]
        counted = None if self._own.inputs == "none" else inputs
        return decompose_reads(originals, counted, gradients), True

    def members(self, group: Group, originals: Sequence[Tensor]) -> Sequence[Member] | None:
        """The parts of a group, each with moments of its own; None where calibration has not seen
        what one of them reads."""
        inputs = self._each(tuple(self._sites(part) for part in group.parts))
        if inputs is None:
            return None
        found = []
        for part, weight, read in zip(group.parts, originals, inputs, strict=True):
            put_out = self._gradient(part) if self._settings.two_sided else None
            if group.side == "output":
                found.append(Member(weight.double().T, put_out, read))
            else:
                found.append(Member(weight.double(), read, put_out))
        return found

    def _read_each(
        self, sites: tuple[tuple[str, ...], ...]
    ) -> Sequence[Moment] | Sequence[None] | None:
        """The moments of some inputs, one object where there is one input."""
        if self._moments is None or self._own.inputs == "none":
            return [None] * len(sites)
        read = {own: self._read_pool(own) for own in dict.fromkeys(sites)}
        if not all(moment.n_tokens for moment in read.values()):
            return None
        return [read[own] for own in sites]

    def _sites(self, part: Part) -> tuple[str, ...]:
        """Of all inputs that a part reads, under whatever name."""
        if self._moments is None:
            return ()
        return tuple(dict.fromkeys(map(self._moments.site, self._users(part))))

    def _inputs(self, group: Group) -> Moment | None:
        """Of all that a group reads; None where there was nothing."""
        assert self._moments is not None
        site = self._moments.site
        names = (name for part in group.parts for name in self._users(part))
        moment = self._pool(tuple(dict.fromkeys(map(site, names))))
        return moment if moment.n_tokens else None  # experts that no token went to

    def _read_pool(self, sites: tuple[str, ...]) -> Moment:
        assert self._moments is not None
        moment = reduce(add, map(self._moments.read, sites)).to(self._device)
        if not moment.n_tokens:
            return moment
        damped = _something(moment).damped(self._settings.damping_inputs)
        return damped.diagonal(self._own.alpha) if self._own.inputs == "diagonal" else damped

    def _gradient(self, part: Part) -> Moment:
        """Of what a part puts out under all of its names, weighed by how often it runs."""
        assert self._moments is not None
        moments, name = self._moments, part.sublayer.name
        whole = moments.gradient(name)
        own = _something(replace(whole.at(part.rows.numbers), n_tokens=moments.n_tokens))
        seen = moments.n_seen(gradient_site(name))
        if seen > whole.n_tokens:  # what was left out counts as the rest does on average
            own = replace(own, total=own.total * (seen / whole.n_tokens))
        damped = own.to(self._device).damped(self._settings.damping_gradients)
        return damped.diagonal() if self._own.gradients == "diagonal" else damped

    def _users(self, part: Part) -> Iterator[str]:
        return iter((part.sublayer.name, *self._twins[part.sublayer.name]))


def _something(moment: Moment) -> Moment:
    """A moment of what is not always zero."""
    if moment.total.any():
        return moment
    unit = torch.eye(len(moment.sum), dtype=torch.float64, device=moment.total.device)
    return replace(moment, total=NOTHING * moment.n_tokens * unit)


def member_of(
    part: Part, original: Tensor, metric: Metric
) -> tuple[Tensor, Moment, Moment | None] | None:
    """A weight, the moment of what it reads and that of its gradients; None where calibration has
    not seen what it reads."""
    members = metric.members(Group((part,)), [original])
    if members is None:
        return None
    (member,) = members
    assert member.shared is not None  # sparse weights are offered to methods that look at inputs
    return member.weight, member.shared, member.own
