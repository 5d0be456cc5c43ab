"""What propagation has made of a compressed model so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharebasis.compressed.index import CompressedIndex, StoredGroup
from sharebasis.compressed.loader import LoadedModel
from sharebasis.forms.form import Form


@dataclass(frozen=True)
class Refitted:
    """New forms of groups, and biases, in float32 on the CPU."""

    forms: dict[str, Form] = field(default_factory=dict)
    """Editable ones, by the names of groups."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """By the names of their tensors."""

    def add(self, model: LoadedModel, group: StoredGroup, form: Form) -> None:
        """Keep a new form of a group, and let the model run it."""
        self.forms[group.name] = form.map(_float32)
        self._install(model, group)

    def named(self, index: CompressedIndex) -> Iterator[tuple[str, Tensor]]:
        """All tensors, for a checkpoint."""
        for group in index.groups:
            if group.name in self.forms:
                yield from group.named(self.forms[group.name].tensors())
        yield from self.biases.items()

    @classmethod
    def resumed(cls, model: LoadedModel, tensors: Mapping[str, Tensor]) -> Refitted:
        """What `named` gave, which the model runs again."""
        refitted = cls()
        for group in model.index.groups:
            if tensors.keys() & set(group.tensor_names):
                kind = type(model.stored(group).editable())
                refitted.forms[group.name] = group.load(tensors, model.shapes(group), kind)
                refitted._install(model, group)
        for name in tensors.keys() - model.index.group_tensors:
            refitted.biases[name] = tensors[name]
            with torch.no_grad():
                model.model.get_parameter(name).copy_(tensors[name])
        return refitted

    def _install(self, model: LoadedModel, group: StoredGroup) -> None:
        like = next(model.linears(group)[0].parameters())
        model.install(group, self.forms[group.name].map(lambda tensor: tensor.to(like)))


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
