"""What the last run measured, as tables: python -m sharebasis.summary"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from sharebasis.io.records import read_json
from sharebasis.io.tables import counted
from sharebasis.pipeline.paths import METRICS
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.console import print_tables

FIDELITY = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("KL per token, mean", "kl_mean", "{:.4f} nats"),
    ("KL per token, p99", "kl_p99", "{:.4f} nats"),
    ("top-1 agreement", "top1_agreement", "{:.1%}"),
    ("largest logit difference", "max_abs_logit_diff", "{:.2f}"),
)
"""Title, key and format of what is measured of every compressed model."""


@report_errors
def main() -> None:
    fit = read_json(METRICS / "fit.json")
    verify = read_json(METRICS / "verify.json")
    model = load_settings().model.source
    print_tables(storage_table(fit, model), forms_table(fit), fidelity_table(verify))


def storage_table(fit: dict[str, Any], model: str) -> Table:
    """Numbers before and after, by family.

    Args:
        fit: metrics/fit.json.
        model: whose, for the title.
    """
    table = Table("family", title=f"Stored numbers of {model}, method {fit['method']}")
    for column in ("original", "stored", "removed", "relative loss"):
        table.add_column(column, justify="right")
    for family, row, is_last in _families_and_all(fit):
        table.add_row(
            family,
            f"{row['original_numbers']:,}",
            f"{row['stored_numbers']:,}",
            f"{row['removed_fraction']:.4f}",
            f"{row['relative_loss']:.4f}",
            end_section=is_last,
        )
    total = fit["whole_model"]
    table.caption = (
        f"whole model: {total['original_numbers']:,} -> {total['stored_numbers']:,} numbers, "
        f"{total['removed_fraction']:.4f} removed"
    )
    return table


def forms_table(fit: dict[str, Any]) -> Table:
    """What became of the weights, by family: how many of each structure and form, and ranks.

    Args:
        fit: metrics/fit.json.
    """
    table = Table("family", "structures", "forms", title="Structures and stored forms")
    for column in ("groups", "ranks"):
        table.add_column(column, justify="right")
    for family, row, is_last in _families_and_all(fit):
        table.add_row(
            family,
            counted(row["structures"]),
            counted(row["forms"]),
            str(row["n_groups"]),
            "" if row["min_rank"] is None else f"{row['min_rank']}-{row['max_rank']}",
            end_section=is_last,
        )
    return table


def _families_and_all(fit: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(name, metrics, whether it is the last of the families)."""
    *_, last = families = fit["families"]
    yield from ((family, row, family == last) for family, row in families.items())
    yield "all", fit, False


def fidelity_table(verify: dict[str, Any]) -> Table:
    """How near the compressed models are to the original.

    Args:
        verify: metrics/verify.json.
    """
    models = {
        name: verify[name] for name in ("compressed", "propagated", "recovered") if name in verify
    }
    table = Table("", title=f"Fidelity over {verify['n_predictions']:,} predictions")
    for column in ("original", *models):
        table.add_column(column, justify="right")
    for title, key, shown in FIDELITY:
        original = shown.format(verify["dense"][key]) if key in verify["dense"] else ""
        table.add_row(title, original, *(shown.format(model[key]) for model in models.values()))
    lossless = verify["lossless"]
    table.add_row(
        f"lossless wrap of {lossless['n_modules']} modules",
        "",
        f"{lossless['max_abs_logit_diff']:.1e}",
    )
    return table


if __name__ == "__main__":
    main()
