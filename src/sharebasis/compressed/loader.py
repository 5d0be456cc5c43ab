"""artifacts/compressed -> a model that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from operator import attrgetter
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sharebasis.compressed.edits import Edit, edits_of
from sharebasis.compressed.index import (
    INDEX_FILE,
    CompressedIndex,
    StoredGroup,
    StoredPart,
    load_index,
)
from sharebasis.errors import StoreError
from sharebasis.forms.form import Form
from sharebasis.forms.share_linear import ShareLinear
from sharebasis.forms.split_linear import SplitLinear
from sharebasis.forms.table import FORMS
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.rows import Rows
from sharebasis.model.hub import empty_model, load_config, repeated
from sharebasis.model.surgery import wrap
from sharebasis.runtime.devices import require_memory


def load_compressed(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a compressed model; `generate` and all else work as on the original's class.

    Tensors are read one at a time and never exist in their dense form, but for masked weights and
    values in the value gauge, which are dense in memory. The model is in eval mode;
    parameters do not require gradients until they are told to.

    Args:
        directory: written by the stage `fit`.
        dtype: of the floating-point parameters; None leaves them as they are stored.
        device: where the model goes.

    Raises:
        StoreError: the directory lacks tensors of the model, or its index.
        WeightsError: a file of tensors is missing or truncated.
        ResourceError: the model does not fit into memory.
    """
    return open_compressed(directory, dtype, device).model


@dataclass(frozen=True)
class LoadedModel:
    """A compressed model with its index, to be refitted or trained."""

    model: PreTrainedModel
    index: CompressedIndex
    reader: TensorReader
    """Of the tensors as they are stored."""
    edits: Sequence[Edit]

    @cached_property
    def places(self) -> Mapping[str, Sequence[Rows]]:
        """The rows of the parts of every sublayer, in the order in which it has them."""
        rows: dict[str, list[Rows]] = {}
        for group in self.index.groups:
            for part in group.parts:
                for sublayer in part.sublayers:
                    rows.setdefault(sublayer, []).append(part.rows)
        return {name: sorted(parts, key=attrgetter("start")) for name, parts in rows.items()}

    def linears(self, group: StoredGroup) -> Sequence[ShareLinear]:
        """The modules of a group's parts."""
        return [self.modules(part)[0].parts[self._place(part)] for part in group.parts]

    def modules(self, part: StoredPart) -> Sequence[SplitLinear]:
        """The sublayers that a part belongs to."""
        modules = [self.model.get_submodule(name) for name in part.sublayers]
        return [module for module in modules if isinstance(module, SplitLinear)]

    def tie(self, part: StoredPart) -> None:
        """Let sublayers that are tied share the module of a part."""
        first, *others = self.modules(part)
        place = self._place(part)
        for module in others:
            parts = list(module.parts)
            parts[place] = first.parts[place]
            module.use(parts)

    def _place(self, part: StoredPart) -> int:
        return self.places[part.sublayer].index(part.rows)

    def stored(self, group: StoredGroup) -> Form:
        """The form of a group as it is stored, where the model is and in its dtype; read anew, as
        it may hold more than the model needs."""
        like = next(self.linears(group)[0].parameters())

        def read(name: str) -> Tensor:
            tensor = self.reader.read(name)
            return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)

        tensors = {name: read(name) for name in group.tensor_names}
        return group.load(tensors, self.shapes(group))

    def install(self, group: StoredGroup, form: Form) -> None:
        """Let the model run another form of a group."""
        for linear, module in zip(self.linears(group), form.modules(), strict=True):
            linear.compress(module)

    def shapes(self, group: StoredGroup) -> list[tuple[int, int]]:
        """(d_out, d_in) of a group's parts."""
        return [(linear.out_features, linear.in_features) for linear in self.linears(group)]

    def is_fitted(self, group: StoredGroup) -> bool:
        """Whether an edit has changed the weights of a group, which may be dense all the same."""
        return any(edit.is_fitted(group.parts[0].sublayer) for edit in self.edits)


def open_compressed(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """`load_compressed`, with the forms that the model runs and the index."""
    directory, device = Path(directory), torch.device(device)
    index = load_index(directory)
    reader, edits = TensorReader(directory, index.files), edits_of(index)
    model = empty_model(load_config(directory))
    tied = repeated(model)
    for edit in edits:
        edit.shape(model)
    loaded = LoadedModel(model, index, reader, edits)
    wrap(model, loaded.places)
    size = sum(_sizes(loaded, dtype))
    require_memory(size, f"The compressed model in {directory}", device)
    tensors = _read(loaded, directory, dtype, device)
    for group in index.groups:
        loaded.install(group, _load(loaded, group, tensors))
        for part in group.parts:
            loaded.tie(part)
    others = {alias: first for alias, first in tied.items() if not _is_in(loaded.places, alias)}
    _tie(model, others)
    _finish(model, directory, device)
    return loaded


def _read(
    loaded: LoadedModel, directory: Path, dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """The tensors of all groups; the others go to the model at once."""
    names = loaded.index.group_tensors
    of_groups: dict[str, Tensor] = {}
    for name, tensor in loaded.reader.stream():
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
        if name in names:
            of_groups[name] = _parameter(tensor)
        else:
            set_module_tensor_to_device(
                loaded.model, name, device, value=tensor, dtype=tensor.dtype
            )
    if missing := names - of_groups.keys():
        raise StoreError(
            f"{directory} lacks {len(missing)} tensors that {INDEX_FILE} names, "
            f"{min(missing)} among them; write it again (dvc repro fit)."
        )
    return of_groups


def _load(loaded: LoadedModel, group: StoredGroup, tensors: dict[str, Tensor]) -> Form:
    """The form of a group; what it does not use as it is can be released."""
    of_group = {name: tensors.pop(name) for name in group.tensor_names if name in tensors}
    return group.load(of_group, loaded.shapes(group))


def _sizes(loaded: LoadedModel, dtype: torch.dtype | None) -> Iterator[int]:
    """Bytes of every tensor in memory."""
    layout = {name: (shape, stored) for name, shape, stored in loaded.reader.layout()}

    def size(n: int, stored: torch.dtype) -> int:
        return n * (dtype if dtype and stored.is_floating_point else stored).itemsize

    for group in loaded.index.groups:
        of_group = [layout.pop(name) for name in group.tensor_names if name in layout]
        in_memory = FORMS[group.form].n_in_memory(loaded.shapes(group))
        if in_memory is not None and of_group:
            yield size(in_memory, of_group[0][1])
        else:
            yield from (size(prod(shape), stored) for shape, stored in of_group)
    yield from (size(prod(shape), stored) for shape, stored in layout.values())


def _parameter(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


def _is_in(sublayers: Mapping[str, object], tensor: str) -> bool:
    return tensor.rpartition(".")[0] in sublayers


def _tie(model: PreTrainedModel, tied: Mapping[str, str]) -> None:
    """Give tied parameters the value of the one of them that was stored."""
    for names in tied.items():
        values = [model.get_parameter(name) for name in names]
        value = next((value for value in values if not value.is_meta), values[0])
        for name in names:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, value)


def _finish(model: PreTrainedModel, directory: Path, device: torch.device) -> None:
    """Check that every tensor of the model has a value, and move it to the device."""
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise StoreError(
            f"{directory} lacks {len(empty)} tensors of the model, {empty[0]} among them; write "
            "it again (dvc repro fit)."
        )
    # As transformers would save it, its linear sublayers are random when it is loaded again.
    model.save_pretrained = partial(_refuse_to_save, directory)  # type: ignore[method-assign]
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    nn.Module.to(model, device)  # buffers that no file holds, such as rotary frequencies


def _refuse_to_save(directory: Path, *_: object, **__: object) -> None:
    """Stands in for `save_pretrained`.

    Raises:
        StoreError: always.
    """
    raise StoreError(
        f"A compressed model is not saved by save_pretrained, since from_pretrained could not load "
        f"it; copy {directory}, and load the copy by sharebasis.load_compressed."
    )
