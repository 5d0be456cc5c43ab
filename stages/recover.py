"""Stage `recover`: the factors, distilled against the original; optional."""

from dataclasses import replace

import torch

from sharebasis import compressed_index, store
from sharebasis.checkpoint import Checkpoint
from sharebasis.compressed import load_compressed
from sharebasis.compressed_index import CompressedIndex
from sharebasis.config import load_settings
from sharebasis.hub import load_config, load_model, load_tokenizer
from sharebasis.recovery import (
    recover,
    recovery_identity,
    trainable,
    write_recovered,
    write_unrecovered,
)
from sharebasis.resources import pick_device
from sharebasis.settings import Settings
from sharebasis.stage import COMPRESSED, RECOVERED, RECOVERY_CHECKPOINT, WEIGHTS, report_errors
from sharebasis.texts import read_windows, require_positions


@report_errors
def main() -> None:
    settings = load_settings()
    if settings.recover.steps:
        train(settings)
    else:
        write_unrecovered(RECOVERED)


def train(settings: Settings) -> None:
    own, device, seed = settings.recover, pick_device(settings.device), settings.seed
    text = replace(settings.data.calibration, windows=own.windows + own.held_out)
    data = replace(settings.data, window=own.window, calibration=text)
    require_positions(load_config(COMPRESSED), data)
    windows = read_windows(load_tokenizer(COMPRESSED), data, "calibration", seed)
    identity = recovery_identity(WEIGHTS, COMPRESSED, windows, own, seed=seed, device=str(device))
    checkpoint = Checkpoint(RECOVERY_CHECKPOINT, identity, own.checkpoint_seconds)
    index = store.load_record(COMPRESSED / compressed_index.FILE, CompressedIndex)
    compressed = load_compressed(COMPRESSED, torch.float32, device)
    groups = trainable(compressed, index)
    original = load_model(WEIGHTS, own.dtype, device)
    found = recover(original, compressed, groups, windows, own, seed, checkpoint)
    write_recovered(RECOVERED, COMPRESSED, index, groups, found, settings.fit.shard_bytes)
    checkpoint.remove()


if __name__ == "__main__":
    main()
