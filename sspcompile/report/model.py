"""The report as one frozen value of plain numbers and text. Every section is optional; what is absent is not shown."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sspcompile.intervals import Estimate
from sspcompile.report.section import Section
from sspcompile.report.speed import LatencySection
from sspcompile.request.rounding import Rounded

SCHEMA_VERSION = 2


class ScenarioSection(Section):
    """`mixture` maps domains to weights, `unknown` is the share that no domain explains, `breadth` is in [0, 1].
    `fits_no_domain`: more is unknown than of a domain's own text may be. `judged`: on how many held-out texts the build
    was judged, the scenario's own and all."""

    name: str
    source: str
    text: str | None = None
    prompts: tuple[str, ...] = ()
    mixture: dict[str, float] = Field(default={})
    unknown: float = 0.0
    fits_no_domain: bool = False
    breadth: float = 0.0
    judged: tuple[int, int] | None = None


class MaskSection(Section):
    """`kept`: per layer the kept query heads, ascending. `scores` and `whitelist` are [layers][heads]. `widths`: per
    layer the kept channels of its MLP, or of each of its `experts`, out of `intermediate`; both None where no channel
    was cut. `removed`: the layers that were removed whole. Their rows are empty, as of those without attention.
    """

    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    kept: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...] | None = None
    whitelist: tuple[tuple[bool, ...], ...] | None = None
    criterion: str
    widths: tuple[int, ...] | None = None
    intermediate: int | None = None
    removed: tuple[int, ...] = ()
    experts: int = 1

    @model_validator(mode="after")
    def _shapes(self) -> MaskSection:
        if self.heads % self.kv_heads:
            raise ValueError("heads is not a multiple of kv_heads")
        for name in ("scores", "whitelist"):
            rows = getattr(self, name)
            if rows is not None and (len(rows) != self.layers or any(len(row) != self.heads for row in rows)):
                raise ValueError(f"{name} is not [layers][heads]")
        if any(not 0 <= layer < self.layers for layer in self.removed):
            raise ValueError("removed does not fit layers")
        if len(self.kept) != self.layers or any(not 0 <= h < self.heads for row in self.kept for h in row):
            raise ValueError("kept does not fit layers and heads")
        if (self.widths is None) != (self.intermediate is None):
            raise ValueError("widths need intermediate, and intermediate needs widths")
        if self.widths is not None and self.intermediate is not None:
            gone = {*self.removed}
            inside = all((n in gone) != (0 < width <= self.intermediate) for n, width in enumerate(self.widths))
            if len(self.widths) != self.layers or not inside:
                raise ValueError("widths do not fit layers and intermediate")
        return self

    @property
    def silent(self) -> tuple[int, ...]:
        """The layers that stay without their attention."""
        return tuple(n for n, row in enumerate(self.kept) if not row and n not in self.removed)


Unit = Literal["heads", "parameters", "memory", "latency"]


class BudgetSection(Section):
    """What was allowed, and what is kept, as shares: of the query heads (`keep_*`), and of all parameters (`size_*`).

    `unit` says what the budget counts; `size_requested` is None where it is not parameters, and reports of earlier
    versions have no `size_achieved`. `params_requested`: the number that it was given as. `memory_*`: bytes of weights
    and KV cache for `batch` sequences of `context` tokens, where those were bounded; `latency_*`: seconds of a decoded
    token with as many in the cache, as foretold. `max_loss`: the bound on the share of next tokens that change hands,
    and `max_perplexity` the one on the perplexity of replies, times the dense model's, where those were the budget;
    `measured` has what masks on the way to it lost on the texts that decide, `(kept, loss)` by share of the unit, and
    `at_most` the upper ends of those losses' intervals, which the bound is for (reports of earlier versions have none,
    and their bound was for the losses); `perplexities` the same two of their replies, where those were bounded.
    """

    keep_requested: float
    keep_achieved: float
    strength: float | None = None
    max_loss: float | None = None
    max_perplexity: float | None = None
    measured: tuple[tuple[float, float], ...] = ()
    at_most: tuple[float, ...] = ()
    perplexities: tuple[tuple[float, float], ...] = ()
    unit: Unit = "heads"
    size_requested: float | None = None
    size_achieved: float | None = None
    params_requested: int | None = None
    memory_requested: int | None = None
    memory_achieved: int | None = None
    latency_requested: float | None = None
    latency_achieved: float | None = None
    context: int | None = None
    batch: int | None = None


Role = Literal["ours", "dense", "random", "domain-free", "criterion", "uniform", "per-layer", "other"]


class QualityRow(Section):
    """One masked or sliced model against the dense one, on held-out prompts of the scenario.

    `mean_kl` in nats per token, `top1_agreement` a share. `kl_above_ours`: its KL minus ours on the same prompts,
    paired, so above 0 is worse than ours; without it only overlapping intervals can be compared. `exact_match`: the
    share of right greedy answers, where answers are known; `answer_perplexity`: that of the scenario's reference
    answers, times the dense model's, and `reply_perplexity` that of what the dense model would write too, where prompts
    have no such answer. `off_kl` and `off_agreement` are the same figures on prompts of domains that the
    scenario is not about.
    """

    name: str
    role: Role = "other"
    mean_kl: Estimate
    top1_agreement: Estimate
    kl_above_ours: Estimate | None = None
    exact_match: Estimate | None = None
    off_kl: Estimate | None = None
    off_agreement: Estimate | None = None
    answer_perplexity: Estimate | None = None
    reply_perplexity: Estimate | None = None


class ProtectedRow(Section):
    """What is not to lose more than `max_loss`, a share of its next tokens. `guard_loss`: on texts that decided;
    `loss`: on `texts` others, which decided nothing.
    """

    domain: str
    max_loss: float
    guard_loss: float
    loss: Estimate
    texts: int

    @property
    def holds(self) -> bool:
        return self.loss.value <= self.max_loss

    @property
    def broken(self) -> bool:
        """Whether it loses more by more than chance."""
        return not self.holds and self.loss.low is not None and self.loss.low > self.max_loss


class LayoutSection(Section):
    """`figures` holds a row per layout that was measured."""

    requested: str
    chosen: str
    figures: tuple[QualityRow, ...] = ()
    reason: str | None = None


class ParitySection(Section):
    """Written files against the masked model: largest logit difference, the scale of the logits, greedy text.

    `dtype`: the numbers that both were computed in; reports of earlier versions do not say that it was fp32.
    """

    max_difference: float
    logit_scale: float
    tolerance: float
    dtype: str = "fp32"
    texts_equal: bool | None = None
    after_repair: bool = False

    @property
    def relative(self) -> float:
        return self.max_difference / self.logit_scale if self.logit_scale else self.max_difference

    @property
    def holds(self) -> bool:
        return self.relative <= self.tolerance and self.texts_equal is not False


class RepairSection(Section):
    """Mean KL in nats per token on held-out prompts, without and with the repair. `used`: whether it was kept."""

    used: bool
    reason: str | None = None
    kl_before: float | None = None
    kl_after: float | None = None


class Pair(Section):
    dense: float
    sliced: float


class SizesSection(Section):
    """Counts and bytes. `prunable_share`: the share of the parameters that belongs to heads; `channel_share`: the share
    that belongs to channels of the MLPs, None where the build could not remove any.
    """

    parameters: Pair
    weight_bytes: Pair
    kv_bytes_per_token: Pair
    prunable_share: float
    channel_share: float | None = None


class RoundingRow(Section):
    """The dense model or the cut, as an export holds it; figures against the dense model as it is stored.

    `precision`: what its matrices are rounded to, in blocks of `block_size` inputs; or, where that is None, what they
    are stored in. `weight_bytes`: of its weights on disk. `mean_kl` in nats per token; `answer_perplexity` and
    `reply_perplexity` (`QualityRow`) times the dense model's. `kl_above_asked`: its KL minus that of the rounded cut
    that was asked for, paired, None for that.
    """

    of: Literal["dense", "cut"]
    precision: str
    block_size: int | None = None
    weight_bytes: int
    mean_kl: Estimate
    top1_agreement: Estimate
    answer_perplexity: Estimate | None = None
    reply_perplexity: Estimate | None = None
    kl_above_asked: Estimate | None = None

    @property
    def changed(self) -> Estimate:
        """The share of next tokens that are others than the dense model's."""
        return self.top1_agreement.rest


class RoundingSection(Section):
    """Cutting against rounding to `precision`, for which the cut was `refitted` or not; `texts` decided nothing."""

    precision: Rounded
    runtime: str
    texts: int
    refitted: bool = False
    rows: tuple[RoundingRow, ...]


class StepTime(Section):
    """Seconds of a decoded token, over rounds in which the models took turns."""

    median: float
    p10: float
    p90: float


class TimedShape(Section):
    """A row of the table: a model of so many `layers` in one shape, `vocabulary` where its head is over all tokens.
    `seconds` of a decoded token as measured, and as the fit has them (`foretold`). Layers that differ in more than
    shape are of another `kind`.
    """

    kind: int
    layers: int
    groups: int
    heads_per_group: int
    width: int
    vocabulary: bool
    seconds: float
    foretold: float


class TokenTimeSection(Section):
    """The bound on the seconds of a decoded token: what was `requested`, what the table foretold, and what `dense` and
    `sliced` took once the cut was written, None where both did not fit into memory together.

    `batch` sequences of `context` tokens are in the cache. `conditions` say where and in what it was measured, `rows`
    what the table is made of, `worst` the largest relative error of its fit.
    """

    requested: float
    foretold: Pair
    dense: StepTime | None = None
    sliced: StepTime | None = None
    context: int
    batch: int
    conditions: dict[str, str]
    worst: float
    rows: tuple[TimedShape, ...]

    @property
    def missed(self) -> bool:
        """Whether the cut took longer than was asked for."""
        return self.sliced is not None and self.sliced.median > self.requested


class RuntimeRow(Section):
    name: str
    loads: bool
    note: str = ""


class Report(Section):
    """Everything that is known about one build. `origin`: fingerprints and seeds of what it was made from."""

    schema_version: Literal[2] = 2
    title: str
    model: str | None = None
    scenario: ScenarioSection | None = None
    mask: MaskSection | None = None
    budget: BudgetSection | None = None
    layout: LayoutSection | None = None
    parity: ParitySection | None = None
    repair: RepairSection | None = None
    quality: tuple[QualityRow, ...] = ()
    protected: tuple[ProtectedRow, ...] = ()
    sizes: SizesSection | None = None
    runtimes: tuple[RuntimeRow, ...] = ()
    latency: LatencySection | None = None
    rounding: RoundingSection | None = None
    token_time: TokenTimeSection | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default={})
    origin: dict[str, str] = Field(default={})
    command: str | None = None
