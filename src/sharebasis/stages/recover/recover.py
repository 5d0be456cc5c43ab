"""artifacts/compressed and text -> artifacts/recovered: the factors, distilled for a while."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sharebasis.compressed.index import CompressedIndex
from sharebasis.compressed.loader import open_compressed
from sharebasis.compressed.rewrite import rewrite
from sharebasis.config.data import DataSettings
from sharebasis.config.refine import RecoverSettings
from sharebasis.data.windows import cut, read_windows
from sharebasis.io.atomic import writing
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.identity import identity_of
from sharebasis.io.manifest import MANIFEST
from sharebasis.io.records import save_record
from sharebasis.model.hub import load_model
from sharebasis.stages.recover.distill import distill
from sharebasis.stages.recover.outcome import RECOVERY, Recovery
from sharebasis.stages.recover.trainable import (
    Trainable,
    named_parameters,
    supports,
    trainable,
)


def recovery_identity(
    weights: Path, compressed: Path, windows: Tensor, settings: RecoverSettings, **others: object
) -> dict[str, object]:
    """All that the trained factors depend on, for `Checkpoint`.

    Args:
        weights: artifacts/weights, which its manifest stands for.
        compressed: artifacts/compressed.
        windows: token ids.
        settings: of the training.
        others: whatever else changes the numbers.
    """
    models = {"weights": weights / MANIFEST, "compressed": compressed}
    return {**identity_of(settings, windows, **models), **others}


def recovery_windows(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, settings: RecoverSettings, seed: int
) -> Int64[Tensor, "windows window"]:
    """The windows to train on and then those held out, all of the calibration text.

    Raises:
        TextError: there is too little of it.
    """
    text = cut(data, "calibration", settings.windows + settings.held_out, settings.window)
    return read_windows(tokenizer, text, "calibration", seed, "recover")


def recover(
    weights: Path,
    compressed: Path,
    windows: Int64[Tensor, "windows window"],
    settings: RecoverSettings,
    seed: int,
    checkpoint: Checkpoint,
    target: Path,
    shard_bytes: int,
    device: torch.device,
) -> Recovery:
    """Train the factors of a compressed model and write it anew; whole or not at all.

    Args:
        weights: artifacts/weights.
        compressed: artifacts/compressed.
        windows: from `recovery_windows`.
        settings: of the training; without a step, only that is written.
        seed: of the order of the windows.
        checkpoint: where a run that was killed goes on from.
        target: artifacts/recovered.
        shard_bytes: size at which a shard is closed.
        device: for the training.

    Raises:
        RecoveryError: there is nothing to train, or the loss is not finite.
        WeightsError, StoreError, ResourceError: what is read is not usable, or does not fit.
    """
    model = open_compressed(compressed, torch.float32, device)
    forms = trainable(model)
    factors = dict(named_parameters(model, forms))
    original = load_model(weights, settings.dtype, device)
    kept = supports(model, forms)
    outcome = distill(original, model.model, factors, windows, settings, seed, checkpoint, kept)
    write_recovered(target, compressed, model.index, forms, outcome, shard_bytes)
    checkpoint.remove()
    return outcome


def write_recovered(
    target: Path,
    source: Path,
    index: CompressedIndex,
    forms: Trainable,
    recovery: Recovery,
    shard_bytes: int,
) -> None:
    """Write a compressed directory with trained weights in the place of others.

    Args:
        target: artifacts/recovered.
        source: artifacts/compressed, whose other tensors go along.
        index: of `source`.
        forms: trained.
        recovery: how that went.
        shard_bytes: size at which a shard is closed.

    Raises:
        StoreError: the disk is full.
    """
    with writing(target) as out:
        rewrite(out, source, index, forms, {}, shard_bytes)
        save_record(out / RECOVERY, recovery)
