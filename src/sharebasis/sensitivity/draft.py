"""What `fit` would make of the spectra, put into the original model for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.allocation import DENSE
from sharebasis.decomposition import Spectra
from sharebasis.fitting import choose_ranks
from sharebasis.grouping import Group
from sharebasis.rows import Rows
from sharebasis.settings import FitSettings
from sharebasis.share_linear import ShareLinear
from sharebasis.splitting import Part
from sharebasis.surgery import wrap

Linears = Mapping[tuple[str, str], ShareLinear]
"""(Sublayer, label of the part) -> the part in a wrapped model."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A rank for every given group, and what that is predicted to lose."""

    spectra: Spectra
    ranks: Sequence[int]
    losses: Sequence[float]
    """Quadratic, of each group."""

    @property
    def groups(self) -> Sequence[Group]:
        """Those that are given; of structures that may take their place there are no drafts."""
        return self.spectra.groups[: self.spectra.n_given]

    def factors(self, i: int) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """Coefficient (d_out, rank) and basis (rank, d_in) of a group's parts; none if dense."""
        if self.ranks[i] == DENSE:
            return
        parts = self.spectra.groups[i].parts
        basis, stacked = (one.float() for one in self.spectra.factors(i, self.ranks[i]))
        for part, own in zip(parts, stacked.split([part.shape[0] for part in parts]), strict=True):
            yield part, own, basis


def draft(spectra: Spectra, settings: FitSettings) -> Draft:
    """Allocate with every weight 1.

    Raises:
        BudgetError, SelectionError: as `fit` does.
    """
    energies = spectra.energies()[: spectra.n_given]
    ranks = choose_ranks(spectra, energies, settings)
    pairs = zip(ranks, energies, strict=True)
    losses = [0.0 if rank == DENSE else float(own[rank:].sum()) for rank, own in pairs]
    return Draft(spectra, ranks, losses)


def wrap_parts(model: PreTrainedModel, spectra: Spectra) -> Linears:
    """Make every part a module, under all the names of its sublayer; the model is changed."""
    rows: dict[str, dict[str, Rows]] = {}
    for group in spectra.groups[: spectra.n_given]:
        for part in group.parts:
            for name in (part.sublayer.name, *spectra.twins[part.sublayer.name]):
                rows.setdefault(name, {})[part.label] = part.rows
    ordered = {
        name: dict(sorted(own.items(), key=lambda one: one[1].start)) for name, own in rows.items()
    }
    modules = wrap(model, {name: list(own.values()) for name, own in ordered.items()})
    return {
        (name, label): linear
        for name, own in ordered.items()
        for label, linear in zip(own, modules[name].parts, strict=True)
    }


@contextmanager
def compressed(linears: Linears, plan: Draft, groups: Iterable[int]) -> Iterator[None]:
    """Give some groups the weights of a draft for a while, and then their own back."""
    kept: dict[ShareLinear, nn.Parameter] = {}  # a module may have several names
    try:
        for i in groups:
            for part, coefficient, basis in plan.factors(i):
                for name in (part.sublayer.name, *plan.spectra.twins[part.sublayer.name]):
                    linear = linears[name, part.label]
                    assert linear.weight is not None
                    own = kept.setdefault(linear, linear.weight)
                    product = coefficient.to(own.device) @ basis.to(own.device)
                    linear.weight = nn.Parameter(product.to(own.dtype), requires_grad=False)
        yield
    finally:
        for linear, weight in kept.items():
            linear.weight = weight
