"""What several files share: tiny random models in hub format, a tokenizer, settings."""

# What has to be set before an import comes before it.
# ruff: noqa: E402

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
from beartype import BeartypeConf
from beartype.claw import beartype_package

REPOSITORY = Path(__file__).parents[1]

# Every function checks its types; where a signature can name a shape, that too, which costs ten
# times as much. Not those two modules that see every operator of every pass: they have no shapes,
# and mypy.
SOURCE = REPOSITORY / "src"
SHAPED = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in sorted(SOURCE.rglob("*.py"))
    if "jaxtyping" in path.read_text()
]
OPERATORS = ("sharebasis.model.trace", "sharebasis.residual.residual_sums")
beartype_package(
    "sharebasis", conf=BeartypeConf(claw_is_pep526=False, claw_skip_package_names=OPERATORS)
)
jaxtyping.install_import_hook(SHAPED, "beartype.beartype")

import hypothesis
import pytest
import torch
import yaml
from small_pipeline import (
    CPU,
    WINDOWS,
    Change,
    MakeSmallModel,
    MakeSmallPipeline,
    SmallModel,
    SmallPipeline,
    calibrated_model,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from sharebasis.architecture.parts import Part
from sharebasis.compressed.index import load_index
from sharebasis.config.fit import FitSettings
from sharebasis.config.schema import Settings
from sharebasis.config.types import Labels
from sharebasis.io.tensor_files import TensorReader
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.store import MomentStore
from sharebasis.pipeline.compose import compose_params
from sharebasis.pipeline.settings import parse_settings
from sharebasis.stages.decompose.decompose import decompose
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel

torch.set_num_threads(1)  # the models are far too small for more to pay

# How long an example takes says how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")


def rows_left(name: str, n_rows: int, kept: Sequence[int]) -> list[int]:
    """The rows of what an MLP of the table reads by that some of its neurons have."""
    starts = (0, n_rows // 2) if name.endswith("gate_up_proj") else (0,)
    return [start + neuron for start in starts for neuron in kept]


END = "<|end|>"
CORPUS = (
    "the state of the union is strong and the people of these states are free\n"
    "we hold that a basis shared by many layers is stored once, and read by all of them\n"
) * 4

SIZES: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "families.yaml").read_text()
)
"""A small config of every family, by name."""


LONGEST = (
    "test_sweep.py",
    "test_families.py",
    "test_pipeline.py",
    "test_scripts.py",
    "test_head_views.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that none of them is at last alone on one core."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE, which takes any text; some merges, so that tokens are not bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END
    )


def small_config(model_type: str, d_vocab: int = 288, **changes: Any) -> PretrainedConfig:
    """The config of a family of SIZES, or (`changes` is then all there is) of any other."""
    return AutoConfig.for_model(
        **{"model_type": model_type, **SIZES.get(model_type, {}), **changes},
        vocab_size=d_vocab,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def random_model(model_type: str, d_vocab: int, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with weights large enough to matter, biases and norms included."""
    config = small_config(model_type, d_vocab, **changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.2)
    return model


def fit_at_once(
    weights: Path,
    parts: Sequence[Part],
    moments: MomentStore,
    settings: FitSettings,
    target: Path,
) -> FittedModel:
    """The stages decompose and fit; the spectra go beside the target."""
    spectra = target.parent / "spectra"
    classification = classify_model(meta_model(load_config(weights)))
    decompose(weights, classification, parts, moments, settings, spectra, CPU)
    return fit(weights, spectra, settings, target, CPU, moments)


MakeDirectory = Callable[..., Path]


@pytest.fixture(scope="session")
def make_directory(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> MakeDirectory:
    """`make_directory(model_type, max_shard_size=, seed=, **config)`: a random model, saved."""

    def make(model_type: str, max_shard_size: str = "1GB", **changes: Any) -> Path:
        directory = tmp_path_factory.mktemp("model")
        model = random_model(model_type, len(tokenizer), **changes)
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def llama_directory(make_directory: MakeDirectory) -> Path:
    """Grouped queries, rotary positions, no biases; not to be changed."""
    return make_directory("llama")


@pytest.fixture(scope="session")
def gpt2_directory(make_directory: MakeDirectory) -> Path:
    """Conv1D, fused q, k and v, biases, tied embeddings; not to be changed."""
    return make_directory("gpt2")


MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="session")
def params() -> Mapping[str, Any]:
    """The repository's params.yaml, but for the method: Basis Sharing."""
    return yaml.safe_load(compose_params(REPOSITORY / "conf", ["fit=basis_sharing"]))


@pytest.fixture(scope="session")
def small_model(
    make_directory: MakeDirectory, tmp_path_factory: pytest.TempPathFactory
) -> MakeSmallModel:
    """`small_model(family, change=, windows=, batch=, labels=, code=, **config)`: a random model to
    which `change` is applied, extracted and calibrated; once for the same arguments. `code` says
    which it is where a test has put other code in place of the family's."""
    made: dict[Hashable, SmallModel] = {}

    def make(
        family: str,
        change: Change | None = None,
        windows: Tensor = WINDOWS,
        batch: int = 8,
        labels: Labels | None = "text",
        code: str = "the family's",
        **config: Any,
    ) -> SmallModel:
        text = tuple(windows.flatten().tolist()), windows.shape, batch, labels
        key = family, code, change, text, repr(sorted(config.items()))
        if key not in made:
            # Whether it is made or was there does not matter to what a test draws later on.
            with torch.random.fork_rng(devices=[]):
                source, target = make_directory(family, **config), tmp_path_factory.mktemp("small")
                if change:
                    model = load_model(source, "float32", CPU)
                    with torch.no_grad():
                        change(model)
                    model.save_pretrained(source)
                extract(find_source(str(source)), target / "weights")
                made[key] = calibrated_model(target / "weights", target, windows, batch, labels)
        return made[key]

    return make


@pytest.fixture(scope="session")
def small_pipeline(
    small_model: MakeSmallModel,
    make_settings: MakeSettings,
    tmp_path_factory: pytest.TempPathFactory,
) -> MakeSmallPipeline:
    """`small_pipeline(family, {"fit.removed": ...}, ...)`: what `small_model` makes of the other
    arguments, decomposed and fitted as told; once for the same arguments."""
    made: dict[Hashable, SmallPipeline] = {}

    def make(
        family: str, changes: Mapping[str, Any] = {}, *arguments: Any, **others: Any
    ) -> SmallPipeline:
        model, settings = small_model(family, *arguments, **others), make_settings(changes)
        key = model.weights, repr(sorted(changes.items()))
        if key not in made:
            target, split = tmp_path_factory.mktemp("pipeline"), settings.split.strategy
            fitted = model.fit(target, settings.fit, split)
            paths = target / "spectra", target / "compressed"
            made[key] = SmallPipeline(model, settings, *paths, fitted)
        return made[key]

    return make


def with_changes(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested mappings with the values at some dotted keys put in."""
    copy = yaml.safe_load(yaml.safe_dump(dict(params)))
    for key, value in changes.items():
        *path, last = key.split(".")
        section = copy
        for step in path:
            section = section[step]
        section[last] = value
    return copy


@pytest.fixture(scope="session")
def make_settings(params: Mapping[str, Any]) -> MakeSettings:
    """`make_settings({"fit.removed": 0.3, ...})`: the defaults with some keys changed."""

    def make(changes: Mapping[str, Any] = {}) -> Settings:
        return parse_settings(with_changes(params, changes), "the test's settings")

    return make


@pytest.fixture(scope="session", autouse=True)
def _no_arguments() -> Iterator[None]:
    """A stage that a test runs in its own process is not given the arguments of pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv[:1])
        yield


RunPython = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """`run_python(code, *arguments, cwd=)`: run a program in a process of its own."""

    def run(code: str, *arguments: object, cwd: Path | None = None) -> Any:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def run_command(directory: Path, *command: str) -> str:
    """What a command prints that has to end well, as git and dvc in a repository of a test."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names = [f"GIT_{who}_{what}" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
    environment = {**os.environ, **dict.fromkeys(names, "a@b.c"), "PATH": path}
    ran = subprocess.run(
        command,
        cwd=directory,
        env={**environment, "DVC_NO_ANALYTICS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path in it."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def n_numbers(directory: Path) -> int:
    """That a compressed directory stores."""
    index = load_index(directory)
    return sum(tensor.numel() for _, tensor in TensorReader(directory, index.files).stream())


@pytest.fixture(autouse=True)
def _determined() -> None:
    torch.manual_seed(0)
