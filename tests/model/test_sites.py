"""Sublayers that read the same tensor share a site."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrating import WINDOWS, load, selected_of
from conftest import MakeDirectory
from torch import Tensor, nn

from sharebasis.model.sites import Site, find_sites
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source


@pytest.fixture(scope="module")
def llama(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/weights of the llama."""
    weights = tmp_path_factory.mktemp("artifacts") / "weights"
    extract(find_source(str(llama_directory)), weights)
    return weights


def _sites(directory: Path) -> tuple[Site, ...]:
    model = load(directory)
    names = [sublayer.name for sublayer in selected_of(directory)]
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
    model = load(llama)
    names = [sublayer.name for sublayer in selected_of(llama)]

    def fail() -> None:
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        find_sites(model, names, fail)
    find_sites(model, names, lambda: model(input_ids=WINDOWS[:1]))
    assert not any(module._forward_pre_hooks for module in model.modules())
