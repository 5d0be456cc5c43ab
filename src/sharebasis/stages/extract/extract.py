"""A model from the hub, a directory, a GGUF file or a package -> artifacts/weights."""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from sharebasis.errors import SourceError, WeightsError
from sharebasis.io.atomic import disk_errors, require_disk, writing
from sharebasis.io.manifest import MANIFEST, Manifest, TensorOrigin
from sharebasis.io.records import save_record
from sharebasis.io.tensor_files import TensorReader, opened
from sharebasis.model.hub import first_line, load_config, quiet_in_logs, require_all
from sharebasis.runtime.progress import progress
from sharebasis.stages.extract.sources import BLOCK_BYTES, COMPANIONS, Source

SHARD_SIZE = "1GB"
"""Of what transformers has to write for us; a safetensors source keeps its own shards."""


def extract(source: Source, target: Path) -> Manifest:
    """Write a model to `target` in hub format, with a manifest; whole or not at all.

    Safetensors are copied as they are, and read in blocks to be checked and hashed, so
    memory does not grow with the model. Other formats go through transformers.

    Raises:
        SourceError: the source is no model that transformers knows.
        WeightsError: a tensor is missing, truncated or not finite.
        StoreError: the disk is full.
    """
    with writing(target) as out:
        converted_from = None if any(source.path.glob("*.safetensors")) else source.path.name
        if converted_from is None:
            _copy(source.path, out)
        elif source.path.is_file():
            _convert(source.path.parent, out, gguf_file=source.path.name)
        else:
            _convert(source.path, out)
        tensors = tuple(_check(TensorReader.of_checkpoint(out), converted_from))
        manifest = Manifest(source.name, source.version, tensors)
        save_record(out / MANIFEST, manifest)
    return manifest


def _copy(source: Path, out: Path) -> None:
    """Copy a directory in hub format, shards byte for byte."""
    quantization = getattr(load_config(source), "quantization_config", None)
    if quantization is not None:
        raise SourceError(
            f"The model in {source} is quantized ({_method_of(quantization)}), and what its files "
            "hold are not its weights. Give one that is not, or save it dequantized."
        )
    where = TensorReader.of_checkpoint(source).files
    files = sorted(set(where.values()))
    for file in files:  # what is missing or truncated is found before anything is copied
        with opened(source / file) as tensors:
            held = set(tensors.keys())
        if lacking := {name for name, shard in where.items() if shard == file} - held:
            raise WeightsError(
                f"{file} in {source} lacks {len(lacking)} tensors that its index puts there, "
                f"{min(lacking)} among them: fetch both again."
            )
    require_disk(out, sum((source / name).stat().st_size for name in files))
    companions = (path.name for pattern in COMPANIONS for path in source.glob(pattern))
    for name in [*files, *companions]:
        if name != MANIFEST and ".bin." not in name:  # an index of pickles that stay behind
            shutil.copyfile(source / name, out / name)


def _method_of(quantization: Any) -> str:
    """Of a config's entry, which is a record, or JSON as it stands there."""
    config = quantization if isinstance(quantization, dict) else vars(quantization)
    return str(config.get("quant_method", "by an unknown method")).rpartition(".")[2].lower()


def _convert(directory: Path, out: Path, **options: Any) -> None:
    """Load a model in another format and save it in float32 safetensors."""
    quiet_in_logs()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)
    except Exception as error:  # transformers lets errors of many kinds through
        what = options.get("gguf_file", "The model")
        raise SourceError(
            f"{what} in {directory} cannot be read by transformers: {first_line(error)}"
        ) from error
    model, report = loaded
    require_all(report, options.get("gguf_file", directory))
    # The weights are dequantized; what is left of the quantization forbids saving them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    require_disk(out, model.get_memory_footprint())
    with disk_errors(out):
        model.save_pretrained(out, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(out)


def _check(reader: TensorReader, converted_from: str | None) -> Iterator[TensorOrigin]:
    """Hash every tensor; refuse one that is not finite."""
    with progress("extract", len(reader.files), "tensors") as advance:
        for name, file in sorted(reader.files.items()):
            path = reader.directory / file
            with opened(path) as tensors:
                view = tensors.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
            digest, n_bad = hashlib.sha256(), 0
            for block in _blocks(path, name, shape):
                digest.update(block.view(torch.uint8).numpy().data)
                if block.is_floating_point():
                    n_bad += int((~block.isfinite()).sum())
            source = converted_from or file
            if n_bad:
                raise WeightsError(
                    f"{name} {list(shape)} in {source} has {n_bad} NaN or infinite numbers. "
                    "The source is damaged: fetch it again."
                )
            yield TensorOrigin(name, shape, dtype, digest.hexdigest(), file, source)
            advance()


def _blocks(path: Path, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A tensor as flat blocks of about BLOCK_BYTES.

    The file is opened anew for every block: pages of an open mapping that have been
    read count as resident memory until it is closed.
    """
    if not shape:
        with opened(path) as file:
            yield file.get_tensor(name).reshape(1)
        return
    row_bytes = 8 * math.prod(shape[1:])  # of the widest dtype
    rows = max(1, BLOCK_BYTES // max(row_bytes, 1))
    for start in range(0, shape[0], rows):
        with opened(path) as file:
            yield file.get_slice(name)[start : start + rows].reshape(-1).clone()
