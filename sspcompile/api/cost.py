"""What a build will cost, before it is begun: tokens, forward passes per stage, minutes here, and peak memory.

Stages are counted in forward passes of the decoder over one token, from the same numbers that the stages themselves
work with; one short pass on this machine turns them into seconds. What depends on what the texts will say (the mixture,
which masks coincide) is counted as if it came out dear.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from sspcompile.criteria.table import of_key
from sspcompile.families import Geometry
from sspcompile.model.chat import BARE, Rendering, rendering_of, template_digest
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.logits import LOGITS_AT_ONCE
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.model.text import (
    ANSWER_TOKENS,
    BATCH_TOKENS,
    GRADIENT_TOKENS,
    Batch,
    Sentence,
    batches_of,
    greedy,
    sentences,
)
from sspcompile.prepare.recognition import OUTSIDE_PROMPTS, corpus_of, layers_read, recognised_part, recognised_tokens
from sspcompile.prepare.toolkits import asks_directions, stored_toolkit
from sspcompile.proof.parity import PROBE_TOKENS
from sspcompile.proof.reload import TOGETHER
from sspcompile.proof.whole import NEW_TOKENS
from sspcompile.repair.fitting import masks_at_once
from sspcompile.repair.repair import refitted_dtype
from sspcompile.request.options import AUTO
from sspcompile.request.pools import PoolSet, pools_of
from sspcompile.request.prompts import Prompt, answer_of, is_open
from sspcompile.request.request import Request
from sspcompile.request.splits import OFF_PROMPTS, draw_splits, fit_part, thinned
from sspcompile.select.baselines import most_rivals
from sspcompile.select.floor import AT_ONCE, ROUNDS
from sspcompile.select.judging import spread
from sspcompile.select.reading import MIXTURE_TEXTS
from sspcompile.select.scoring import CURVATURE_TEXTS, cached_keys, reads_cache, source_of
from sspcompile.select.search import COMPARED_FIT, COMPARED_HELD
from sspcompile.slicing.layouts import uniform_choices
from sspcompile.workspace import Workspace

# The short pass, in tokens: long enough to be bound by what a real batch is bound by, and of a large model as many as
# SAMPLE_SECONDS are enough for.
SAMPLE_TOKENS = 1024
LEAST_TOKENS = 128
SAMPLE_SECONDS = 5.0
# Decoding steps that are timed.
STEPS = 3
# Python, torch and transformers themselves.
LIBRARIES = 600 << 20
# What was freed and is not given back: on SmolLM2-135M about as much again as is in use at the peak.
ALLOCATOR = 2
# A budget that only the scenario, or a measurement, makes known.
UNKNOWN_KEEP = 0.5
# float64 against float32, where a processor computes.
DOUBLE = 2.0
# What starting two processes, loading the model in each, and writing take beside any pass, in seconds.
STARTING = 12.0


@dataclass(frozen=True)
class Stage:
    """`passes` of the decoder over `tokens` of `texts`; a stage's cost is the product. `steps`: decoding steps, which
    are bound by reading the weights instead. `masks`: how many are repaired at a time, whose hidden states are held.
    """

    name: str
    texts: int
    tokens: int
    passes: float
    steps: int = 0
    masks: int = 0


@dataclass(frozen=True)
class Cost:
    """What a build will take here. `tokens`: of the texts that it reads, the scenario's own where they suffice and the
    pools' otherwise; `passes`: of the decoder over those in all. `seconds` and `peak_bytes` are of the whole command.
    """

    stages: tuple[Stage, ...]
    stage_seconds: tuple[float, ...]
    tokens: int
    passes: float
    seconds: float
    peak_bytes: int
    seconds_per_pass: float
    device: str
    dtype: str
    threads: int

    def as_mapping(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def cost_of(request: Request, dense: DenseModel, workspace: Workspace, *, placement: Placement = ANYWHERE) -> Cost:
    """Count the stages of a build, and run one short pass and a few decoding steps to time them.

    Raises what loading the model and reading the prompts raise.
    """
    loaded = dense.load(placement=placement, rendering=rendering_of(request.options))
    lengths = _Lengths(loaded, request.options.max_tokens)
    learning = _learning(request, dense, loaded, workspace, lengths)
    stages = (*learning, *_deciding(request, dense, loaded, lengths))
    own = source_of(request) == "prompts"
    read, other = _recognised(pools_of(request.options))
    pooled = [*read, *other]
    tokens = lengths.sum(request.scenario.prompts) if own else _tokens(request, loaded, pooled)
    sample = _sample(request.scenario.prompts if own else pooled, lengths)
    per_token, per_step = _speed(loaded, sample)
    # A batch costs a step beside its tokens: the weights are read once, from memory or from disk.
    taken = tuple(
        s.passes * (s.tokens * per_token + -(-s.tokens // BATCH_TOKENS) * per_step) + s.steps * per_step for s in stages
    )
    seconds, whole = STARTING + sum(taken), tokens * per_token + -(-tokens // BATCH_TOKENS) * per_step
    return Cost(
        stages=stages,
        stage_seconds=taken,
        tokens=tokens,
        passes=seconds / whole,
        seconds=seconds,
        peak_bytes=_peak(loaded, stages, lengths),
        seconds_per_pass=whole,
        device=str(loaded.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


class _Lengths:
    """Tokens of prompts, each tokenised once."""

    def __init__(self, loaded: LoadedModel, max_tokens: int) -> None:
        self._loaded, self._max = loaded, max_tokens
        self._known: dict[Prompt, int] = {}
        self.longest = 0

    def of(self, prompts: Sequence[Prompt]) -> list[int]:
        new = list(dict.fromkeys(p for p in prompts if p not in self._known))
        read = sentences(self._loaded.tokenizer, new, self._max, self._loaded.rendering)
        self._known |= {prompt: len(item.ids) for prompt, item in zip(new, read, strict=True)}
        found = [self._known[prompt] for prompt in prompts]
        self.longest = max([self.longest, *found])
        return found

    def answers(self, prompts: Sequence[Prompt], new: int) -> list[int]:
        """Tokens of the reference answers, `new` where the dense model writes on."""
        given = [answer for prompt in prompts if (answer := answer_of(prompt)) is not None]
        read = iter(self._loaded.tokenizer(given)["input_ids"] if given else [])
        most = [new if is_open(p) else 0 if answer_of(p) is None else ANSWER_TOKENS for p in prompts]
        return [n if answer_of(p) is None else min(n, len(next(read))) for p, n in zip(prompts, most, strict=True)]

    def sum(self, prompts: Sequence[Prompt]) -> int:
        return sum(self.of(prompts))

    def mean(self, prompts: Sequence[Prompt]) -> float:
        return self.sum(prompts) / max(1, len(prompts))


def _recognised(given: PoolSet) -> tuple[list[str], list[str]]:
    """The texts that recognition reads: of the domains, and of the outside subjects."""
    outside = recognised_part(given.outside, OUTSIDE_PROMPTS)
    read = corpus_of(recognised_part(fit_part(given.candidates))).texts
    return [*read], [text for one in outside for text in one.prompts]


def _tokens(request: Request, loaded: LoadedModel, prompts: Sequence[Prompt], rendering: Rendering = BARE) -> int:
    """Tokens of prompts as recognition reads them: no more than its part of each, without the chat template."""
    most = recognised_tokens(request.options.max_tokens)
    return sum(len(item.ids) for item in sentences(loaded.tokenizer, prompts, most, rendering))


def _recognising(loaded: LoadedModel) -> float:
    """A pass that ends at the last layer that recognition reads, in whole ones."""
    layers = loaded.geometry.layers
    return (layers_read(layers)[-1] + 1) / layers


def _learning(
    request: Request, dense: DenseModel, loaded: LoadedModel, workspace: Workspace, lengths: _Lengths
) -> Iterator[Stage]:
    """What the toolkit still lacks for this request, as `toolkit_for` measures it."""
    options, given = request.options, pools_of(request.options)
    candidates = fit_part(given.candidates)
    pool = [text for one in candidates for text in one.prompts]
    toolkit = stored_toolkit(dense, options, workspace, template_digest(loaded.tokenizer, loaded.rendering))
    if toolkit is None:
        read, other = _recognised(given)
        part = _recognising(loaded)
        yield Stage("recognition: domain pools", len(read), _tokens(request, loaded, read), part)
        yield Stage("recognition: other subjects", len(other), _tokens(request, loaded, other), part)
    missing = [key for key in cached_keys(request) if toolkit is None or key not in toolkit.importance]
    axes = asks_directions(options) or any(of_key(key)[0].per_axis for key in missing)
    if axes and (toolkit is None or toolkit.directions is None):
        every = corpus_of(recognised_part(candidates)).texts
        yield Stage("directions of the domains", len(every), _tokens(request, loaded, every, loaded.rendering), 1)
    if missing:
        tokens = _continued(pool, lengths, options.continuation_tokens)
        yield _continuing("continuations of the pools", pool, lengths, options.continuation_tokens)
        for key in missing:
            yield Stage(f"{key} on the pools", len(pool), tokens, _passes_of(key, loaded))


def _deciding(request: Request, dense: DenseModel, loaded: LoadedModel, lengths: _Lengths) -> Iterator[Stage]:
    """What `select` measures, and the proof."""
    options, scenario, source = request.options, request.scenario, source_of(request)
    given, new = pools_of(options), options.continuation_tokens
    if scenario.domains is None:
        read = thinned(scenario.texts, MIXTURE_TEXTS)
        tokens = _tokens(request, loaded, read)
        yield Stage("what the scenario is made of", len(read), tokens, _recognising(loaded))
    # Without a pass the mixture is not known; the texts that stand in for it are as long as the pools' on average.
    even = np.full(len(given.candidates), 1 / len(given.candidates))
    splits = draw_splits(scenario.prompts, even, given.candidates, options.seed)
    off = splits.off or tuple(text for one in given.candidates for text in one.prompts)[:OFF_PROMPTS]
    every = [*splits.fit, *splits.guard, *splits.judge, *off]
    yield _continuing("continuations", every, lengths, new)
    fit, guard, judge, apart = (_continued(one, lengths, new) for one in (splits.fit, splits.guard, splits.judge, off))
    yield Stage("dense model on held-out texts", len(every) - len(splits.fit), guard + judge + apart, 1)
    mean = fit / max(1, len(splits.fit))
    if options.criterion == AUTO:
        count = min(len(splits.fit), CURVATURE_TEXTS)
        yield Stage("head scores", count, int(count * mean), _gradient_passes(loaded))
    elif source != "domains":
        yield Stage("head scores", len(splits.fit), fit, _passes_of(options.criterion, loaded))
    if options.max_loss is not None:
        count = min(len(splits.fit) * 2 // 3, COMPARED_FIT)
        name = "repairing masks on the way to the smallest"
        once = _repairing(name, count, int(count * mean), AT_ONCE, request, dense, loaded)
        yield replace(once, passes=ROUNDS * once.passes)
        yield Stage("measuring masks on the way to the smallest", len(splits.guard), guard, 2 * ROUNDS * AT_ONCE)
    masks, layouts = _masks(request, loaded.geometry)
    if masks > 1:
        count = min(len(splits.fit) * 2 // 3, COMPARED_FIT)
        name = f"repairing {masks} masks to compare"
        yield _repairing(name, count, int(count * mean), masks, request, dense, loaded)
        count = min(len(splits.fit) // 3, COMPARED_HELD)
        yield Stage("comparing masks", count, int(count * mean), 1 + masks)
    if layouts > 1:
        yield Stage("comparing layouts", len(splits.guard), guard, 2 * layouts)
    rivals, name = most_rivals(options.baselines, source), "repairing this build and its baselines"
    yield _repairing(name, len(splits.fit), fit, 1 + rivals, request, dense, loaded)
    yield Stage("judging the repair", len(splits.guard), guard, 2)
    yield Stage("judging this build and its baselines", len(splits.judge) + len(off), judge + apart, 2 + rivals)
    probes = spread(sorted(min(PROBE_TOKENS, length + new) for length in lengths.of(splits.judge)))
    # Those of one length decode by twos, in the dense model and in the cut one.
    batches = sum(-(-probes.count(length) // TOGETHER) for length in set(probes))
    steps = int(2 * DOUBLE * NEW_TOKENS * batches)
    yield Stage("proof", len(probes), sum(probes), 2 * DOUBLE, steps=steps)


def _repairing(
    name: str, texts: int, tokens: int, masks: int, request: Request, dense: DenseModel, loaded: LoadedModel
) -> Stage:
    """The dense model once for every round of masks, and each mask."""
    repair = request.options.repair
    if repair == "none":
        return Stage(name, texts, tokens, 0)
    dtype, mlp = refitted_dtype(dense.checkpoint), repair == "least-squares-mlp"
    at_once = min(masks, masks_at_once(loaded, tokens, dtype, mlp=mlp))
    passes = -(-masks // at_once) + masks * _mask_passes(loaded.geometry, repair)
    return Stage(name, texts, tokens, passes, masks=at_once)


def _continued(prompts: Sequence[Prompt], lengths: _Lengths, new: int) -> int:
    return lengths.sum(prompts) + sum(lengths.answers(prompts, new))


def _continuing(name: str, prompts: Sequence[Prompt], lengths: _Lengths, new: int) -> Stage:
    """The prompts that the model continues once, then a step for each new token of each batch."""
    prompts = [prompt for prompt in prompts if is_open(prompt)]
    tokens = lengths.sum(prompts)
    batches = -(-tokens // BATCH_TOKENS)
    return Stage(name, len(prompts), tokens, 1, steps=batches * max(0, new - 1))


def _layer_parameters(loaded: LoadedModel) -> int:
    return sum(p.numel() for p in loaded.layers[-1].parameters())


def _gradient_passes(loaded: LoadedModel) -> float:
    """Forward, forward again, backward, and two products of inputs [n] with themselves in every layer."""
    n = loaded.geometry.heads * loaded.geometry.head_dim
    return 3 + 2 * n * n / _layer_parameters(loaded)


def _passes_of(key: str, loaded: LoadedModel) -> float:
    """A backward pass without gradients of weights is as dear as a forward one."""
    criterion, granularity = of_key(key)
    units = loaded.geometry.total_heads if granularity == "head" else loaded.geometry.layers * loaded.geometry.kv_heads
    found = criterion.per_prompt(units)
    return found.forward + found.backward


def _mask_passes(g: Geometry, repair: str) -> float:
    """Of one mask that is repaired: each layer once, and normal equations in float64."""
    if repair in ("none", "flap-bias"):
        return 0.0
    n, d = g.heads * g.head_dim, g.hidden
    mlp = 3 * d * g.intermediate
    layer = (2 * g.heads + 2 * g.kv_heads) * g.head_dim * d + mlp
    passes = 1 + DOUBLE * (n * n + n * d) / layer
    return passes + ((mlp + DOUBLE * (g.intermediate**2 + g.intermediate * d)) / layer if repair.endswith("mlp") else 0)


def _masks(request: Request, g: Geometry) -> tuple[int, int]:
    """How many masks are compared, and of how many layouts."""
    options = request.options
    keep = options.keep if options.keep is not None else UNKNOWN_KEEP
    layouts = {"auto": ("uniform", "per-layer"), "uniform": ("uniform",), "per-layer": ("per-layer",)}[options.layout]
    if options.max_loss is not None and options.layout == "auto":
        layouts = ("per-layer",)  # few uniform shapes keep as much as a bound on the loss leaves
    if options.criterion != AUTO:
        return len(layouts), len(layouts)
    rankings = 2 if reads_cache(source_of(request)) else 1
    shapes = uniform_choices(np.ones((g.layers, g.heads)), g.kv_heads, keep, groups_only=options.granularity == "group")
    return sum(rankings * (len(shapes) if name == "uniform" else 1) for name in layouts), len(layouts)


def _sample(prompts: Sequence[Prompt], lengths: _Lengths) -> tuple[Prompt, ...]:
    """Texts of about SAMPLE_TOKENS, evenly spaced."""
    return thinned(prompts, max(1, int(SAMPLE_TOKENS / max(1.0, lengths.mean(prompts)))))


def _first(items: Sequence[Sentence], tokens: int) -> Sequence[Sentence]:
    """The first sentences of `tokens` in all, at least one."""
    ends = np.cumsum([len(item.ids) for item in items])
    return items[: max(1, int((ends <= tokens).sum()))]


@torch.inference_mode()
def _speed(loaded: LoadedModel, sample: Sequence[Prompt]) -> tuple[float, float]:
    """Seconds of a forward pass per token beside those of a step, and of a decoding step of a batch.

    Each is the better of two.
    """
    every = sentences(loaded.tokenizer, sample, loaded.positions or BATCH_TOKENS, loaded.rendering)

    def forward(batches: Sequence[Batch]) -> None:
        for batch in batches:
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    few = _first(every, LEAST_TOKENS)
    short = batches_of(loaded, few)
    forward(short)  # warm
    rate = sum(len(item.ids) for item in few) / _seconds(partial(forward, short))
    items = _first(every, max(LEAST_TOKENS, int(rate * SAMPLE_SECONDS)))
    batches = batches_of(loaded, items)
    passed = min(_seconds(partial(forward, batches)) for _ in range(2))
    one, several = (min(_seconds(partial(greedy, loaded, few, n)) for _ in range(2)) for n in (1, 1 + STEPS))
    step = min(max(0.0, several - one) / STEPS, passed / (2 * len(batches)))
    return (passed - len(batches) * step) / sum(len(item.ids) for item in items), step


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak(loaded: LoadedModel, stages: Sequence[Stage], lengths: _Lengths) -> int:
    """Weights, then the dearest of: gradients of a batch, hidden states of a repair, activations of a layer."""
    g = loaded.geometry
    n, width = g.heads * g.head_dim, 4
    # Of weights that lie on disk, those of the layer that runs are in memory.
    held = {id(p): p for p in loaded.model.parameters() if not p.is_meta}
    weights = sum(p.numel() * p.element_size() for p in held.values())
    if any(p.is_meta for p in loaded.model.parameters()):
        weights += _layer_parameters(loaded) * width
    batch = max(BATCH_TOKENS, lengths.longest)
    layer = batch * (3 * g.intermediate + 6 * g.hidden + 4 * n) * width
    logits = 6 * LOGITS_AT_ONCE * width
    backward = max(GRADIENT_TOKENS, lengths.longest) / batch
    gradients = backward * ((g.layers + 2) * batch * g.hidden * width + 2 * layer) + logits
    gradients += 2 * g.layers * n * n * width
    states = max((s.tokens * (3 + s.masks) for s in stages if s.masks), default=0) * g.hidden * width
    return int(LIBRARIES + weights + ALLOCATOR * max(gradients, states + layer, layer + logits))
