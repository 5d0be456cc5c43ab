"""What the last run measured, as a table: python -m sharebasis.summary"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from sharebasis.io.records import read_json
from sharebasis.io.tables import counted
from sharebasis.pipeline.paths import METRICS
from sharebasis.pipeline.settings import load_settings
from sharebasis.pipeline.stage import report_errors
from sharebasis.runtime.console import print_tables


@report_errors
def main() -> None:
    fit = read_json(METRICS / "fit.json")
    verify = read_json(METRICS / "verify.json")
    print_tables(_storage(fit, load_settings().model.source), _fidelity(verify))


def _storage(fit: dict[str, Any], model: str) -> Table:
    table = Table(title=f"Stored numbers of {model}, method {fit['method']}")
    for column in ("family", "original", "stored", "removed"):
        table.add_column(column, justify="left" if column == "family" else "right")
    for column in ("forms", "structures"):
        table.add_column(column)
    for column in ("ranks", "relative loss"):
        table.add_column(column, justify="right")
    rows = [*fit["families"].items(), ("all", fit)]
    for name, row in rows:
        table.add_row(
            name,
            f"{row['original_numbers']:,}",
            f"{row['stored_numbers']:,}",
            f"{row['removed_fraction']:.4f}",
            counted(row["forms"]),
            counted(row["structures"]),
            "" if row["min_rank"] is None else f"{row['min_rank']}-{row['max_rank']}",
            f"{row['relative_loss']:.4f}",
            end_section=name == rows[-2][0],
        )
    total = fit["whole_model"]
    table.caption = (
        f"whole model: {total['original_numbers']:,} -> {total['stored_numbers']:,} numbers, "
        f"{total['removed_fraction']:.4f} removed"
    )
    return table


def _fidelity(verify: dict[str, Any]) -> Table:
    lossless = verify["lossless"]
    models = {
        name: verify[name] for name in ("compressed", "propagated", "recovered") if name in verify
    }
    table = Table(title=f"Fidelity over {verify['n_predictions']:,} predictions")
    for column in ("", "original", *models):
        table.add_column(column, justify="right" if column else "left")

    def add(name: str, key: str, shown: str, original: str = "") -> None:
        table.add_row(name, original, *(shown.format(model[key]) for model in models.values()))

    add("perplexity", "perplexity", "{:.2f}", f"{verify['dense']['perplexity']:.2f}")
    add("KL per token, mean", "kl_mean", "{:.4f} nats")
    add("KL per token, p99", "kl_p99", "{:.4f} nats")
    add("top-1 agreement", "top1_agreement", "{:.1%}")
    add("largest logit difference", "max_abs_logit_diff", "{:.2f}")
    table.add_row(
        f"lossless wrap of {lossless['n_modules']} modules",
        "",
        f"{lossless['max_abs_logit_diff']:.1e}",
    )
    return table


if __name__ == "__main__":
    main()
