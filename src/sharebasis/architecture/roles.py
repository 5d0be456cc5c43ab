"""What a linear sublayer does to the residual stream, by its shape and by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from sharebasis.config.types import Family

Role = Literal["read", "write", "neither", "ambiguous_unknown"]
Evidence = Literal["trace", "shape", "name", "none"]

FAMILIES: tuple[Family, ...] = ("q", "k", "v", "o", "gate", "up", "down")
"""Those that say what a sublayer computes, in the order in which a block does."""

# The names follow the reference behaviour and are deliberately narrow, because a wrong role
# is worse than an unknown one.
_WRITE_NAME = re.compile(r"(^|\.)(o_proj|out_proj|down_proj|d_proj)$|attn[^.]*\.(.*\.)?c_proj$")
_READ_NAME = re.compile(
    r"(^|[._])(q|k|v|qkv|query|key|value|query_key_value|wqkv|up|gate|in)(_proj)?$", re.IGNORECASE
)
EXPERT = re.compile(r"(?<=\.experts\.)((?:[a-z]\w*\.)?)(\d+)(?=\.|$)")
"""The number of an expert, in `experts.3.up_proj` or `experts.up_proj.3`."""

_FAMILY_BY_NAME: tuple[tuple[re.Pattern[str], Family], ...] = (
    (re.compile(r"(^|\.)(q_proj|q_b_proj|q|query|q_lin)$"), "q"),
    (re.compile(r"(^|\.)(k_proj|k|key|k_lin)$"), "k"),
    (re.compile(r"(^|\.)(v_proj|v|value|v_lin)$"), "v"),
    (
        re.compile(r"(^|\.)(c_attn|qkv|qkv_proj|query_key_value|Wqkv|kv_b_proj|gate_up_proj)$"),
        "fused",
    ),
    (re.compile(r"att[^.]*\.(.*\.)?(o_proj|out_proj|c_proj|dense)$"), "o"),
    (re.compile(r"(^|\.)(gate_proj|gate)$"), "gate"),
    (re.compile(r"(^|\.)(up_proj|c_fc|fc1|fc_in|dense_h_to_4h)$"), "up"),
    (re.compile(r"(^|\.)(down_proj|fc2|fc_out|dense_4h_to_h)$|mlp\.c_proj$"), "down"),
)


def role_by_shape(shape: tuple[int, int], d_model: int) -> Role | None:
    """What the shape (d_out, d_in) tells; None for a square weight of width d_model."""
    match shape[0] == d_model, shape[1] == d_model:
        case True, False:
            return "write"
        case False, True:
            return "read"
        case False, False:
            return "neither"
    return None


def role_by_name(name: str) -> Role | None:
    """What the HF name tells; None where it is none of the well-known ones."""
    name = _without_expert(name)
    if _WRITE_NAME.search(name):
        return "write"
    return "read" if _READ_NAME.search(name) else None


def residual_role(
    name: str, shape: tuple[int, int], d_model: int, traced: Role | None = None
) -> tuple[Role, Evidence]:
    """Decide what a linear sublayer does to the residual stream, and say by what.

    Args: as of `evidence_of`.
    """
    for evidence, role in evidence_of(name, shape, d_model, traced).items():
        return role, evidence
    return "ambiguous_unknown", "none"


def evidence_of(
    name: str, shape: tuple[int, int], d_model: int, traced: Role | None = None
) -> Mapping[Evidence, Role]:
    """What each kind of evidence says, the strongest first; those that say nothing are left out.

    Args:
        name: HF name of the module.
        shape: (d_out, d_in).
        d_model: width of the residual stream.
        traced: what running the model showed; None or ambiguous_unknown: nothing.
    """
    by_trace = None if traced == "ambiguous_unknown" else traced
    by_evidence: Mapping[Evidence, Role | None] = {
        "trace": by_trace,
        "shape": role_by_shape(shape, d_model),
        "name": role_by_name(name),
    }
    return {evidence: role for evidence, role in by_evidence.items() if role}


def family_of(name: str) -> Family:
    """Read off a module's HF name what it computes; `other` where the name does not tell."""
    name = _without_expert(name)
    return next((family for pattern, family in _FAMILY_BY_NAME if pattern.search(name)), "other")


def _without_expert(name: str) -> str:
    """`experts.up_proj.3` -> `experts.up_proj`; `experts.3.up_proj` stays."""
    return re.sub(r"\.\d+$", "", name)


def expert_slot(name: str, number: str = "*") -> str:
    """A name or slot with `number` for that of the expert; the same where there is none."""
    return EXPERT.sub(lambda match: match[1] + number, name)
