"""The table of criteria: what each one is, where it comes from, what it costs. No torch here.

All criteria share one signature, `measure(loaded, given)`: a score per layer and unit (query head or key/value group),
larger = more needed, never negative. What comes back is

* `per = "prompt"`: [N, L, U], one value per prompt; where every domain's axis gives its own value (`per_axis`),
  [N, L, U, K]. A row depends on its own batch alone, so that batches can be measured apart;
* `per = "set"`: [L, U], one value for all prompts of the given together.

`measuring.measure` turns either into scores of heads per domain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from sspcompile.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from sspcompile.criteria.units import CriterionInput
    from sspcompile.model.decoder import LoadedModel
    from sspcompile.request.options import Granularity

Needs = Literal["nothing", "prompts", "prompts, a backward pass", "prompts, probe directions"]


@dataclass(frozen=True)
class Passes:
    """Passes through the model, counted in passes over one prompt; parts of a pass count as such."""

    forward: float
    backward: float = 0.0

    def times(self, prompts: int) -> Passes:
        return Passes(self.forward * prompts, self.backward * prompts)


@dataclass(frozen=True)
class Criterion:
    """One kind of score.

    `source`: paper, arXiv number and section of the formula. `adaptation`: how it was brought to attention heads.
    `per_prompt(units)`: passes per prompt for a model of `units` heads (or groups) in all. `max_prompts` bounds the
    prompts per domain where the cost asks for it. `place`: module of this package and function in it.
    """

    name: str
    summary: str
    source: str
    adaptation: str
    cost: str
    place: str
    needs: Needs = "prompts"
    per_prompt: Callable[[int], Passes] = lambda _units: Passes(1)
    per: Literal["prompt", "set"] = "set"
    per_axis: bool = False
    max_prompts: int | None = None

    def passes(self, units: int, prompts: int) -> Passes:
        """Passes over single prompts that `prompts` of one domain cost, after `max_prompts` has had its say."""
        return self.per_prompt(units).times(min(prompts, self.max_prompts or prompts))

    def measure(self, loaded: LoadedModel, given: CriterionInput) -> np.ndarray:
        """Float64, shaped as the module's docstring says."""
        module, function = self.place.split(".")
        return getattr(import_module(f"sspcompile.criteria.{module}"), function)(loaded, given)


def criterion(name: str) -> Criterion:
    """The entry of the table. Raises InputError that lists the names."""
    if name not in CRITERIA:
        raise InputError(
            f"Unknown criterion {name!r}.",
            hint=f"Accepted: {', '.join(CRITERIA)}. `sspcompile criteria` describes them.",
        )
    return CRITERIA[name]


def key_of(name: str, granularity: Granularity) -> str:
    """Under which name scores are cached: those of heads by the criterion's own, others with the unit behind it."""
    return name if granularity == "head" else f"{name}.{granularity}"


def of_key(key: str) -> tuple[Criterion, Granularity]:
    """Criterion and granularity of a cached score. Raises InputError that lists what there is."""
    name, _, unit = key.partition(".")
    if unit not in ("", "group"):
        raise InputError(f"Unknown granularity {unit!r}.", hint=f"Accepted: {name}, {name}.group.")
    return criterion(name), "group" if unit else "head"


# The methods' own constants, repeated because their modules import torch; a test holds the two together.
_FISHER_DRAWS, _ROUND_DRAWS, _FISHER_ROUNDS = 1, 4, 4
_MICHEL = "Michel et al., arXiv 1905.10650"
_SUBSPACE = "SubspacePath Pruner, ICML 2026, head importance"
_O_PROJ = "summed over a head's columns of o_proj"


def _bonsai_passes(units: int) -> Passes:
    return Passes(1 + min(1024, max(32, 4 * units)))


def _greedy_kl_passes(units: int) -> Passes:
    """At most: half a pass per unit at first, then per unit one pass, and half a pass for each of 16 candidates."""
    steps = min(units, 256)
    window = max(16, 2 * -(-units // 256))
    return Passes(1 + 0.5 * units + units + 0.5 * steps * min(window, units))


_ALL = (
    Criterion(
        "fisher",
        "squared gradient of the model's own next-token log-likelihood with respect to a gate on each head",
        f"second-order expansion of kl; gates on heads as in {_MICHEL}, section 4",
        "one gate per head, or one per group",
        "2 forward passes and a backward one",
        "fisher.normal",
        "prompts, a backward pass",
        lambda _: Passes(1 + _FISHER_DRAWS, _FISHER_DRAWS),
        per="prompt",
    ),
    Criterion(
        "obs",
        "cost of removing the head after the best change of what stays, by the curvature of the model's own prediction",
        "optimal brain surgeon (Hassibi and Stork 1993) with Kronecker-factored Fisher information (Martens and "
        "Grosse, arXiv 1503.05671); whole structures as in ZipLM, arXiv 2302.04089",
        "the columns of o_proj of a head are removed together, the cheapest head of the layer first; score = cost then",
        "2 forward passes and a backward one",
        "curvature.compensated",
        "prompts, a backward pass",
        lambda _: Passes(2, 1),
    ),
    Criterion(
        "kl",
        "divergence of the next-token distribution when the head alone is closed",
        f"leave-one-out ablation, {_MICHEL}, section 3, with the divergence instead of the task's loss",
        "the head, or the whole group, is closed",
        "half a forward pass per head of the model",
        "kl.leave_one_out",
        per_prompt=lambda units: Passes(1 + 0.5 * units),
        per="prompt",
        max_prompts=32,
    ),
    Criterion(
        "greedy-kl",
        "backward elimination: each step closes the head that raises the divergence least, given those closed before",
        f"greedy removal of heads ({_MICHEL}, section 4) by divergence, with lazy evaluation (Minoux 1978)",
        "score = rise of the divergence at removal, kept in the order of removal; 4 to 16 candidates are measured anew "
        "per step",
        "1.5 forward passes per head of the model and up to half a pass for each of 16 candidates in up to 256 steps",
        "greedy_kl.greedy",
        per_prompt=_greedy_kl_passes,
        max_prompts=16,
    ),
    Criterion(
        "fisher-rounds",
        "fisher measured anew on what is left after each of 4 rounds that remove a quarter of the heads",
        "iterative pruning as in Molchanov et al., arXiv 1906.10771, section 3, with fisher",
        "score = information in the round of removal, kept in the order of removal",
        "20 forward and 16 backward passes",
        "fisher.rounds",
        "prompts, a backward pass",
        lambda _: Passes(_FISHER_ROUNDS * (1 + _ROUND_DRAWS), _FISHER_ROUNDS * _ROUND_DRAWS),
    ),
    Criterion(
        "fisher-midway",
        "fisher-rounds with the gates half closed: it sees heads whose work is saturated when they are open",
        "see fisher-rounds; the midpoint of a path as in Sundararajan et al., arXiv 1703.01365, section 3",
        "score = information in the round of removal, kept in the order of removal",
        "20 forward and 16 backward passes",
        "fisher.midway",
        "prompts, a backward pass",
        lambda _: Passes(_FISHER_ROUNDS * (1 + _ROUND_DRAWS), _FISHER_ROUNDS * _ROUND_DRAWS),
    ),
    Criterion(
        "subspace",
        "published: squared share of the head's write along the probe direction, norm in the hidden space",
        _SUBSPACE,
        "true heads at the input of o_proj, without its bias",
        "one forward pass",
        "subspace.hidden",
        "prompts, probe directions",
        per="prompt",
        per_axis=True,
    ),
    Criterion(
        "subspace-probe",
        "published, read the other way: the same with the norm inside the probes' K-dimensional space",
        _SUBSPACE,
        "true heads at the input of o_proj, without its bias",
        "one forward pass",
        "subspace.probe",
        "prompts, probe directions",
        per="prompt",
        per_axis=True,
    ),
    Criterion(
        "fisher-sampled",
        "fisher with targets sampled from the model's prediction: the textbook estimate, noisier",
        "see fisher",
        "one gate per head, or one per group",
        "2 forward passes and a backward one",
        "fisher.sampled",
        "prompts, a backward pass",
        lambda _: Passes(1 + _FISHER_DRAWS, _FISHER_DRAWS),
        per="prompt",
    ),
    Criterion(
        "fisher-greedy",
        "fisher with the model's own most likely token as the only target: no randomness, but biased",
        "see fisher",
        "one gate per head, or one per group",
        "2 forward passes and a backward one",
        "fisher.greedy",
        "prompts, a backward pass",
        lambda _: Passes(2, 1),
        per="prompt",
    ),
    Criterion(
        "llm-pruner",
        "first-order Taylor importance, |gradient * weight|, of a head's coupled weights",
        "Ma et al., arXiv 2305.11627, section 3.2",
        "rows of q, k, v and columns of o; the loss is on the dense model's own continuations, so no labels",
        "one forward and one backward pass with gradients of all attention weights",
        "llm_pruner.llm_pruner",
        "prompts, a backward pass",
        lambda _: Passes(1, 1),
    ),
    Criterion(
        "wanda",
        "weight magnitude times norm of the input activation",
        "Sun et al., arXiv 2306.11695, section 3",
        _O_PROJ,
        "one forward pass",
        "wanda.wanda",
    ),
    Criterion(
        "dlp",
        "wanda within a layer; layers keep more, the lower the median of their weights' scores is",
        "Chen et al., arXiv 2505.23807, DLP with the median, alpha 0.15",
        "medians are over o_proj, not over all weights of a block; score = 1 - rate at which a head comes in, by the "
        "rates of layers and wanda's order",
        "one forward pass",
        "dlp.dlp",
    ),
    Criterion(
        "ria",
        "weight relative to its row and column, times the square root of the input activation's norm",
        "Zhang et al., Plug-and-Play, ICLR 2024, section 3",
        _O_PROJ,
        "one forward pass",
        "ria.ria",
    ),
    Criterion(
        "dass",
        "weight magnitude times norm of the intermediate activation that it produces or consumes",
        "Guo et al., arXiv 2405.01943, pruning metric",
        "made for gated MLPs: here a head's value rows produce its channels and its o_proj columns consume them",
        "one forward pass",
        "dass.dass",
    ),
    Criterion(
        "probe-pruning",
        "weights times channel norms, those of a small telling probe fused with those of all prompts",
        "Le et al., arXiv 2502.15618, section 4",
        "made for a new mask per batch: here one static mask, the probe being 5 % of a domain's prompts and half of "
        "their tokens, by residual norm",
        "one forward pass",
        "probe_pruning.probe_pruning",
        max_prompts=64,
    ),
    Criterion(
        "flap",
        "fluctuation of the input channels times squared weight norm, standardised per layer",
        "An et al., arXiv 2312.11983, methodology (WIFV)",
        "mean over a head's channels of o_proj's input; the lowest score is made zero",
        "one forward pass",
        "flap.flap",
    ),
    Criterion(
        "bonsai",
        "ridge regression of the divergence of random sub-models on the heads that they close",
        "Kolawole et al., arXiv 2402.05406, section 3",
        "an eighth of the heads closed at a time, without a prior, in one round; divergence instead of perplexity",
        "4 forward passes per head of the model, at least 32 and at most 1024",
        "bonsai.bonsai",
        per_prompt=_bonsai_passes,
        max_prompts=16,
    ),
    Criterion(
        "greedy-output",
        "matching pursuit: heads in the order in which their writes reconstruct the layer's attention output",
        "after Li et al., arXiv 2407.19126; orthogonal matching pursuit (Pati et al. 1993)",
        "atoms are the heads' writes, factors fitted anew; the scores of a layer add up to 1, so layers count alike",
        "one forward pass",
        "greedy_output.greedy_output",
    ),
    Criterion(
        "tyr",
        "squared error of the layer's attention output when the head is removed after the best change of what stays",
        "Li et al., Tyr-the-Pruner, arXiv 2503.09657, local pruning",
        "the cheapest head of the layer first, one by one; cost = share of the layer's output energy, in the place of "
        "the search for the rates of layers",
        "one forward pass",
        "tyr.tyr",
    ),
    Criterion(
        "magnitude",
        "Frobenius norm of the head's weights",
        "Han et al., arXiv 1506.02626, section 3",
        "rows of q, k, v and columns of o; a head has an equal share of its group's k and v",
        "none",
        "magnitude.magnitude",
        "nothing",
        lambda _: Passes(0),
    ),
    Criterion(
        "random-first-layer",
        "random heads with the first layer kept: the baseline to beat",
        "a baseline",
        "uniform draws, the first layer above all others",
        "none",
        "chance.random_first_layer",
        "nothing",
        lambda _: Passes(0),
    ),
    Criterion(
        "random", "random heads", "a baseline", "uniform draws", "none", "chance.random", "nothing", lambda _: Passes(0)
    ),
)

CRITERIA: Mapping[str, Criterion] = MappingProxyType({entry.name: entry for entry in _ALL})
