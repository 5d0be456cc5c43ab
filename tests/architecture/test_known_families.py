"""Every linear sublayer of a small model of every known family."""

import pytest
from conftest import SIZES, small_config
from expected_sublayers import DENSE_FIRST, EXPECTED, llama_like
from selecting import D

from sharebasis.architecture.dims import Dims, dims
from sharebasis.model.classify import classify_model
from sharebasis.model.experts import unstack
from sharebasis.model.explore import linear_modules
from sharebasis.model.hub import meta_model

N_LAYERS = {"gpt_neo": 4, "smollm3": 4}
"""Where it is not 3."""
N_KV_HEADS = {
    **{name: 2 for name, rows in EXPECTED.items() if rows.keys() >= llama_like().keys()},
    "phi3": 2,
    "falcon": 2,
    "falcon, one kv head": 1,
    "gpt_bigcode": 1,
}
"""Where it is not 4."""
D_HEAD = {
    **dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text", "qwen3_moe", "gpt_oss"), 12),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), 4),  # of the part that is rotated
}
"""Where it is not 8."""


def test_every_small_config_is_covered_here():
    assert set(EXPECTED) == set(SIZES)


def expected(name):
    """(layer, path) -> facts and role."""
    return {
        (layer, path): (*facts, role_of(path, facts[-1]))
        for layer in range(N_LAYERS.get(name, 3))
        for sublayers in [EXPECTED[name] if layer else DENSE_FIRST.get(name, EXPECTED[name])]
        for path, facts in sublayers.items()
    }


def role_of(path, category):
    """Only the output of attention has a name here that does not tell."""
    return "write" if path.endswith(".dense") else category.removeprefix("ambiguous_")


@pytest.mark.parametrize("name", SIZES)
def test_every_linear_sublayer_of_a_known_family_is_found_and_understood(name):
    # OPT's narrower embeddings add linear modules outside the blocks
    changes = {"word_embed_proj_dim": 24} if name == "opt" else {}
    model = meta_model(small_config(name, **changes))
    records = classify_model(model).sublayers
    found = {
        (record.layer, record.slot.split("*.")[1]): (
            record.family,
            record.shape,
            record.bias,
            record.category,
            record.role,
        )
        for record in records
    }
    assert found == expected(name)
    not_selected = {record.slot.split("*.")[1] for record in records if not record.selected}
    assert not_selected == ({"mlp.shared_expert_gate"} if name == "qwen2_moe" else set())
    assert {record.type for record in records} == {"Conv1D" if name == "gpt2" else "Linear"}
    unstack(model)
    assert len({record.name for record in records}) == len(records) < len(linear_modules(model))


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_of_a_known_family_are_read_off_its_config(name):
    assert dims(small_config(name)) == Dims(
        d_model=D,
        n_layers=N_LAYERS.get(name, 3),
        n_heads=4,
        n_kv_heads=N_KV_HEADS.get(name, 4),
        d_head=D_HEAD.get(name, 8),
        d_v=6 if name.startswith("deepseek") else None,
    )
