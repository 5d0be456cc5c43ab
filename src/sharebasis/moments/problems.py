"""artifacts/moments -> the problems whose losses a method measures."""

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
from sharebasis.linalg.low_rank import Spectrum, decompose
from sharebasis.linalg.moments import Moment
from sharebasis.linalg.objective import Problem
from sharebasis.moments.store import MomentStore, gradient_site

MOMENT_FLOOR = 1e-20
"""Second moment of what is always zero, as if it counted a little: inputs that are (those of an
output matrix, say, whose values are zero), and gradients of outputs that no loss depends on (those
of an expert, say, which the last token of a window alone went to)."""


class Problems:
    """Weights with the moments by which a method measures their losses."""

    def __init__(
        self,
        moments: MomentStore | None,
        tied_names: Mapping[str, tuple[str, ...]],
        settings: FitSettings,
        device: torch.device,
    ) -> None:
        """Args:
        moments: not read by plain SVD, for which they may be None.
        tied_names: of every sublayer, the names of those that use its weight, too.
        settings: method, damping, and whether gradients count.
        device: where the problems' moments are.
        """
        self._tied_names, self._settings, self._device = tied_names, settings, device
        self._metric = METHODS[settings.method]
        self._moments = None if settings.method == "svd" else moments
        self._pool = lru_cache(maxsize=1)(self._read_pool)
        self._each = lru_cache(maxsize=1)(self._read_each)

    def decompose(self, group: Group, weights: Sequence[Tensor]) -> tuple[Spectrum, bool]:
        """The factors of all ranks by the pool of what a group reads, and whether calibration has
        seen any of it; where it has not, those of plain SVD."""
        inputs = None if self._moments is None else self._inputs(group)
        if inputs is None:
            bare = [Problem(weight.double(), None, None) for weight in weights]
            return decompose(bare), self._moments is None
        counted = None if self._metric.inputs == "none" else inputs
        problems = [
            Problem(weight.double(), counted, self._gradients(part))
            for part, weight in zip(group.parts, weights, strict=True)
        ]
        return decompose(problems), True

    def of(self, group: Group, weights: Sequence[Tensor]) -> Sequence[Problem] | None:
        """The parts of a group, each with moments of its own, turned so that columns are on the
        side that the group shares; None where calibration has not seen what one of them reads."""
        inputs = self._each(tuple(self._sites(part) for part in group.parts))
        if inputs is None:
            return None
        problems = [
            Problem(weight.double(), moment, self._gradients(part))
            for part, weight, moment in zip(group.parts, weights, inputs, strict=True)
        ]
        if group.side == "output":
            return [problem.transposed() for problem in problems]
        return problems

    def of_part(self, part: Part, weight: Tensor) -> Problem | None:
        """A part by itself; None where calibration has not seen what it reads."""
        problems = self.of(Group((part,)), [weight])
        return problems[0] if problems else None

    def _read_each(
        self, sites: tuple[tuple[str, ...], ...]
    ) -> Sequence[Moment] | Sequence[None] | None:
        """The moments of some inputs, one object where there is one input."""
        if self._moments is None or self._metric.inputs == "none":
            return [None] * len(sites)
        moments = {pool: self._read_pool(pool) for pool in dict.fromkeys(sites)}
        if not all(moment.n_tokens for moment in moments.values()):
            return None
        return [moments[pool] for pool in sites]

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
        damped = nonzero_moment(moment).damped(self._settings.damping_inputs)
        return damped.diagonal(self._metric.alpha) if self._metric.inputs == "diagonal" else damped

    def _gradients(self, part: Part) -> Moment | None:
        """Of what a part puts out under all of its names, weighed by how often it runs."""
        if not self._settings.two_sided:
            return None
        assert self._moments is not None
        moments, name = self._moments, part.sublayer.name
        of_sublayer = moments.gradient(name)
        rows = of_sublayer.at(part.rows.numbers)
        moment = nonzero_moment(replace(rows, n_tokens=moments.n_tokens))
        n_seen = moments.n_seen(gradient_site(name))
        if n_seen > of_sublayer.n_tokens:  # what was left out counts as the rest does on average
            moment = replace(moment, total=moment.total * (n_seen / of_sublayer.n_tokens))
        damped = moment.to(self._device).damped(self._settings.damping_gradients)
        return damped.diagonal() if self._metric.gradients == "diagonal" else damped

    def _users(self, part: Part) -> Iterator[str]:
        return iter((part.sublayer.name, *self._tied_names[part.sublayer.name]))


def nonzero_moment(moment: Moment) -> Moment:
    """The moment itself, or MOMENT_FLOOR times the identity where it is zero."""
    if moment.total.any():
        return moment
    unit = torch.eye(len(moment.sum), dtype=torch.float64, device=moment.total.device)
    return replace(moment, total=MOMENT_FLOOR * moment.n_tokens * unit)
