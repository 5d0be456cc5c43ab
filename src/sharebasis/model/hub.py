"""Models and tokenizers in hub format, read from a local directory."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from sharebasis.config.types import DType
from sharebasis.errors import SourceError, WeightsError
from sharebasis.runtime.devices import require_memory

DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_config(directory: Path) -> PretrainedConfig:
    """Read config.json.

    Raises:
        SourceError: there is none, or transformers does not know the family.
    """
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers checks configs by several libraries
        raise SourceError(f"{directory} has no usable config.json: {first_line(error)}") from error


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model of shapes alone: parameters and buffers are on the meta device.

    Raises:
        SourceError: the family has no causal language model.
    """
    with torch.device("meta"):
        return _from_config(config)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model whose parameters have shapes but no memory; its buffers are real.

    Raises:
        SourceError: the family has no causal language model.
    """
    with init_empty_weights(include_buffers=False):
        model = _from_config(config)
    model.tie_weights()  # what was created without memory was created once for each name
    return model


def _from_config(config: PretrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:  # a KeyError, say, where it does not know a kind of positions
        raise SourceError(
            f"transformers builds no causal language model from a {config.model_type!r} config: "
            f"{first_line(error)}"
        ) from error


def quiet_in_logs() -> None:
    """Leave out transformers' progress bars where no terminal shows them."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load_model(directory: Path, dtype: DType, device: torch.device) -> PreTrainedModel:
    """Load a dense model for evaluation.

    Raises:
        SourceError, WeightsError, ResourceError: what is there cannot be loaded.
    """
    quiet_in_logs()
    config = load_config(directory)
    n_numbers = sum(parameter.numel() for parameter in empty_model(config).parameters())
    require_memory(n_numbers * DTYPES[dtype].itemsize, f"The model in {directory}", device)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers lets safetensors' and torch's errors through
        raise WeightsError(f"{directory} cannot be loaded: {first_line(error)}") from error
    model, report = loaded
    require_all(report, directory)
    return model.eval().to(device)


def require_all(report: Mapping[str, Any], where: object) -> None:
    """Refuse a model of which transformers has drawn some tensors at random.

    Args:
        report: of `from_pretrained`, on what it has loaded.
        where: the model comes from, for the message.

    Raises:
        WeightsError: there are such tensors.
    """
    if missing := report["missing_keys"]:
        raise WeightsError(
            f"{where} lacks {len(missing)} tensors of the model, {min(missing)} among them."
        )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer.

    Raises:
        SourceError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{directory} has no usable tokenizer: {first_line(error)}") from error


def repeated(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one under a second name -> the first name."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }


def first_line(error: Exception) -> str:
    """The first line of an error's text; the rest is advice for other programs' users."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
