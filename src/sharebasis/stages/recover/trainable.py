"""The weights of a compressed model as parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from sharebasis.compressed.index import StoredGroup
from sharebasis.compressed.loader import LoadedModel
from sharebasis.errors import RecoveryError
from sharebasis.forms.form import Form

Trainable = Mapping[str, Form]
"""By the names of groups: forms of Parameters in float32."""


def trainable(model: LoadedModel) -> Trainable:
    """Make parameters of the weights of a compressed model that are not the original's any more.

    Args:
        model: compressed, which runs them; nothing else of it is trained.

    Raises:
        RecoveryError: there are none.
    """
    model.model.requires_grad_(False)
    forms: dict[str, Form] = {}
    for group in model.index.groups:
        edited = model.is_fitted(group)
        form = model.stored(group).editable().trainable(edited)
        if form is not None:
            forms[group.name] = form
            model.install(group, form)
    if not forms:
        raise RecoveryError(
            "The compressed model has nothing to train: every weight of it is the original's. "
            "Raise fit.removed, or set recover=none."
        )
    return forms


def named_parameters(model: LoadedModel, forms: Trainable) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters, by the names of the tensors that they become."""
    for group, form in _groups(model, forms):
        for name, tensor in group.named(form.parameters()):
            assert isinstance(tensor, nn.Parameter)
            yield name, tensor


def supports(model: LoadedModel, forms: Trainable) -> Mapping[str, Tensor]:
    """The masks of parameters that are masked weights, by their names."""
    return {
        name: form.support
        for group, form in _groups(model, forms)
        if form.support is not None
        for name, _ in group.named(form.parameters())
    }


def _groups(model: LoadedModel, forms: Trainable) -> Iterator[tuple[StoredGroup, Form]]:
    return ((g, forms[g.name]) for g in model.index.groups if g.name in forms)
