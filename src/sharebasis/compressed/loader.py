"""artifacts/compressed -> a model that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sharebasis.compressed.index import INDEX_FILE, CompressedGroup, CompressedIndex, CompressedPart
from sharebasis.errors import StoreError
from sharebasis.forms.mask import BITS
from sharebasis.forms.share_linear import ShareLinear, SplitLinear
from sharebasis.io.records import load_record
from sharebasis.io.tensor_files import TensorReader
from sharebasis.linalg.value_gauge import whole_values
from sharebasis.model.hub import empty_model, load_config, repeated
from sharebasis.model.surgery import Modules, narrow, wrap
from sharebasis.runtime.devices import require_memory


def load_compressed(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a compressed model; `generate` and all else work as on the original's class.

    Tensors are read one at a time and never exist in their dense form, but for weights that lack
    entries, which have zeros there, and values without some columns. The model is in eval mode;
    parameters do not require gradients until they are told to.

    Args:
        directory: written by the stage `fit`.
        dtype: of the floating-point parameters; None leaves them as they are stored.
        device: where the model goes.

    Raises:
        StoreError: the directory is not whole.
        WeightsError: a file of tensors is missing or truncated.
        ResourceError: the model does not fit into memory.
    """
    directory, device = Path(directory), torch.device(device)
    index = load_record(directory / INDEX_FILE, CompressedIndex)
    reader = TensorReader(directory, index.files)
    size = sum(_sizes(index, reader, dtype))
    require_memory(size, f"The compressed model in {directory}", device)
    model = empty_model(load_config(directory))
    tied = repeated(model)
    parts = _parts_by_sublayer(index)
    rows = {name: [part.rows for part in own] for name, own in parts.items()}
    for mlp in index.mlps:
        narrow(model, mlp.reads, mlp.down, len(mlp.rows), len(mlp.kept))
    modules = wrap(model, rows)
    names = {name for group in index.groups for name in group.tensors}
    found: dict[str, Tensor] = {}
    for name, tensor in reader.stream():
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
        if name in names:
            found[name] = _parameter(tensor)
        else:
            set_module_tensor_to_device(model, name, device, value=tensor, dtype=tensor.dtype)
    if lacking := names - found.keys():
        raise StoreError(
            f"{directory} lacks {len(lacking)} tensors that {INDEX_FILE} names, "
            f"{min(lacking)} among them; write it again (dvc repro fit)."
        )
    group_of = {part.coefficient: group for group in index.groups for part in group.parts}
    filled: dict[str, ShareLinear] = {}
    for name, module in modules.items():
        for linear, part in zip(module.parts, parts[name], strict=True):
            if part.coefficient not in filled:
                filled[part.coefficient] = linear
                values = found.pop(part.coefficient)
                _fill(linear, part, group_of[part.coefficient], found, values)
        # Sublayers of one weight have one part: what becomes of it becomes of all.
        module.use([filled[part.coefficient] for part in parts[name]])
    _tie(model, {alias: first for alias, first in tied.items() if not _is_in(modules, alias)})
    return _finish(model, directory, device)


def _sizes(
    index: CompressedIndex, reader: TensorReader, dtype: torch.dtype | None
) -> Iterator[int]:
    """Bytes of every tensor in memory, where weights that lack entries are whole."""
    masks = {part.coefficient: part.mask for group in index.groups for part in group.parts}
    layout = {name: (shape, stored) for name, shape, stored in reader.layout()}
    for name, (shape, stored) in layout.items():
        mask = masks.get(name)
        n = prod(layout[mask][0]) * BITS if mask else prod(shape)
        yield n * (dtype if dtype and stored.is_floating_point else stored).itemsize


def linears_by_group(
    model: PreTrainedModel, index: CompressedIndex
) -> Iterator[tuple[CompressedGroup, Mapping[str, ShareLinear]]]:
    """Every group, and its parts by the tensors of their coefficients.

    Args:
        model: from `load_compressed`.
        index: of the directory that it was loaded from.
    """
    linears = linears_by_tensor(model, index)
    for group in index.groups:
        yield group, {part.coefficient: linears[part.coefficient] for part in group.parts}


def linears_by_tensor(model: PreTrainedModel, index: CompressedIndex) -> Mapping[str, ShareLinear]:
    """The parts of a model by the tensors of their coefficients; arguments as above."""
    linears: dict[str, ShareLinear] = {}
    for name, own in _parts_by_sublayer(index).items():
        module = model.get_submodule(name)
        assert isinstance(module, SplitLinear)
        for part, linear in zip(own, module.parts, strict=True):
            linears.setdefault(part.coefficient, linear)
    return linears


def _parts_by_sublayer(index: CompressedIndex) -> dict[str, list[CompressedPart]]:
    """The parts of every sublayer."""
    parts: dict[str, list[CompressedPart]] = {}
    for group in index.groups:
        for part in group.parts:
            parts.setdefault(part.sublayer, []).append(part)
    return {name: sorted(own, key=lambda part: part.rows.start) for name, own in parts.items()}


def _parameter(tensor: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor


def _fill(
    linear: ShareLinear,
    part: CompressedPart,
    group: CompressedGroup,
    found: Mapping[str, Tensor],
    coefficient: Tensor,
) -> None:
    """Give a part what was stored for it."""
    if part.mask:
        linear.leave_out(coefficient, found[part.mask])
        return
    if group.basis is None:
        if part.pivots:
            coefficient = _parameter(whole_values(found[part.pivots], coefficient.detach()))
        assert isinstance(coefficient, nn.Parameter)
        linear.weight = coefficient
        return
    pivots = found[part.pivots] if part.pivots else None
    linear.compress(found[group.basis], coefficient, pivots, part.first, group.side)


def _is_in(modules: Modules, tensor: str) -> bool:
    return tensor.rpartition(".")[0] in modules


def _tie(model: PreTrainedModel, tied: Mapping[str, str]) -> None:
    """Give parameters that are one the value of the one that was stored."""
    for names in tied.items():
        values = [model.get_parameter(name) for name in names]
        value = next((value for value in values if not value.is_meta), values[0])
        for name in names:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, value)


def _finish(model: PreTrainedModel, directory: Path, device: torch.device) -> PreTrainedModel:
    """See to it that nothing is left without a value."""
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise StoreError(
            f"{directory} lacks {len(empty)} tensors of the model, {empty[0]} among them; write "
            "it again (dvc repro fit)."
        )
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    nn.Module.to(model, device)  # buffers that no file holds, such as rotary frequencies
    return model
