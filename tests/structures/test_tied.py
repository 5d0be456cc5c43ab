"""Weights that several sublayers share in the original: stored once, counted once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import fit_settings
from conftest import MakeSettings
from small_pipeline import CPU, calibrated_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sharebasis.architecture.parts import split_selected
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.config.fit import FitSettings
from sharebasis.config.types import Labels
from sharebasis.errors import StreamError
from sharebasis.model.classify import classify_model
from sharebasis.model.hub import load_config, load_model, meta_model
from sharebasis.moments.problems import Problems
from sharebasis.moments.store import MomentStore
from sharebasis.residual.cache import run_with_cache
from sharebasis.stages.extract.extract import extract
from sharebasis.stages.extract.sources import find_source
from sharebasis.stages.fit.fit import fit
from sharebasis.stages.fit.metrics import FittedModel, fit_metrics
from sharebasis.stages.recover.outcome import Recovery
from sharebasis.stages.recover.recover import write_recovered
from sharebasis.stages.recover.trainable import named_parameters, trainable

WINDOWS = torch.randint(1, 60, (8, 12), generator=torch.Generator().manual_seed(0))
N_LAYERS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
LINEARS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up")))


class RepeatedConfig(LlamaConfig):
    model_type = "repeated"


class Repeated(LlamaForCausalLM):
    """A Llama whose blocks all use the first one's linears, but for `down`."""

    config_class = RepeatedConfig
    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.embed_tokens.weight",
        **{
            f"model.layers.{i}.{name}.weight": f"model.layers.0.{name}.weight"
            for i in range(1, N_LAYERS)
            for name in LINEARS
        },
    }


class SharedBlockConfig(LlamaConfig):
    model_type = "shared_block"


class SharedBlock(LlamaForCausalLM):
    """A Llama that runs one block over and over."""

    config_class = SharedBlockConfig
    _tied_weights_keys = {  # noqa: RUF012
        f"model.layers.{i}.{name}.weight": f"model.layers.0.{name}.weight"
        for i in range(1, N_LAYERS)
        for name in (*LINEARS, "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList([self.model.layers[0]] * N_LAYERS)


AutoConfig.register("shared_block", SharedBlockConfig)
AutoModelForCausalLM.register(SharedBlockConfig, SharedBlock)
AutoConfig.register("repeated", RepeatedConfig)
AutoModelForCausalLM.register(RepeatedConfig, Repeated)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Repeated(RepeatedConfig(**SIZES))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    target = tmp_path_factory.mktemp("tied")
    model.save_pretrained(target / "source")
    extract(find_source(str(target / "source")), target / "weights")
    return target / "weights"


def _settings(make_settings: MakeSettings) -> FitSettings:
    return make_settings({"fit.method": "svd_llm", "fit.group_size": 1, "fit.shared": []}).fit


def _compress(
    weights: Path, target: Path, settings: FitSettings, gradients: Labels | None = None
) -> FittedModel:
    small = calibrated_model(weights, target, WINDOWS, 4, gradients)
    small.decompose(target / "spectra", settings)
    artefacts = weights, target / "spectra", settings, target / "small"
    return fit(*artefacts, CPU, small.moments)


def test_a_shared_weight_is_recognised_by_its_storage(weights: Path) -> None:
    found = classify_model(meta_model(load_config(weights)))
    assert len(found.sublayers) == N_LAYERS * 7
    for sublayer in found.sublayers:
        path = sublayer.name.split(f"layers.{sublayer.layer}.")[1]
        first = sublayer.layer == 0 or path == "mlp.down_proj"
        assert sublayer.tied_to == (None if first else f"model.layers.0.{path}")


def test_what_is_shared_counts_once_and_is_stored_once(
    weights: Path, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = _settings(make_settings)
    metrics = fit_metrics(_compress(weights, tmp_path, settings), settings)
    dense = load_model(weights, "float32", CPU)
    own = [dense.get_submodule(f"model.layers.0.{name}").weight.numel() for name in LINEARS]
    own += [32 * 48] * N_LAYERS
    assert metrics["original_numbers"] == sum(own)
    small = load_compressed(tmp_path / "small")
    n_dense, n_small = (sum(p.numel() for p in one.parameters()) for one in (dense, small))
    assert metrics["whole_model"]["original_numbers"] == n_dense
    assert metrics["whole_model"]["stored_numbers"] == n_small
    assert metrics["removed_fraction"] == 1 - metrics["stored_numbers"] / sum(own)
    q = [part.form for part in _parts(small, "self_attn.q_proj")]
    assert len({part.basis.data_ptr() for part in q}) == 1
    assert len({part.coefficient.data_ptr() for part in q}) == 1


STRUCTURES = {"factors": ["private"], "entries": ["private", "sparse"]}


@pytest.fixture(params=STRUCTURES)
def two_sided(
    request: pytest.FixtureRequest, weights: Path, make_settings: MakeSettings, tmp_path: Path
) -> Path:
    """A directory compressed by `fit=auto`."""
    settings = fit_settings(make_settings, structures=STRUCTURES[request.param], removed=0.4)
    fitted = _compress(weights, tmp_path, settings, "text")
    if "sparse" in settings.structures:
        assert any(one.form == "masked" for one in fitted.groups)
    return tmp_path / "small"


def _parts(model: nn.Module, name: str) -> list[Any]:
    return [model.get_submodule(f"model.layers.{i}.{name}").parts[0] for i in range(N_LAYERS)]


def test_two_sided_factors_and_entries_are_in_memory_once(two_sided: Path) -> None:
    small = load_compressed(two_sided)
    for name in LINEARS:
        assert len({id(part) for part in _parts(small, name)}) == 1
    assert len({id(part) for part in _parts(small, "mlp.down_proj")}) == N_LAYERS


@torch.no_grad()
def test_what_is_trained_is_so_under_all_names(two_sided: Path, tmp_path: Path) -> None:
    loaded = open_compressed(two_sided, torch.float32)
    small, index = loaded.model, loaded.index
    forms, before = trainable(loaded), small(input_ids=WINDOWS).logits
    for _, parameter in named_parameters(loaded, forms):
        parameter *= 1.2
    logits = small(input_ids=WINDOWS).logits
    assert (logits - before).abs().max() > 1e-2 * before.abs().max()
    write_recovered(tmp_path / "again", two_sided, index, forms, Recovery(0, 0, 0, ()), 10_000)
    again = load_compressed(tmp_path / "again")(input_ids=WINDOWS).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=1e-4 * logits.abs().max().item())


def test_the_fit_weighs_the_gradients_of_all_that_use_it(
    weights: Path, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = fit_settings(make_settings, removed=0.4, damping_gradients=0.0)
    _compress(weights, tmp_path, settings, "text")
    moments = MomentStore(tmp_path / "moments")
    part = split_selected(classify_model(load_model(weights, "float32", CPU)), "none")[0]
    assert part.sublayer.name == "model.layers.0.self_attn.q_proj"
    twins = {part.sublayer.name: tuple(f"model.layers.{i}.self_attn.q_proj" for i in (1, 2))}
    problems = Problems(moments, twins, replace(settings, damping_inputs=0.0), CPU)
    problem = problems.of_part(part, torch.zeros(part.shape))
    assert problem is not None
    assert problem.gradients is not None
    ours = problem.gradients.second
    dense = load_model(weights, "float32", CPU)
    found = torch.zeros_like(ours)

    def gather(gradient: Tensor) -> None:
        rows = gradient.flatten(0, 1).double()
        found.add_(rows.T @ rows)

    def watch(_: nn.Module, __: object, output: Tensor) -> None:
        output.register_hook(gather)

    for i in range(N_LAYERS):
        dense.get_submodule(f"model.layers.{i}.self_attn.q_proj").register_forward_hook(watch)
    dense.requires_grad_(True)
    logits = dense(input_ids=WINDOWS).logits[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, WINDOWS[:, 1:].flatten(), reduction="sum").backward()
    found /= moments.n_tokens
    torch.testing.assert_close(ours, found, rtol=0, atol=1e-4 * found.abs().max().item())


def test_the_fit_weighs_the_inputs_of_all_that_use_it(
    weights: Path, make_settings: MakeSettings, tmp_path: Path
) -> None:
    _compress(weights, tmp_path, _settings(make_settings))
    moments = MomentStore(tmp_path / "moments")
    names = [f"model.layers.{i}.self_attn.o_proj" for i in range(N_LAYERS)]
    total = sum((moments.read(moments.site(name)).total for name in names), torch.zeros(()))
    dense, small = load_model(weights, "float32", CPU), load_compressed(tmp_path / "small")
    weight = dense.get_submodule(names[0]).weight.double()
    part = _parts(small, "self_attn.o_proj")[0].form
    error = (part.coefficient @ part.basis).double() - weight
    loss = _loss(error, total)
    singular = torch.linalg.svdvals(weight @ torch.linalg.cholesky(total))
    best = singular[part.basis.shape[0] :].square().sum().item()
    assert loss == pytest.approx(best, rel=1e-4)
    alone = moments.read(moments.site(names[0])).total
    assert _loss(error, alone) > 1.01 * singular_tail(weight, alone, part.basis.shape[0])


def _loss(error: Tensor, total: Tensor) -> float:
    return torch.trace(error @ total @ error.T).item()


def singular_tail(weight: Tensor, total: Tensor, rank: int) -> float:
    return torch.linalg.svdvals(weight @ torch.linalg.cholesky(total))[rank:].square().sum().item()


def test_a_block_that_runs_several_times_is_one(
    tmp_path: Path, make_settings: MakeSettings
) -> None:
    torch.manual_seed(0)
    model = SharedBlock(SharedBlockConfig(**SIZES))
    model.save_pretrained(tmp_path / "source")
    extract(find_source(str(tmp_path / "source")), tmp_path / "weights")
    settings = _settings(make_settings)
    fitted = _compress(tmp_path / "weights", tmp_path, settings)
    metrics = fit_metrics(fitted, settings)
    small = load_compressed(tmp_path / "small")
    assert metrics["n_groups"] == 7
    n_dense, n_small = (sum(p.numel() for p in one.parameters()) for one in (model, small))
    assert metrics["whole_model"]["original_numbers"] == n_dense
    assert metrics["whole_model"]["stored_numbers"] == n_small
    moments = MomentStore(tmp_path / "moments")
    moment = moments.read(moments.site("model.layers.0.mlp.down_proj"))
    assert moment.n_tokens == N_LAYERS * WINDOWS.numel()
    assert torch.isfinite(small(input_ids=WINDOWS).logits).all()
    with pytest.raises(StreamError, match="3 layers are 1 blocks"):
        run_with_cache(small, WINDOWS)
