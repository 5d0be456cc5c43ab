"""Small models whose weights are the same on every machine, and what calibration finds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from sharebasis.architecture.sublayers import Classification
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate

CPU = torch.device("cpu")
D_MODEL, N_LAYERS, D_VOCAB = 24, 4, 96
LINEARS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up")))


class GoldenTiedConfig(LlamaConfig):
    model_type = "golden_tied"


class GoldenTied(LlamaForCausalLM):
    """A Llama of which every block but the first uses the linears of the second, but for `down`."""

    config_class = GoldenTiedConfig
    _tied_weights_keys = {  # noqa: RUF012
        f"model.layers.{i}.{name}.weight": f"model.layers.1.{name}.weight"
        for i in range(2, N_LAYERS)
        for name in LINEARS
    }


AutoConfig.register("golden_tied", GoldenTiedConfig)
AutoModelForCausalLM.register(GoldenTiedConfig, GoldenTied)

_LLAMA: Mapping[str, Any] = {
    "hidden_size": D_MODEL,
    "intermediate_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama": _LLAMA,
    "gpt2": {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64},
    "phi3": _LLAMA,
    "golden_tied": {**_LLAMA, "tie_word_embeddings": True},
}


def random_integers(*shape: int, high: int, seed: int) -> Tensor:
    """From 0 to `high` - 1. Normal deviates would hang on how a processor takes logarithms."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def windows(n: int, seed: int) -> Tensor:
    """Token ids, 16 a window."""
    return random_integers(n, 16, high=D_VOCAB, seed=seed)


@dataclass(frozen=True)
class Calibrated:
    """A model on disk, its sublayers and their moments."""

    weights: Path
    classification: Classification
    moments: MomentStore


def calibrated(family: str, work: Path) -> Calibrated:
    """Make a model of a family and calibrate it, gradients included."""
    weights = work / "weights"
    _random_model(family).save_pretrained(weights)
    found = classify_model(meta_model(load_config(weights)))
    never = Checkpoint(work / "checkpoint", {}, math.inf)
    model = load_model(weights, "float32", CPU)
    sums = calibrate(model, found.selected, windows(24, seed=1), 8, never, "text")
    write_moments(work / "moments", *sums)
    return Calibrated(weights, found, MomentStore(work / "moments"))


def _random_model(family: str) -> PreTrainedModel:
    """Some of its weights are like others, so that there is something to be shared."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = AutoConfig.for_model(family, **SIZES[family], vocab_size=D_VOCAB, **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            own = _uniform(parameter, seed=i)
            parameter.copy_(1 + own / 4 if "norm" in name or ".ln_" in name else own / 2)
        _make_alike(dict(model.named_parameters()))
    return model


def _uniform(like: Tensor, seed: int) -> Tensor:
    """Between -1 and 1."""
    return (random_integers(*like.shape, high=4097, seed=seed) - 2048) / 2048


def _make_alike(parameters: Mapping[str, Tensor]) -> None:
    """Layer 1 is nearly layer 0; layer 3 nearly reads and writes half of the stream alone."""
    for i, (name, own) in enumerate(parameters.items()):
        first = parameters.get(name.replace(".1.", ".0."))
        if first is not None and first is not own and own.ndim == 2:
            own.copy_(first + _uniform(own, seed=100 + i) / 16)
        if ".3." in name and own.ndim == 2:
            writes = any(end in name for end in ("o_proj", "down_proj", "c_proj"))
            side = 0 if writes != (".c_" in name) else 1  # gpt2's weights are transposed
            own.narrow(side, D_MODEL // 2, D_MODEL // 2).div_(16)
