"""Recovery trains factors alone, keeps the budget, goes on after a kill, and keeps the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeSettings, n_numbers
from small_pipeline import MakeSmallPipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharebasis.compressed.loader import LoadedModel, load_compressed, open_compressed
from sharebasis.config.refine import RecoverSettings
from sharebasis.config.types import Storage
from sharebasis.data.windows import read_windows
from sharebasis.errors import RecoveryError, TextError
from sharebasis.forms.low_rank import LowRank
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import load_record
from sharebasis.linalg.divergence import hidden_distance
from sharebasis.model.hub import load_model
from sharebasis.stages.recover import distill as training
from sharebasis.stages.recover.distill import Factors, distill, learning_rate
from sharebasis.stages.recover.outcome import Evaluation, Recovery, write_unrecovered
from sharebasis.stages.recover.recover import (
    recover,
    recovery_identity,
    recovery_windows,
    write_recovered,
)
from sharebasis.stages.recover.trainable import Trainable, named_parameters, trainable

WINDOWS = torch.randint(0, 256, (20, 16), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
SETTINGS = RecoverSettings(
    steps=24,
    batch=2,
    window=16,
    windows=16,
    held_out=4,
    look_every=8,
    patience=2,
    learning_rate=0.01,
    warmup=0.1,
    hidden=0.0,
    dtype="float32",
    checkpoint_seconds=1.0,
)


@dataclass(frozen=True)
class Case:
    """A small model, compressed."""

    weights: Path
    compressed: Path

    def load(self) -> tuple[PreTrainedModel, LoadedModel, Trainable]:
        """(original, compressed, its forms)."""
        model = open_compressed(self.compressed, torch.float32)
        forms = trainable(model)
        return load_model(self.weights, "float32", CPU), model, forms


def _factors(model: LoadedModel, forms: Trainable) -> Factors:
    return dict(named_parameters(model, forms))


MakeCase = Callable[..., Case]


@pytest.fixture(scope="module")
def make_case(small_pipeline: MakeSmallPipeline) -> MakeCase:
    """`make_case(storage, {"fit.removed": ...})`: small Llama, or another, compressed as told."""

    def make(
        storage: Storage,
        changes: Mapping[str, object] = {},
        family: str = "llama",
        **config: object,
    ) -> Case:
        told = {"fit.storage": storage, "fit.removed": 0.4, **changes}
        small = small_pipeline(family, told, windows=WINDOWS, batch=4, labels=None, **config)
        return Case(small.weights, small.compressed)

    return make


@pytest.fixture(scope="module", params=["plain", "interpolative"])
def case(request: pytest.FixtureRequest, make_case: MakeCase) -> Case:
    return make_case(request.param)


def _train(
    case: Case,
    checkpoint: Checkpoint,
    settings: RecoverSettings = SETTINGS,
    windows: Tensor = WINDOWS,
) -> tuple[Recovery, PreTrainedModel, Factors]:
    original, loaded, forms = case.load()
    factors = _factors(loaded, forms)
    recovery = distill(original, loaded.model, factors, windows, settings, 0, checkpoint)
    return recovery, loaded.model, factors


def _never(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "checkpoint", {}, math.inf)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=WINDOWS).logits


def test_factors_as_parameters_say_the_same(case: Case) -> None:
    before = _logits(load_compressed(case.compressed))
    _, loaded, _ = case.load()
    torch.testing.assert_close(_logits(loaded.model), before, rtol=1e-4, atol=1e-4)


def test_factors_alone_are_trained_and_a_basis_is_one_parameter(case: Case) -> None:
    _, loaded, forms = case.load()
    ours = {id(parameter) for parameter in _factors(loaded, forms).values()}
    trained = {id(parameter) for parameter in loaded.model.parameters() if parameter.requires_grad}
    assert trained == ours
    assert any(isinstance(form, LowRank) and len(form.coefficients) > 1 for form in forms.values())


def test_training_lowers_the_divergence_on_held_out_text(case: Case, tmp_path: Path) -> None:
    found, _model, _ = _train(case, _never(tmp_path))
    assert [look.step for look in found.looks] == [0, 8, 16, 24]
    first, best = found.looks[0], min(look.divergence for look in found.looks)
    assert best < 0.97 * first.divergence
    assert found.tokens == 24 * 2 * 16


def test_what_is_written_is_what_was_trained_in_as_many_numbers(case: Case, tmp_path: Path) -> None:
    original, loaded, forms = case.load()
    factors, checkpoint = _factors(loaded, forms), _never(tmp_path)
    found = distill(original, loaded.model, factors, WINDOWS, SETTINGS, 0, checkpoint)
    target = tmp_path / "recovered"
    write_recovered(target, case.compressed, loaded.index, forms, found, 10_000)
    again = load_compressed(target)
    torch.testing.assert_close(_logits(again), _logits(loaded.model), rtol=1e-4, atol=2e-4)
    assert n_numbers(target) == n_numbers(case.compressed)
    assert load_record(target / "recovery.json", Recovery) == found
    names = {path.name for path in target.iterdir()}
    assert {"config.json", "tokenizer.json", "sharebasis.json"} <= names


def test_directories_go_in_and_a_directory_comes_out(case: Case, tmp_path: Path) -> None:
    target, checkpoint = tmp_path / "recovered", Checkpoint(tmp_path / "often", {}, 1e-9)
    found = recover(
        case.weights, case.compressed, WINDOWS, SETTINGS, 0, checkpoint, target, 10_000, CPU
    )
    assert found == _train(case, _never(tmp_path))[0]
    assert not checkpoint.directory.exists()
    assert not torch.equal(
        _logits(load_compressed(target)), _logits(load_compressed(case.compressed))
    )


def _train_and_kill(
    case: Case, directory: Path, step: int, patch: pytest.MonkeyPatch, *settings: Any
) -> None:
    save = Checkpoint.save

    def die(self: Checkpoint, record: Mapping[str, object], tensors: object) -> None:
        save(self, record, tensors)  # type: ignore[arg-type]
        if record["step"] == step:
            raise KeyboardInterrupt

    with patch.context() as own:
        own.setattr(Checkpoint, "save", die)
        with pytest.raises(KeyboardInterrupt):
            _train(case, Checkpoint(directory, {}, 1e-9), *settings)


def test_a_killed_training_ends_where_one_at_a_stretch_does(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train(case, _never(tmp_path))[2]
    _train_and_kill(case, tmp_path / "often", 6, monkeypatch)
    steps: list[int] = []
    take = training._Training.take_step
    monkeypatch.setattr(
        training._Training, "take_step", lambda self: (steps.append(self.step), take(self))[1]
    )
    found, _, resumed = _train(case, Checkpoint(tmp_path / "often", {}, math.inf))
    assert steps == list(range(6, 24))
    assert [look.step for look in found.looks] == [0, 8, 16, 24]
    assert resumed.keys() == whole.keys()
    for name, factor in resumed.items():
        assert torch.equal(factor, whole[name])


def test_a_kill_moves_no_expert_that_has_seen_nothing(
    make_case: MakeCase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An expert without a token since its last turn has no gradient, and that is not zero."""
    case = make_case("plain", family="mixtral", num_local_experts=24, num_hidden_layers=1)
    settings = replace(SETTINGS, steps=32, batch=1, look_every=32, learning_rate=0.3)
    own = settings, WINDOWS[:, :2]
    whole = _train(case, _never(tmp_path), *own)[0]
    _train_and_kill(case, tmp_path / "often", 9, monkeypatch, *own)
    resumed = _train(case, Checkpoint(tmp_path / "often", {}, math.inf), *own)[0]
    assert [look.step for look in whole.looks] == [0, 32]
    assert resumed == whole  # to the last bit of what held-out text says of the last step


def test_a_training_that_gains_nothing_stops_and_keeps_what_was_best(
    case: Case, tmp_path: Path
) -> None:
    wild = replace(SETTINGS, steps=100, look_every=1, learning_rate=0.5, warmup=0.0)
    found, model, _ = _train(case, _never(tmp_path), wild)
    assert found.steps == 2
    assert found.best == 0
    torch.testing.assert_close(
        _logits(model), _logits(load_compressed(case.compressed)), rtol=1e-4, atol=1e-4
    )


def test_hidden_states_come_nearer_when_they_count(case: Case, tmp_path: Path) -> None:
    def distance(hidden: float) -> float:
        settings = replace(SETTINGS, hidden=hidden, patience=99)
        _, model, _ = _train(case, _never(tmp_path), settings)
        original = load_model(case.weights, "float32", CPU)
        with torch.no_grad():
            states = [
                one(input_ids=WINDOWS[16:], output_hidden_states=True).hidden_states
                for one in (original, model)
            ]
        return hidden_distance(*states).item()

    assert distance(100.0) < distance(0.0)


def test_bfloat16_arithmetic_trains_float32_factors(case: Case, tmp_path: Path) -> None:
    found, _, factors = _train(case, _never(tmp_path), replace(SETTINGS, dtype="bfloat16"))
    assert all(factor.dtype == torch.float32 for factor in factors.values())
    assert min(look.divergence for look in found.looks) < 0.97 * found.looks[0].divergence


def test_a_loss_that_is_no_number_is_one_error(case: Case, tmp_path: Path) -> None:
    original, loaded, forms = case.load()
    factors = _factors(loaded, forms)
    with torch.no_grad():
        next(factor for name, factor in factors.items() if name.endswith("basis")).fill_(math.nan)
    with pytest.raises(RecoveryError, match=r"step 1 is nan. Lower recover.learning_rate"):
        distill(original, loaded.model, factors, WINDOWS, SETTINGS, 0, _never(tmp_path))


def test_nothing_to_train_is_one_error(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("plain")
    monkeypatch.setattr(LowRank, "trainable", lambda *_: None)
    with pytest.raises(RecoveryError, match="nothing to train"):
        trainable(open_compressed(case.compressed))


def test_the_rate_rises_and_falls_to_nothing() -> None:
    rates = [learning_rate(step, replace(SETTINGS, steps=100), 1.0) for step in range(101)]
    assert max(rates) == pytest.approx(SETTINGS.learning_rate)
    assert rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < rates[5]
    assert rates[100] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("divergence", "times"), [(2.0, 2.0), (0.25, 0.25), (0.0, 0.0), (-1e-9, 0.0)]
)
def test_steps_are_as_long_as_there_is_far_to_go(divergence: float, times: float) -> None:
    one, other = (learning_rate(5, SETTINGS, from_) for from_ in (1.0, divergence))
    assert other == pytest.approx(times * one)


def test_every_window_is_seen_once_each_time_round(case: Case) -> None:
    original, loaded, forms = case.load()
    factors = _factors(loaded, forms)
    state = training._Training(original, loaded.model, factors, WINDOWS, SETTINGS, 3, {})
    rounds = []
    for _ in range(3):
        rounds.append(torch.cat([_next(state) for _ in range(8)]))
    first, second, third = rounds
    expected = WINDOWS[:16].unique(dim=0)
    assert all(torch.equal(one.unique(dim=0), expected) for one in (first, third))
    assert not torch.equal(first, third)
    text = WINDOWS[:16].flatten()
    shifted = [*text[8:-8].split(16), text[-16:]]
    assert torch.equal(second.unique(dim=0), torch.stack(shifted).unique(dim=0))


def _next(state: training._Training) -> Tensor:
    batch = state._batch()
    state.step += 1
    return batch


def test_the_windows_are_of_the_calibration_text_and_as_many_as_asked_for(
    tokenizer: PreTrainedTokenizerBase, make_settings: MakeSettings
) -> None:
    data = make_settings().data
    own = replace(SETTINGS, window=24, windows=5, held_out=3)
    found = recovery_windows(tokenizer, data, own, seed=0)
    assert found.shape == (8, 24)
    text = replace(data, window=24, calibration=replace(data.calibration, windows=8))
    assert torch.equal(found, read_windows(tokenizer, text, "calibration", 0))


def test_too_little_text_names_the_settings_that_ask_for_it(
    tokenizer: PreTrainedTokenizerBase, make_settings: MakeSettings
) -> None:
    own = replace(SETTINGS, window=24, windows=10**6)
    with pytest.raises(TextError, match=r"lower recover\.windows or recover\.window\."):
        recovery_windows(tokenizer, make_settings().data, own, seed=0)


def test_another_start_is_another_identity(case: Case, tmp_path: Path) -> None:
    def key(settings: RecoverSettings = SETTINGS, windows: Tensor = WINDOWS, seed: int = 0) -> str:
        identity = recovery_identity(case.weights, case.compressed, windows, settings, seed=seed)
        return Checkpoint(tmp_path, identity, 1.0).key

    keys = [
        key(),
        key(replace(SETTINGS, learning_rate=0.1)),
        key(windows=WINDOWS + 1),
        key(seed=1),
    ]
    assert len(set(keys)) == 4
    assert key(replace(SETTINGS, checkpoint_seconds=9.0)) == keys[0]


def test_without_a_step_there_is_only_the_word_of_it(tmp_path: Path) -> None:
    write_unrecovered(tmp_path / "recovered")
    assert [path.name for path in (tmp_path / "recovered").iterdir()] == ["recovery.json"]
    found = load_record(tmp_path / "recovered" / "recovery.json", Recovery)
    assert found == Recovery(0, 0, 0, ())
    assert Evaluation(0, 1.0) not in found.looks
