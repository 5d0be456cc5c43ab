"""What a sublayer does follows from a trace, its shape and its name."""

import pytest
from selecting import D, classified, module

from sharebasis.architecture.roles import evidence_of, expert_slot, family_of, residual_role


@pytest.mark.parametrize(
    ("name", "shape", "role", "evidence"),
    [
        ("h.0.mlp.anything", (D, 48), "write", "shape"),
        ("h.0.mlp.anything", (48, D), "read", "shape"),
        ("h.0.mlp.anything", (48, 64), "neither", "shape"),
        ("h.0.mlp.anything", (48, 48), "neither", "shape"),
        # the shape goes before a name that says the opposite
        ("h.0.attn.q_proj", (D, 48), "write", "shape"),
        ("h.0.attn.o_proj", (48, D), "read", "shape"),
        ("h.0.attn.q_proj", (48, 48), "neither", "shape"),
        ("h.0.attn.o_proj", (D, D), "write", "name"),
        ("h.0.attn.out_proj", (D, D), "write", "name"),
        ("h.0.mlp.down_proj", (D, D), "write", "name"),
        ("o_proj", (D, D), "write", "name"),
        ("h.0.attn.c_proj", (D, D), "write", "name"),
        ("h.0.self_attn.inner.c_proj", (D, D), "write", "name"),
        ("h.0.attn.q_proj", (D, D), "read", "name"),
        ("h.0.attn.k", (D, D), "read", "name"),
        ("h.0.attn.value", (D, D), "read", "name"),
        ("h.0.attn.query_key_value", (D, D), "read", "name"),
        ("h.0.attn.Wqkv", (D, D), "read", "name"),
        ("h.0.mlp.up_proj", (D, D), "read", "name"),
        ("h.0.mlp.fc_in", (D, D), "read", "name"),
        # a name that does not tell stays unknown
        ("h.0.mlp.c_proj", (D, D), "ambiguous_unknown", "none"),
        ("h.0.attn.dense", (D, D), "ambiguous_unknown", "none"),
        ("h.0.mlp.fc_out", (D, D), "ambiguous_unknown", "none"),
        ("h.0.mlp.setup", (D, D), "ambiguous_unknown", "none"),
        ("h.0.q_proj.inner", (D, D), "ambiguous_unknown", "none"),
        # one of a list of experts is called like the list
        ("h.0.mlp.experts.up_proj.3", (D, D), "read", "name"),
        ("h.0.mlp.experts.down_proj.11", (D, D), "write", "name"),
    ],
)
def test_a_role_follows_from_the_shape_and_only_for_a_square_weight_from_the_name(
    name, shape, role, evidence
):
    assert residual_role(name, shape, D) == (role, evidence)
    assert residual_role(name, shape, D, "ambiguous_unknown") == (role, evidence)


@pytest.mark.parametrize("traced", ["read", "write", "neither"])
@pytest.mark.parametrize("name", ["h.0.attn.q_proj", "h.0.attn.o_proj", "h.0.attn.dense"])
@pytest.mark.parametrize("shape", [(D, 48), (48, D), (48, 48), (D, D)])
def test_what_was_seen_goes_before_shape_and_name(name, shape, traced):
    assert residual_role(name, shape, D, traced) == (traced, "trace")
    found = evidence_of(name, shape, D, traced)
    assert next(iter(found)) == "trace"
    without = evidence_of(name, shape, D)
    assert found == {"trace": traced, **without}
    assert list(found)[1:] == list(without)


@pytest.mark.parametrize(
    ("name", "shape", "traced", "says"),
    [
        (
            "h.0.attn.q_proj",
            (48, D),
            "read",
            {"trace": "read", "shape": "read", "name": "read"},
        ),
        ("h.0.attn.o_proj", (48, D), None, {"shape": "read", "name": "write"}),
        ("h.0.attn.o_proj", (D, D), "ambiguous_unknown", {"name": "write"}),
        ("h.0.attn.dense", (D, D), "write", {"trace": "write"}),
        ("h.0.attn.dense", (D, D), None, {}),
    ],
)
def test_evidence_that_says_nothing_is_left_out(name, shape, traced, says):
    assert evidence_of(name, shape, D, traced) == says


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.layers.0.self_attn.q_proj", "q"),
        ("encoder.layer.0.attention.self.key", "k"),
        ("h.0.v", "v"),
        ("h.0.attention.query_key_value", "fused"),
        ("h.0.attn.c_attn", "fused"),
        ("h.0.attn.c_proj", "o"),
        ("h.0.mlp.c_proj", "down"),
        ("h.0.mlp.dense_4h_to_h", "down"),
        ("h.0.mlp.dense_h_to_4h", "up"),
        ("h.0.mlp.gate", "gate"),
        ("h.0.attention.dense", "o"),
        ("h.0.attn.attention.out_proj", "o"),
        ("h.0.mlp.gate_up_proj", "fused"),
        ("h.0.mlp.experts.gate_up_proj.0", "fused"),
        ("h.0.mlp.experts.down_proj.12", "down"),
        ("h.0.mlp.experts.12.down_proj", "down"),
        ("h.0.mlp.my_up_proj", "other"),
        ("h.0.mlp.c_proj.inner", "other"),
    ],
)
def test_a_family_is_read_off_the_end_of_a_name(name, family):
    assert family_of(name) == family


@pytest.mark.parametrize(
    ("name", "expert", "slot"),
    [
        ("model.layers.2.mlp.experts.up_proj.13", 13, "model.layers.2.mlp.experts.up_proj.*"),
        ("model.layers.2.mlp.experts.13.up_proj", 13, "model.layers.2.mlp.experts.*.up_proj"),
        ("model.layers.2.mlp.experts.0", 0, "model.layers.2.mlp.experts.*"),
        ("model.layers.2.mlp.shared_experts.up_proj", None, None),
        ("model.layers.2.mlp.my_experts.3.up_proj", None, None),
        ("model.layers.2.mlp.experts.up_proj", None, None),
        ("model.layers.2.mlp.up_proj", None, None),
    ],
)
def test_the_number_of_an_expert_is_read_off_the_name(name, expert, slot):
    (record,) = classified({"up": ".*"}, modules=[module(name, (48, D))])
    assert (record.expert, record.layer) == (expert, 2)
    assert expert_slot(name) == (slot or name)
    assert expert_slot(name, "4-7") == (slot or name).replace("*", "4-7")
