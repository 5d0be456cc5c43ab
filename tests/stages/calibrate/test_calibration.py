"""Moments are those of what the sublayers read, however often the run was killed."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import MakeDirectory, MakeSettings, RunPython, contents, fit_at_once
from torch import Tensor, nn
from transformers import PreTrainedModel

from sharebasis.architecture.parts import split_selected
from sharebasis.architecture.sublayers import Sublayer
from sharebasis.compressed.loader import load_compressed
from sharebasis.errors import CalibrationError
from sharebasis.io.checkpoint import Checkpoint
from sharebasis.io.records import save_record
from sharebasis.linalg.factorize import fit_read_basis
from sharebasis.linalg.moments import Moment
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.model.sites import Site, find_sites
from sharebasis.moments.store import Accumulators, MomentStore, write_moments
from sharebasis.stages.calibrate.calibrate import calibrate, run_identity
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.metrics import fit_metrics

CPU = torch.device("cpu")
WINDOWS = torch.randint(288, (10, 16), generator=torch.Generator().manual_seed(7))
FAMILIES = ("llama", "gpt2", "phi", "opt")


@pytest.fixture(scope="module")
def llama(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/weights of the llama."""
    weights = tmp_path_factory.mktemp("artifacts") / "weights"
    extract(find_source(str(llama_directory)), weights)
    return weights


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, make_directory: MakeDirectory) -> Path:
    """A model of each of some families."""
    return make_directory(request.param)


def _load(directory: Path) -> PreTrainedModel:
    return load_model(directory, "float32", CPU)


def _selected(directory: Path) -> tuple[Sublayer, ...]:
    return classify_model(meta_model(load_config(directory))).selected


def _never(directory: Path) -> Checkpoint:
    return Checkpoint(directory / "checkpoint", {"run": 1}, math.inf)


def _moments(accumulators: Accumulators) -> dict[str, Moment]:
    return {name: accumulator.moment() for name, accumulator in accumulators.items()}


def _assert_identical(one: dict[str, Moment], other: dict[str, Moment]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name].total, other[name].total), name
        assert torch.equal(one[name].sum, other[name].sum), name
        assert one[name].n_tokens == other[name].n_tokens, name


# Sites


def _sites(directory: Path) -> tuple[Site, ...]:
    model = _load(directory)
    names = [sublayer.name for sublayer in _selected(directory)]
    return find_sites(model, names, lambda: model(input_ids=WINDOWS[:1]))


def _endings(site: Site) -> tuple[str, ...]:
    return tuple(reader.split(".", 3)[-1] for reader in site.readers)


READERS = {
    "llama": [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 32),
        (("self_attn.o_proj",), 32),
        (("mlp.gate_proj", "mlp.up_proj"), 32),
        (("mlp.down_proj",), 48),
    ],
    "gpt2": [
        (("attn.c_attn",), 32),
        (("attn.c_proj",), 32),
        (("mlp.c_fc",), 32),
        (("mlp.c_proj",), 128),
    ],
    # Attention and MLP side by side, behind one norm.
    "phi": [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"), 32),
        (("self_attn.dense",), 32),
        (("mlp.fc2",), 48),
    ],
}


@pytest.mark.parametrize("family", READERS)
def test_sublayers_that_read_the_same_tensor_share_a_site(
    make_directory: MakeDirectory, family: str
) -> None:
    sites = _sites(make_directory(family))
    for layer in range(3):
        own = [site for site in sites if f".{layer}." in site.name]
        assert sorted((_endings(site), site.d) for site in own) == sorted(READERS[family])
    assert len(sites) == 3 * len(READERS[family])
    assert all(site.name == site.readers[0] for site in sites)


def test_equal_inputs_in_different_memory_are_different_sites() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.part = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x.clone()) + self.part(x[:, :2])

    model = Copies()
    sites = find_sites(model, ["one", "other", "part"], lambda: model(torch.ones(3, 4)))
    assert [(site.readers, site.d) for site in sites] == [
        (("one",), 4),
        (("other",), 4),
        (("part",), 2),
    ]


def test_finding_sites_leaves_no_hook_behind(llama: Path) -> None:
    model = _load(llama)
    names = [sublayer.name for sublayer in _selected(llama)]

    def fail() -> None:
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        find_sites(model, names, fail)
    find_sites(model, names, lambda: model(input_ids=WINDOWS[:1]))
    assert not any(module._forward_pre_hooks for module in model.modules())


# Moments


@torch.no_grad()
def _inputs(model: PreTrainedModel, names: list[str], batch: int) -> dict[str, Tensor]:
    """What every sublayer is given, seen by hooks on the dense model, in float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, own=seen[name]: own.append(args[0].flatten(0, -2).double())
        )
    for chunk in WINDOWS.split(batch):
        model(input_ids=chunk)
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


def test_moments_are_those_that_hooks_on_the_dense_model_see(
    directory: Path, tmp_path: Path
) -> None:
    selected = _selected(directory)
    sites, sums = calibrate(_load(directory), selected, WINDOWS, 4, _never(tmp_path))
    moments = _moments(sums)
    site_of = {reader: site.name for site in sites for reader in site.readers}
    assert site_of.keys() == {sublayer.name for sublayer in selected}
    for name, x in _inputs(_load(directory), list(site_of), batch=4).items():
        moment = moments[site_of[name]]
        assert moment.n_tokens == len(x) == WINDOWS.numel()
        torch.testing.assert_close(moment.total, x.T @ x, rtol=1e-12, atol=1e-12 * len(x))
        torch.testing.assert_close(moment.sum, x.sum(0), rtol=1e-12, atol=1e-12 * len(x))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_batch_size_changes_moments_by_float32_rounding_at_most(
    directory: Path, tmp_path: Path, batch: int
) -> None:
    selected = _selected(directory)
    runs = (
        _moments(calibrate(_load(directory), selected, WINDOWS, size, _never(tmp_path))[1])
        for size in (4, batch)
    )
    expected, found = runs
    for name, moment in expected.items():
        difference = (found[name].total - moment.total).norm() / moment.total.norm()
        assert difference < 1e-5, name
        assert found[name].n_tokens == moment.n_tokens


def test_written_moments_are_read_back_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    sites, sums = calibrate(_load(llama), _selected(llama), WINDOWS, 4, _never(tmp_path))
    write_moments(tmp_path / "moments", sites, sums)
    stored = MomentStore(tmp_path / "moments")
    _assert_identical({site.name: stored.read(site.name) for site in sites}, _moments(sums))
    for site in sites:
        assert {stored.site(reader) for reader in site.readers} == {site.name}
    with pytest.raises(CalibrationError, match=r"no moment for lm_head; run calibrate again"):
        stored.site("lm_head")


# Kills

CALIBRATE_AND_DIE = """
    import json, os, signal, sys, torch
    from pathlib import Path
    from sharebasis import store
    from sharebasis.calibration import calibrate
    from sharebasis.checkpoint import Checkpoint
    from sharebasis.hub import load_model
    from sharebasis.sublayer import Classification

    torch.set_num_threads(1)
    weights, directory, record, windows, passes = sys.argv[1:]
    model = load_model(Path(weights), "float32", torch.device("cpu"))
    windows = torch.tensor(json.loads(windows))
    left = int(passes) + 1  # the probe is a pass, too

    def die(*_):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    model.base_model.register_forward_pre_hook(die)
    selected = store.load_record(Path(record), Classification).selected
    calibrate(model, selected, windows, 2, Checkpoint(Path(directory), {"run": 1}, 1e-9))
"""


@pytest.fixture(scope="module")
def killed(llama: Path, tmp_path_factory: pytest.TempPathFactory, run_python: RunPython) -> Path:
    """The checkpoint of a run with batch 2 that was killed after three of five batches."""
    directory = tmp_path_factory.mktemp("killed")
    record = classify_model(meta_model(load_config(llama)))
    save_record(directory / "sublayers.json", record)
    run = run_python(
        CALIBRATE_AND_DIE,
        llama,
        directory / "checkpoint",
        directory / "sublayers.json",
        json.dumps(WINDOWS.tolist()),
        3,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    return directory / "checkpoint"


def _count_windows(model: PreTrainedModel) -> list[int]:
    """The size of every batch that goes through the model from now on, the probe included."""
    batches: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return batches


def test_a_killed_run_goes_on_and_ends_bit_identical(
    llama: Path, killed: Path, tmp_path: Path
) -> None:
    selected = _selected(llama)
    whole = calibrate(_load(llama), selected, WINDOWS, 2, _never(tmp_path))[1]
    model = _load(llama)
    batches = _count_windows(model)
    before = contents(killed)
    resumed = calibrate(model, selected, WINDOWS, 2, Checkpoint(killed, {"run": 1}, math.inf))[1]
    assert batches == [1, 2, 2]  # the probe, and the four windows that were left
    assert contents(killed) == before
    _assert_identical(_moments(resumed), _moments(whole))


def test_a_checkpoint_of_another_run_is_not_used(llama: Path, killed: Path, tmp_path: Path) -> None:
    selected = _selected(llama)
    model = _load(llama)
    batches = _count_windows(model)
    found = calibrate(model, selected, WINDOWS, 2, Checkpoint(killed, {"run": 2}, math.inf))[1]
    assert batches == [1, 2, 2, 2, 2, 2]
    whole = calibrate(_load(llama), selected, WINDOWS, 2, _never(tmp_path))[1]
    _assert_identical(_moments(found), _moments(whole))


def test_a_complete_run_takes_its_checkpoint_away(llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "parent" / "checkpoint", {"run": 1}, 1e-9)
    calibrate(_load(llama), _selected(llama), WINDOWS, 4, checkpoint)
    assert checkpoint.directory.exists()
    checkpoint.remove()
    assert not any(checkpoint.directory.parent.iterdir())


def test_no_checkpoint_is_written_before_its_time(llama: Path, tmp_path: Path) -> None:
    calibrate(_load(llama), _selected(llama), WINDOWS, 4, _never(tmp_path))
    assert not any(tmp_path.iterdir())


def test_the_identity_of_a_run_holds_all_that_the_moments_depend_on(
    llama: Path, make_directory: MakeDirectory, tmp_path: Path
) -> None:
    extract(find_source(str(make_directory("llama", seed=1))), tmp_path / "weights")
    selected = _selected(llama)
    swapped = WINDOWS.clone()
    swapped[0, 0] += 1
    settings = {"dtype": "float32", "batch": 4}
    identities = [
        run_identity(llama, selected, WINDOWS, **settings),
        run_identity(tmp_path / "weights", selected, WINDOWS, **settings),
        run_identity(llama, selected[1:], WINDOWS, **settings),
        run_identity(llama, selected, swapped, **settings),
        run_identity(llama, selected, WINDOWS.reshape(20, 8), **settings),
        run_identity(llama, selected, WINDOWS, **{**settings, "dtype": "bfloat16"}),
        run_identity(llama, selected, WINDOWS, **{**settings, "batch": 2}),
    ]
    keys = [Checkpoint(tmp_path, identity, 1.0).key for identity in identities]
    assert len(set(keys)) == len(keys)
    again = run_identity(llama, selected, WINDOWS.clone(), **settings)
    assert Checkpoint(tmp_path, again, 1.0).key == keys[0]


# Experts

IDLE, UNSEEN = 2, "model.layers.1.mlp.experts"
"""Number of an expert, and where it is, that no token goes to."""


@pytest.fixture(scope="module")
def experts(make_directory: MakeDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/weights of a model with one expert that its router never chooses."""
    directory = make_directory("gpt_oss")
    model = _load(directory)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.router").bias[IDLE] = -1e4
    model.save_pretrained(directory)
    weights = tmp_path_factory.mktemp("artifacts") / "weights"
    extract(find_source(str(directory)), weights)
    return weights


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("sharebasis") and record.levelname == "WARNING"
    ]


def test_an_expert_that_no_token_went_to_is_told_and_has_an_empty_moment(
    experts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    selected = _selected(experts)
    sites, sums = calibrate(_load(experts), selected, WINDOWS, 4, _never(tmp_path))
    (warning,) = _warnings(caplog)
    for said in (f"went to 2 of {len(sites)} inputs", f"{UNSEEN}.gate_up_proj.{IDLE} among"):
        assert said in warning
    write_moments(tmp_path / "moments", sites, sums)
    stored = MomentStore(tmp_path / "moments")
    _assert_identical({site.name: stored.read(site.name) for site in sites}, _moments(sums))
    for name in ("gate_up_proj", "down_proj"):
        seen = [stored.read(stored.site(f"{UNSEEN}.{name}.{i}")) for i in range(4)]
        assert sum(moment.n_tokens for moment in seen) == 2 * WINDOWS.numel()  # two for each token
        assert [moment.n_tokens == 0 for moment in seen] == [i == IDLE for i in range(4)]
        assert seen[IDLE].total.count_nonzero() == 0
        with pytest.raises(CalibrationError, match=f"{name}.{IDLE} has seen no tokens"):
            _ = seen[IDLE].second


def test_experts_see_the_tokens_that_went_to_them(experts: Path, tmp_path: Path) -> None:
    selected = _selected(experts)
    sites, sums = calibrate(_load(experts), selected, WINDOWS, 4, _never(tmp_path))
    assert {len(site.readers) for site in sites if ".experts." in site.name} == {1}
    model, moments = _load(experts), _moments(sums)
    chosen: list[Tensor] = []
    inputs: list[Tensor] = []
    own = model.get_submodule(UNSEEN)
    own.register_forward_pre_hook(
        lambda _, args: (inputs.append(args[0].double()), chosen.append(args[1]))[0]
    )
    with torch.no_grad():
        for chunk in WINDOWS.split(4):
            model(input_ids=chunk)
    for expert in range(4):
        x = torch.cat(inputs)[(torch.cat(chosen) == expert).any(dim=1)]
        moment = moments[f"{UNSEEN}.gate_up_proj.{expert}"]
        assert moment.n_tokens == len(x)
        torch.testing.assert_close(moment.total, x.T @ x, rtol=1e-5, atol=1e-5 * len(x))
        torch.testing.assert_close(moment.sum, x.sum(0), rtol=1e-5, atol=1e-5 * len(x))


def test_a_text_that_reaches_every_expert_is_no_reason_to_warn(
    make_directory: MakeDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_directory("gpt_oss")
    calibrate(_load(directory), _selected(directory), WINDOWS, 4, _never(tmp_path))
    assert not _warnings(caplog)


def test_a_run_with_an_expert_that_no_token_went_to_goes_on(experts: Path, tmp_path: Path) -> None:
    selected = _selected(experts)
    whole = calibrate(_load(experts), selected, WINDOWS, 2, _never(tmp_path))[1]
    often = Checkpoint(tmp_path / "checkpoint", {"run": 1}, 1e-9)
    calibrate(_load(experts), selected, WINDOWS[:6], 2, often)
    model = _load(experts)
    batches = _count_windows(model)
    resumed = calibrate(model, selected, WINDOWS, 2, _never(tmp_path))[1]
    assert batches == [1, 2, 2]
    _assert_identical(_moments(resumed), _moments(whole))


@pytest.mark.parametrize("share_experts", [False, True])
def test_an_expert_that_no_token_went_to_is_fitted(
    experts: Path, make_settings: MakeSettings, tmp_path: Path, share_experts: bool
) -> None:
    found = classify_model(meta_model(load_config(experts)))
    sites, sums = calibrate(_load(experts), found.selected, WINDOWS, 4, _never(tmp_path))
    write_moments(tmp_path / "moments", sites, sums)
    changes = {"fit.method": "svd_llm", "fit.group_size": 1, "fit.shared": []}
    settings = make_settings({**changes, "fit.share_experts": share_experts}).fit
    parts, moments = split_selected(found, "none"), MomentStore(tmp_path / "moments")
    fitted = fit_at_once(experts, parts, moments, settings, tmp_path / "small")
    assert 0 < fit_metrics(fitted, settings)["relative_loss"] < 1
    small, dense = load_compressed(tmp_path / "small"), _load(experts)
    unstack(dense)
    numbers = range(4) if share_experts else [IDLE]
    for name in ("gate_up_proj", "down_proj"):
        names = [f"{UNSEEN}.{name}.{i}" for i in numbers]
        pooled = sum(
            (moments.read(moments.site(name)) for name in names[1:]), moments.read(names[0])
        )
        factors = [small.get_submodule(name).parts[0] for name in names]
        expected = fit_read_basis(
            [dense.get_submodule(name).weight for name in names],
            pooled if share_experts else None,  # without tokens there is nothing to whiten by
            len(factors[0].basis),
        )
        for own, coefficient in zip(factors, expected.coefficients, strict=True):
            found_product = own.coefficient.double() @ own.basis.double()
            product = coefficient @ expected.basis
            torch.testing.assert_close(found_product, product.double(), rtol=0, atol=1e-5)


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_told_with_their_site(
    llama: Path, tmp_path: Path, value: float
) -> None:
    selected = _selected(llama)
    good = calibrate(_load(llama), selected, WINDOWS, 4, _never(tmp_path))
    write_moments(tmp_path / "artifacts" / "moments", *good)
    before = contents(tmp_path / "artifacts")
    model = _load(llama)
    with torch.no_grad():
        model.get_submodule("model.layers.1.post_attention_layernorm").weight[3] = value
    sites, sums = calibrate(model, selected, WINDOWS, 4, _never(tmp_path))
    with pytest.raises(CalibrationError) as raised:
        write_moments(tmp_path / "artifacts" / "moments", sites, sums)
    assert "The inputs of model.layers.1.mlp.gate_proj hold NaN or inf" in str(raised.value)
    assert f"after {WINDOWS.numel()} tokens" in str(raised.value)
    assert contents(tmp_path / "artifacts") == before


def test_a_selected_sublayer_that_never_runs_is_named(llama: Path, tmp_path: Path) -> None:
    model = _load(llama)
    model.get_submodule("model.layers.2.mlp").register_module("idle", nn.Linear(32, 32))
    selected = _selected(llama)
    idle = dataclasses.replace(selected[0], name="model.layers.2.mlp.idle", shape=(32, 32))
    with pytest.raises(CalibrationError, match=r"1 selected .* model\.layers\.2\.mlp\.idle among"):
        calibrate(model, [*selected, idle], WINDOWS, 4, _never(tmp_path))
