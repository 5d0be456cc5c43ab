"""A structure, a form, a method and a family of this file's own go through the whole pipeline."""

from __future__ import annotations

import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import CORPUS, REPOSITORY, SIZES
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from sharebasis.architecture.families import ARCHITECTURES
from sharebasis.architecture.groups import Group
from sharebasis.architecture.model_family import model_family
from sharebasis.compressed.index import load_index
from sharebasis.compressed.loader import load_compressed, open_compressed
from sharebasis.config.methods import METHODS, Metric
from sharebasis.config.structures import STRUCTURES, StructureEntry
from sharebasis.forms.form import Form, FormModule, RoleTensors, parameter, trained
from sharebasis.forms.table import FORMS
from sharebasis.io.records import read_json
from sharebasis.linalg.objective import Problem
from sharebasis.moments.problems import Problems
from sharebasis.pipeline.compose import compose_params
from sharebasis.structures.curve import Curve
from sharebasis.structures.structure import (
    Built,
    Measured,
    MeasuredCell,
    ModelParts,
    Offer,
    Structure,
    Terms,
    Workshop,
)

# A form: a square weight as a diagonal plus a matrix of rank one


class ArrowModule(FormModule):
    """x -> x ⊙ d + (x · r) l."""

    kind = "arrow"

    def __init__(self, diagonal: Tensor, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.diagonal, self.left, self.right = map(parameter, (diagonal, left, right))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), self.right.shape[1]

    def dense(self) -> Tensor:
        return self.diagonal[0].diag() + self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        return x * self.diagonal[0] + (x @ self.right.T) @ self.left.T


@dataclass(frozen=True, slots=True)
class Arrow(Form):
    """diag(d) + l rᵀ."""

    kind: ClassVar[str] = "arrow"
    diagonal: Tensor
    left: Tensor
    right: Tensor

    @classmethod
    def nearest(cls, weight: Tensor) -> Arrow:
        """By turns: the best rank one beside a diagonal, and the best diagonal beside that."""
        left, right = weight.new_zeros(len(weight), 1), weight.new_zeros(1, len(weight))
        for _ in range(50):
            diagonal = (weight - left @ right).diagonal()
            u, s, vh = torch.linalg.svd(weight - diagonal.diag())
            left, right = u[:, :1] * s[0].sqrt(), vh[:1] * s[0].sqrt()
        return cls(diagonal[None], left, right)

    @classmethod
    def load(cls, tensors: RoleTensors, shapes: Sequence[tuple[int, int]]) -> Arrow:
        (part,) = tensors.parts
        return cls(part["diagonal"], part["left"], part["right"])

    def tensors(self) -> RoleTensors:
        part = {"diagonal": self.diagonal, "left": self.left, "right": self.right}
        return RoleTensors({}, (part,))

    def modules(self) -> Sequence[ArrowModule]:
        return [ArrowModule(self.diagonal, self.left, self.right)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Arrow:
        return Arrow(*map(function, (self.diagonal, self.left, self.right)))

    def refit(self, problems: Sequence[Problem]) -> Arrow:
        return Arrow.nearest(problems[0].weight)

    def trainable(self, edited: bool) -> Arrow:
        return self.map(trained)


# A structure that offers it


class Arrows(Structure):
    """Square weights as arrows."""

    cell_type = Group

    def cells(self, model: ModelParts) -> Iterator[Group]:
        for part in model.parts:
            if part.shape[0] == part.shape[1]:
                yield Group((part,), structure="arrow")

    def measure(self, cell: Group, weights: Sequence[Tensor], problems: Problems) -> Measured:
        problem = problems.of_part(cell.parts[0], weights[0])
        assert problem is not None
        loss = problem.loss(Arrow.nearest(problem.weight).dense()[0])
        return Measured({"loss": torch.tensor([loss], dtype=torch.float64)})

    def offers(self, cells: Sequence[MeasuredCell], terms: Terms) -> Iterator[Offer]:
        for cell in cells:
            (part,) = cell.cell.parts
            n, loss = part.shape[0], terms.weight([part]) * cell.read("loss").item()
            curve = Curve(part.name, np.array([3 * n, n * n]), np.array([loss, np.inf]))
            yield Offer([part], curve.limited(terms.limits[part.name]), cell, [None, None])

    def build(
        self, cell: MeasuredCell, point: None, workshop: Workshop
    ) -> Callable[[], Sequence[Built]]:
        (part,), loss = cell.cell.parts, cell.read("loss").item()
        (weight,) = workshop.weights([part])
        return partial(self._build, cell.cell, weight.double(), loss, workshop.energy(part))

    @staticmethod
    def _build(group: Group, weight: Tensor, loss: float, energy: float) -> Sequence[Built]:
        return [Built(group, Arrow.nearest(weight), group.n_weights, loss, energy)]


# A family


class PlainConfig(LlamaConfig):
    model_type = "plain_test_family"


class PlainForCausalLM(LlamaForCausalLM):
    config_class = PlainConfig


PATHS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
PATHS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
SQUARE = ("q_proj", "o_proj")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    AutoConfig.register(PlainConfig.model_type, PlainConfig)
    AutoModelForCausalLM.register(PlainConfig, PlainForCausalLM)
    with pytest.MonkeyPatch.context() as patch:
        row = model_family("layers", *PATHS, positions="halves")
        patch.setitem(ARCHITECTURES, PlainConfig.model_type, row)
        patch.setitem(
            METHODS, "half_square", Metric(inputs="diagonal", gradients="diagonal", alpha=0.25)
        )
        patch.setitem(STRUCTURES, "arrow", StructureEntry(f"{__name__}:Arrows", "arrow"))
        patch.setitem(FORMS, "arrow", Arrow)
        patch.setitem(sys.modules, __name__, sys.modules[Arrows.__module__])
        yield


def _write_model(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Square weights are nearly arrows, so that these are what the allocation picks."""
    torch.manual_seed(0)
    sizes = {**SIZES["llama"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"hidden_size": 32}
    model = PlainForCausalLM(PlainConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=0))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.split(".")[-2] in SQUARE:
                left, right = torch.randn(len(weight), 1), torch.randn(1, len(weight))
                weight.copy_(0.2 * torch.randn(len(weight)).diag() + 0.05 * left @ right)
            elif weight.ndim > 1:
                weight.normal_(std=0.2)
            weight.add_(1e-4 * torch.randn_like(weight))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


OVERRIDES = """model=local data=files fit=auto fit.method=half_square fit.structures=[private,arrow]
    fit.removed=0.3 data.window=32 data.calibration.windows=12 data.evaluation.windows=3
    sensitivity=probes sensitivity.windows=2 sensitivity.window=16 sensitivity.runs=1
    propagate=regression propagate.windows=8 propagate.held_out=0 propagate.window=16
    recover=distill recover.steps=12 recover.learning_rate=0.1 recover.window=16
    recover.windows=16 recover.held_out=4 recover.look_every=4 recover.dtype=float32
    curve.windows=2 curve.removed=[0.2]
    attribute.windows=2 attribute.window=16 verify.new_tokens=4"""

STAGES = [
    "extract",
    "classify",
    "calibrate",
    "decompose",
    "sensitivity",
    "fit",
    "propagate",
    "recover",
    "verify",
    "curve",
    "vary",
    "attribute",
    "report",
]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Path]:
    """A directory in which all stages have run, each by its own script."""
    directory = tmp_path_factory.mktemp("plug-in")
    _write_model(directory / "model", tokenizer)
    (directory / "train.txt").write_text(CORPUS * 40)
    (directory / "test.txt").write_text(CORPUS[::-1] * 8)
    paths = ["data.calibration.path=train.txt", "data.evaluation.path=test.txt"]
    overrides = [*OVERRIDES.split(), *paths, "model.source=model"]
    (directory / "params.yaml").write_text(compose_params(REPOSITORY / "conf", overrides))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for stage in STAGES:
            script = REPOSITORY / "stages" / f"{stage}.py"
            patch.setattr(sys, "argv", [str(script)])
            runpy.run_path(str(script), run_name="__main__")
        yield directory


def test_what_is_offered_is_picked_and_stored(run: Path) -> None:
    index = load_index(run / "artifacts/compressed")
    arrows = [group for group in index.groups if group.form == "arrow"]
    assert {group.parts[0].sublayer.split(".")[-1] for group in arrows} <= set(SQUARE)
    fitted = read_json(run / "metrics/fit.json")
    assert fitted["forms"]["arrow"] == fitted["structures"]["arrow"] == len(arrows) > 0
    assert fitted["method"] == "half_square"
    assert set(Counter(group.form for group in index.groups)) - {"arrow"} <= {
        "dense",
        "low_rank",
        "interpolative",
    }


def test_what_is_stored_is_loaded_refitted_and_trained(run: Path) -> None:
    tokens = torch.arange(12)[None]
    weights = []
    for name in ("compressed", "propagated", "recovered"):
        loaded = open_compressed(run / "artifacts" / name)
        *_, group = (group for group in loaded.index.groups if group.form == "arrow")
        (linear,) = loaded.linears(group)
        assert linear.form.kind == "arrow"
        weights.append(linear.dense().detach())
        x = torch.randn(3, linear.in_features)
        torch.testing.assert_close(linear(x), x @ weights[-1].T)
        assert load_compressed(run / "artifacts" / name)(tokens).logits.isfinite().all()
    compressed, propagated, recovered = weights
    original = AutoModelForCausalLM.from_pretrained(run / "model")
    weight = original.get_submodule(group.parts[0].sublayer).weight
    assert (compressed - weight).norm() < 1e-2 * weight.norm()
    assert not torch.equal(compressed, propagated)
    assert not torch.equal(propagated, recovered)


def test_what_was_lost_is_measured_and_told(run: Path) -> None:
    verified = read_json(run / "metrics/verify.json")
    assert verified["lossless"]["max_abs_logit_diff"] == 0
    curve = read_json(run / "metrics/curve.json")
    assert curve
    page = (run / "report/index.html").read_text()
    assert "arrow" in page
    assert "half_square" in page
