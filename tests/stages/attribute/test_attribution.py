"""The error of a compressed model is the sum of its parts, and a planted one is found."""

from __future__ import annotations

import copy
import csv
import io
from functools import cache as remembered
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeDirectory, MakeSettings, fit_at_once, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from sharebasis.residual.head_views import head_views
from sharebasis.stages.attribute.attribution import NORM, UNEMBEDDING, Attribution
from sharebasis.stages.attribute.error_attribution import attribute
from sharebasis.stages.attribute.error_split import MEASURES, costs, depth_costs
from sharebasis.stages.attribute.figures import components_figure, lens_figure
from sharebasis.stages.attribute.tables import attribute_metrics, components_csv, lens_csv, markdown

D_VOCAB = 96
WINDOWS = torch.randint(1, D_VOCAB, (3, 10), generator=torch.Generator().manual_seed(4))
FAMILIES = (
    "llama",
    "gpt2",  # biases, positions
    "gemma2",  # norms after, capped logits
    "granite",  # multipliers of residuals, embeddings and logits
    "cohere",  # side by side, multiplied logits
    "falcon",  # grouped, side by side
    "phi",  # a bias of the unembedding
    "olmo2",
    "mixtral",
    "deepseek_v3",
)


def disturbed(model: PreTrainedModel, pattern: str = "", size: float = 0.1) -> PreTrainedModel:
    """A copy whose weights in blocks are off by a fraction, those that match `pattern`."""
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            inside = any(char.isdigit() for char in name)
            if inside and pattern in name and parameter.ndim > 1:
                parameter.add_(size * parameter.std() * torch.randn_like(parameter))
    return other


@remembered
def models(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    model = random_model(family, D_VOCAB)
    return model, disturbed(model)


@remembered
def attributed(family: str) -> Attribution:
    return attribute(*models(family), WINDOWS, batch=2, lens_predictions=100)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    """(predictions, d_vocab), in float64."""
    return model(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1).double()


def measured(family: str) -> dict[str, float]:
    """The measures by their definitions, from the models' logits alone."""
    model, other = models(family)
    z, z_hat, y = logits_of(model), logits_of(other), WINDOWS[:, 1:].flatten()
    p = z.softmax(-1)
    gain = z.log_softmax(-1) - z_hat.log_softmax(-1)
    cap = getattr(model.config, "final_logit_softcapping", None)
    first = p - functional.one_hot(y, D_VOCAB)
    if cap:
        first = first * (1 - (z / cap) ** 2)
        z, z_hat = (cap * torch.atanh(x / cap) for x in (z, z_hat))
    difference = z_hat - z
    return {
        "kl": (p * gain).sum(-1).mean().item(),
        "loss": (functional.cross_entropy(z_hat if not cap else logits_of(other), y)).item()
        - functional.cross_entropy(z if not cap else logits_of(model), y).item(),
        "loss_first_order": (first * difference).sum(-1).mean().item(),
        "logit_error": difference.var(-1, correction=0).mean().item(),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_sum_to_what_the_logits_say(family: str) -> None:
    found, wanted = attributed(family), measured(family)
    assert found.n_predictions == 27
    for measure in MEASURES:
        parts = sum(one.total(measure) for one in found.components) + found.quadrature[measure]
        size = sum(abs(one.total(measure)) for one in found.components)
        assert found.total[measure] == pytest.approx(wanted[measure], rel=1e-4, abs=1e-6)
        assert parts == pytest.approx(wanted[measure], rel=1e-4, abs=1e-6 + 1e-5 * size)
        assert abs(found.quadrature[measure]) < 0.02 * found.total["kl"]
    assert found.total["kl"] > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_and_mlp_is_there_once(family: str) -> None:
    found = attributed(family)
    labels = [one.label for one in found.components]
    assert len(set(labels)) == len(labels)
    assert {f"L{i}H{h}" for i in range(3) for h in range(4)} <= set(labels)
    assert {f"L{i} MLP" for i in range(3)} <= set(labels)
    by_label = {one.label: one for one in found.components}
    assert set(by_label[NORM].own_error.values()) == {0.0}
    for value in by_label[UNEMBEDDING].own_error.values():  # nobody has changed it
        assert abs(value) < 1e-4
    # What goes into the first layer is the same for both.
    for h in range(4):
        assert abs(by_label[f"L0H{h}"].inherited_error["kl"]) < 1e-5


def test_a_model_compared_with_itself_has_no_error() -> None:
    model = models("llama")[0]
    found = attribute(model, copy.deepcopy(model), WINDOWS)
    for one in found.components:
        for measure in MEASURES:
            assert abs(one.own_error[measure]) + abs(one.inherited_error[measure]) < 1e-5
    assert abs(found.total["kl"]) < 1e-6
    for depth in found.lens:
        assert depth.loss == pytest.approx(depth.compressed_loss)
        assert depth.kl == pytest.approx(depth.compressed_kl)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_a_head_that_was_broken_is_the_only_one_that_makes_errors(family: str) -> None:
    model = models(family)[0]
    broken = copy.deepcopy(model)
    with torch.no_grad():
        w_o = head_views(broken)[1].W_O
        w_o[2] *= -1
    found = attribute(model, broken, WINDOWS)
    assert found.ranked("kl")[0].label == "L1H2" or family == "gemma2"
    made = {one.label: abs(one.own_error["logit_error"]) for one in found.components}
    # Gemma norms what its heads add together: one that is wrong makes all of them too large.
    culprits = {f"L1H{h}" for h in range(4)} if family == "gemma2" else {"L1H2"}
    assert {label for label, size in made.items() if size > 1e-4} <= culprits
    assert max(made, key=lambda label: made[label]) == "L1H2"
    for one in found.components:
        if (one.layer == 2 and "bias" not in one.label) or one.label == "L1 MLP":
            assert abs(one.own_error["logit_error"]) < 1e-4
            if family != "falcon" or one.layer == 2:
                assert abs(one.inherited_error["logit_error"]) > 1e-4
    assert sum(one.total("kl") for one in found.components) == pytest.approx(
        found.total["kl"] - found.quadrature["kl"], rel=1e-4
    )


def test_an_mlp_that_was_broken_is_found() -> None:
    model = models("gpt2")[0]
    found = attribute(model, disturbed(model, "h.2.mlp", 0.5), WINDOWS)
    assert found.ranked("kl")[0].label == "L2 MLP"
    made = sum(one.own_error["kl"] for one in found.components)
    passed = {one.label: one.inherited_error["kl"] for one in found.components}
    # Nothing comes after it but the last norm.
    assert made + passed.pop(NORM) == pytest.approx(found.total["kl"], rel=1e-3)
    assert max(map(abs, passed.values())) < 1e-5


def test_an_unembedding_that_was_changed_answers_for_it() -> None:
    model = random_model("llama", D_VOCAB, tie_word_embeddings=False)
    other = copy.deepcopy(model)
    unembedding: Any = other.get_output_embeddings()
    with torch.no_grad():
        unembedding.weight.add_(0.02 * torch.randn_like(unembedding.weight))
        other.get_submodule("model.norm").weight.mul_(1.1)  # type: ignore[operator]
    found = attribute(model, other, WINDOWS)
    made = {one.label: one.own_error["kl"] for one in found.components}
    whole = made.pop(UNEMBEDDING)
    assert whole == pytest.approx(found.total["kl"] - found.quadrature["kl"], rel=1e-3)
    assert max(map(abs, made.values())) < 1e-6


def test_a_lens_of_less_than_a_prediction_a_batch_has_one_of_each() -> None:
    found = attribute(*models("llama"), WINDOWS, batch=1, lens_predictions=1)
    assert found.n_lens_predictions == len(WINDOWS)


def test_batches_add_up() -> None:
    one = attribute(*models("llama"), WINDOWS, batch=1, lens_predictions=100)
    for a, b in zip(one.components, attributed("llama").components, strict=True):
        assert a.label == b.label
        for measure in MEASURES:
            assert a.total(measure) == pytest.approx(b.total(measure), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_lens_ends_with_the_models_own_loss(family: str) -> None:
    found, wanted = attributed(family), measured(family)
    assert [depth.layer for depth in found.lens] == [0, 1, 2, 3]
    assert found.n_lens_predictions == 27
    last = found.lens[-1]
    y = WINDOWS[:, 1:].flatten()
    loss = functional.cross_entropy(logits_of(models(family)[0]), y).item()
    assert last.loss == pytest.approx(loss, rel=1e-5)
    assert last.compressed_loss - last.loss == pytest.approx(wanted["loss"], rel=1e-3, abs=1e-5)
    assert last.kl == pytest.approx(0, abs=1e-5)
    assert last.compressed_kl == pytest.approx(wanted["kl"], rel=1e-3)
    assert all(depth.kl > 0.01 for depth in found.lens[:-1])


def test_a_compressed_model_is_split_too(
    make_directory: MakeDirectory, make_settings: MakeSettings, tmp_path: Path
) -> None:
    from sharebasis.architecture.parts import split_selected
    from sharebasis.compressed.loader import load_compressed
    from sharebasis.model.classify import classify_model
    from sharebasis.model.hub import load_model
    from sharebasis.moments.store import MomentStore, write_moments
    from sharebasis.stages.extract.extract import extract
    from sharebasis.stages.extract.sources import find_source

    weights = tmp_path / "weights"
    extract(find_source(str(make_directory("mixtral"))), weights)
    model = load_model(weights, "float32", torch.device("cpu"))
    write_moments(tmp_path / "moments", (), {})
    svd = make_settings({"fit.method": "svd", "fit.group_size": 1, "fit.shared": []}).fit
    parts = split_selected(classify_model(model), "heads")
    fit_at_once(weights, parts, MomentStore(tmp_path / "moments"), svd, tmp_path / "small")
    found = attribute(model, load_compressed(tmp_path / "small"), WINDOWS)
    parts_ = sum(one.total("kl") for one in found.components)
    assert parts_ == pytest.approx(found.total["kl"] - found.quadrature["kl"], rel=1e-3)
    assert found.total["kl"] > 0.01


# The arithmetic


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(0.01, 3), st.sampled_from([None, 5.0, 30.0]), st.integers(0))
def test_costs_are_what_they_are_called(
    d_vocab: int, size: float, cap: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    raw, error = (torch.randn(7, d_vocab, generator=generator) for _ in range(2))
    y = torch.randint(d_vocab, (7,), generator=generator)
    w_u = torch.randn(3, d_vocab, generator=generator)
    found = costs(raw, raw + size * error, y, w_u, cap=cap)

    def seen(x: Tensor) -> Tensor:
        x = x.double()
        return x if cap is None else cap * torch.tanh(x / cap)

    z, z_hat = seen(raw), seen(raw + size * error)
    p = z.softmax(-1)
    kl = functional.kl_div(z_hat.log_softmax(-1), p, reduction="none").sum(-1)
    loss = functional.cross_entropy(z_hat, y, reduction="none") - functional.cross_entropy(
        z, y, reduction="none"
    )
    for i, wanted in ((0, kl), (1, loss)):
        torch.testing.assert_close(found.total[i].double(), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.linear[i].double(), wanted, rtol=2e-2, atol=2e-3)
    x = raw.double().requires_grad_()
    functional.cross_entropy(seen(x), y, reduction="sum").backward()
    gradient = x.grad
    assert gradient is not None
    torch.testing.assert_close(
        found.directions[2].double(), gradient @ w_u.double().T, rtol=1e-4, atol=1e-4
    )
    assert torch.all(found.linear[3] >= -1e-6)


def test_the_quadrature_is_nearly_exact_where_errors_are_small() -> None:
    raw, y = torch.randn(50, 40), torch.randint(40, (50,))
    found = costs(raw, raw + 0.1 * torch.randn(50, 40), y, torch.randn(3, 40))
    torch.testing.assert_close(found.linear, found.total, rtol=1e-4, atol=1e-6)


def test_depth_costs_are_cross_entropies() -> None:
    logits, y = torch.randn(9, 20), torch.randint(20, (9,))
    final = torch.randn(9, 20).softmax(-1)
    loss, cross = depth_costs(logits, final, y)
    assert loss == pytest.approx(functional.cross_entropy(logits, y, reduction="sum").item())
    wanted = functional.cross_entropy(logits, final, reduction="sum").item()
    assert cross == pytest.approx(wanted, rel=1e-5)


# Tables and figures


def test_the_table_of_components_holds_all_of_them(tmp_path: Path) -> None:
    found = attributed("gpt2")
    rows = list(csv.DictReader(io.StringIO(components_csv(found))))
    assert {row["component"] for row in rows} == {one.label for one in found.components}
    made = [float(row["own_error_kl"]) for row in rows]
    assert made == sorted(made, reverse=True)
    total = sum(
        float(row[f"{part}_kl"]) for row in rows for part in ("own_error", "inherited_error")
    )
    assert total == pytest.approx(found.total["kl"] - found.quadrature["kl"], rel=1e-4)
    depths = list(csv.DictReader(io.StringIO(lens_csv(found))))
    assert [row["layer"] for row in depths] == ["0", "1", "2", "3"]
    assert float(depths[3]["compressed_kl"]) == found.lens[3].compressed_kl


def test_the_ranking_names_the_worst_and_sums_the_rest() -> None:
    found = attributed("llama")
    lines = markdown(found, 3).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    body = cells[2:]
    assert [row[0] for row in body[:3]] == [one.label for one in found.ranked("kl")[:3]]
    assert [row[0] for row in body[3:]] == ["15 others", "sum", "measured"]
    for column in (1, 3, 5):
        named = sum(float(row[column]) for row in body[:4])
        assert named == pytest.approx(float(body[4][column]), abs=0.03)
    assert float(body[4][1]) + float(body[4][2]) == pytest.approx(float(body[5][1]), abs=0.03)


def test_metrics_are_sums_over_components() -> None:
    found = attributed("gpt2")
    metrics = attribute_metrics(found, 2)
    assert list(metrics["worst_own_kl"]) == [one.label for one in found.ranked("kl")[:2]]
    for measure in MEASURES:
        whole = metrics[measure].pop("total")
        size = sum(map(abs, metrics[measure].values()))
        assert sum(metrics[measure].values()) == pytest.approx(whole, abs=1e-5 * size + 1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_figures_are_drawn(family: str, tmp_path: Path) -> None:
    """That nothing overlaps is for eyes; that colours mean what the data say is not."""
    found = attributed(family)
    figure = components_figure(found, "recovered")
    assert "KL(original ‖ recovered)" in figure.get_suptitle()
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title().split("\n")[0] for axes in panels] == [
        "own error",
        "",
        "inherited error",
        "",
    ]
    heads = {(one.layer, one.head): one for one in found.components if one.head is not None}
    for axes, part in ((panels[0], "own_error"), (panels[2], "inherited_error")):
        shown = axes.images[0].get_array()
        assert shown is not None
        for (layer, head), one in heads.items():
            assert shown[layer, head] == pytest.approx(1e3 * getattr(one, part)["kl"])
    limits = {axes.images[0].get_clim() for axes in panels[::2]}
    assert len(limits) == 1
    figure.savefig(tmp_path / "components.png")
    lens = lens_figure(found, "recovered")
    assert "recovered model" in lens.get_suptitle()
    lens.savefig(tmp_path / "lens.png")
    assert all(
        (tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("components", "lens")
    )
