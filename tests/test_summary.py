"""The tables of the last run against metrics files made up for the purpose."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from sharebasis.summary import fidelity_table, forms_table, storage_table


def _text(table: Table) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return " ".join(capture.get().split())


def _fitted(**changes: Any) -> dict[str, Any]:
    return {
        "original_numbers": 1000,
        "stored_numbers": 800,
        "removed_fraction": 0.2,
        "n_groups": 5,
        "forms": {"of_tomorrow": 2, "dense": 3},
        "structures": {"private": 5},
        "min_rank": None,
        "max_rank": None,
        "relative_loss": 0.25,
    } | changes


def test_whatever_is_counted_is_shown_and_the_model_is_named() -> None:
    families = {"q": _fitted(), "up": _fitted(min_rank=3, max_rank=7, forms={"grown": 1})}
    fit = _fitted(method="auto", families=families, whole_model=_fitted(stored_numbers=4321))
    storage = _text(storage_table(fit, "org/model"))
    assert "Stored numbers of org/model, method auto" in storage
    assert "1,000 -> 4,321 numbers" in storage
    forms = _text(forms_table(fit))
    assert "│ q │ 5 private │ 3 dense, 2 of_tomorrow │ 5 │ │" in forms
    assert "│ up │ 5 private │ 1 grown │ 5 │ 3-7 │" in forms


def test_every_model_that_was_measured_has_a_column() -> None:
    measured = {"perplexity": 31.5, "kl_mean": 0.25, "kl_p99": 1.5, "top1_agreement": 0.875}
    measured["max_abs_logit_diff"] = 4.0
    lossless = {"n_modules": 21, "max_abs_logit_diff": 0.0}
    verify = {"n_predictions": 1234, "dense": {"perplexity": 30.0}, "lossless": lossless}
    table = _text(fidelity_table(verify | {"compressed": measured, "recovered": measured}))
    assert "Fidelity over 1,234 predictions" in table
    assert "original ┃ compressed ┃ recovered" in table
    assert "│ perplexity │ 30.00 │ 31.50 │ 31.50 │" in table
    assert "│ top-1 agreement │ │ 87.5% │ 87.5% │" in table
