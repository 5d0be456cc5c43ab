"""Every family of families.yaml, from the hub's format to a compressed model and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import SIZES, MakeDirectory, MakeSettings, rows_left
from safetensors.torch import load_file
from small_pipeline import CPU, SmallModel, calibrated_model, pruned
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.parts import Part, rows_by_sublayer, split_selected
from sharebasis.architecture.sublayers import Classification
from sharebasis.compressed.edits import PrunedNeurons
from sharebasis.compressed.index import load_index
from sharebasis.compressed.loader import load_compressed
from sharebasis.forms.split_linear import SplitLinear
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.metrics import fit_metrics
from sharebasis.stages.verify.verify import lossless_difference

STRATEGIES = ("none", "qkv", "heads")
AUTO = {
    "fit.method": "auto",
    "fit.group_size": 1,
    "fit.shared": [],
    "fit.structures": ["private", "neurons"],
    "fit.two_sided": True,
    "fit.damping_gradients": 0.05,
    "fit.allocation": "global",
    "fit.storage": "interpolative",
}


def _windows(seed: int = 0) -> Tensor:
    return torch.randint(1, 280, (12, 16), generator=torch.Generator().manual_seed(seed))


def test_every_family_of_the_table_is_here() -> None:
    assert {sizes.get("model_type", name) for name, sizes in SIZES.items()} == set(ARCHITECTURES)


@pytest.fixture(scope="module", params=SIZES)
def weights(
    request: pytest.FixtureRequest,
    make_directory: MakeDirectory,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """artifacts/weights of a family; not to be changed."""
    target = tmp_path_factory.mktemp("family") / "weights"
    extract(find_source(str(make_directory(request.param))), target)
    return target


@pytest.fixture(scope="module")
def found(weights: Path) -> Classification:
    """The sublayers of a family."""
    return classify_model(meta_model(load_config(weights)))


@pytest.fixture(scope="module")
def small(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A family with what its sublayers were given, and the gradients of what they gave."""
    return calibrated_model(weights, tmp_path_factory.mktemp("calibration"), _windows(), 4)


def _parts(found: Classification, strategy: str) -> Sequence[Part]:
    """The parts of a split; the test is left out where it would be that of the whole weights."""
    parts = split_selected(found, strategy)  # type: ignore[arg-type]
    fused = any(sublayer.family == "fused" for sublayer in found.selected)
    if strategy == "qkv" and not fused:
        assert parts == split_selected(found, "none")
        pytest.skip("no weight is fused: qkv is none")
    return parts


def test_every_sublayer_of_a_block_has_a_role_that_was_seen(
    weights: Path, found: Classification
) -> None:
    assert {sublayer.evidence for sublayer in found.sublayers} == {"trace"}
    assert not [sublayer.name for sublayer in found.sublayers if sublayer.disagreement]
    roles = Counter(sublayer.role for sublayer in found.sublayers)
    assert roles.keys() <= {"read", "write", "neither"}
    assert roles.keys() >= {"read", "write"}
    assert found == classify_model(load_model(weights, "float32", CPU))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_wrap_alone_changes_nothing(
    weights: Path, found: Classification, strategy: str
) -> None:
    parts = _parts(found, strategy)
    model = load_model(weights, "float32", CPU)
    rows = rows_by_sublayer(parts)
    before = model(input_ids=_windows()).logits
    assert lossless_difference(model, rows, _windows()) <= 2e-5 * before.abs().max().item()
    assert torch.equal(model(input_ids=_windows()).logits, before)


@torch.no_grad()
def _with_products(
    dense: PreTrainedModel, small: PreTrainedModel, mlps: Sequence[PrunedNeurons]
) -> PreTrainedModel:
    """The dense model with the weights that a compressed one's factors stand for.

    Neurons that are not there any more are there, but down does not read them.
    """
    unstack(dense)
    kept = {name: mlp.kept for mlp in mlps for name in mlp.reads}
    columns = {mlp.down: list(mlp.kept) for mlp in mlps}
    for name, split in small.named_modules():
        if isinstance(split, SplitLinear):
            module = dense.get_submodule(name)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            if name in kept:
                weight[rows_left(name, len(weight), kept[name])] = split.weight
            elif name in columns:
                weight.zero_()[:, columns[name]] = split.weight
            else:
                weight.copy_(split.weight)
    return dense


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_compressed_and_loads(
    weights: Path,
    found: Classification,
    small: SmallModel,
    strategy: str,
    make_settings: MakeSettings,
    tmp_path: Path,
) -> None:
    _parts(found, strategy)
    settings = make_settings(AUTO).fit
    fitted = small.fit(tmp_path, settings, strategy)
    compressed = load_compressed(tmp_path / "compressed")
    mlps = pruned(load_index(tmp_path / "compressed"))
    torch.testing.assert_close(
        compressed(input_ids=_windows(1)).logits,
        _with_products(small.load(), compressed, mlps)(input_ids=_windows(1)).logits,
        rtol=0,
        atol=2e-4,
    )
    metrics = fit_metrics(fitted, settings)
    assert 0.2 - 1e-12 <= metrics["removed_fraction"] < 0.25  # 1 - 0.8 is not 0.2 in binary
    files = (tmp_path / "compressed").glob("*.safetensors")
    stored = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert metrics["whole_model"]["stored_numbers"] == stored
    assert metrics["whole_model"]["original_numbers"] == _numbers(meta_model(load_config(weights)))


def _numbers(model: PreTrainedModel) -> int:
    """Numbers in a model's state; those under two names count once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in tensors.values())
