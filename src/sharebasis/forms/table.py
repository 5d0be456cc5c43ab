"""All forms, a line each."""

from __future__ import annotations

from collections.abc import Mapping

from sharebasis.config.types import Storage
from sharebasis.forms.dense import Dense
from sharebasis.forms.fixed_columns import FixedColumns
from sharebasis.forms.form import Form
from sharebasis.forms.interpolative import Interpolative
from sharebasis.forms.low_rank import LowRank
from sharebasis.forms.masked import Masked

FORMS: dict[str, type[Form]] = {
    Dense.kind: Dense,
    LowRank.kind: LowRank,
    Interpolative.kind: Interpolative,
    Masked.kind: Masked,
    FixedColumns.kind: FixedColumns,
}
"""By what `sharebasis.json` calls them. Another one is a file in this folder and a line here."""

LOW_RANK_FORMS: Mapping[Storage, type[LowRank] | type[Interpolative]] = {
    "plain": LowRank,
    "interpolative": Interpolative,
}
"""By `fit.storage`."""


def packed(form: Form, storage: Storage) -> Form:
    """The form in which a group is stored; what is no product of factors stays as it is."""
    return LOW_RANK_FORMS[storage].of(form) if isinstance(form, LowRank) else form
