"""The stages of a build, counted before it is begun: the tokens of each, and forward passes of the decoder over them.

The numbers are those that the stages themselves work with. What depends on what the texts will say (the mixture, which
masks coincide) is counted as if it came out dear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.criteria.table import of_key
from sspcompile.families import Geometry
from sspcompile.model.chat import BARE, Rendering, template_digest
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.placement import Placement
from sspcompile.model.text import ANSWER_TOKENS, BATCH_TOKENS, sentences
from sspcompile.prepare.recognition import OUTSIDE_PROMPTS, corpus_of, layers_read, recognised_part, recognised_tokens
from sspcompile.prepare.toolkits import asks_directions, is_stated, stored_toolkit
from sspcompile.proof.parity import PROBE_TOKENS
from sspcompile.proof.prove import goes_layerwise
from sspcompile.proof.reload import TOGETHER
from sspcompile.proof.whole import NEW_TOKENS
from sspcompile.repair.fitting import masks_at_once
from sspcompile.repair.repair import refitted_dtype
from sspcompile.request.options import AUTO
from sspcompile.request.pools import PoolSet, pools_of
from sspcompile.request.prompts import Prompt, answer_of, is_open
from sspcompile.request.protecting import protected_pools
from sspcompile.request.request import Request
from sspcompile.request.splits import OFF_PROMPTS, draw_splits, fit_part, thinned
from sspcompile.select.baselines import most_rivals
from sspcompile.select.budget import bounded, bounds_of, cuts_channels
from sspcompile.select.floor import AT_ONCE, ROUNDS
from sspcompile.select.judging import spread
from sspcompile.select.reading import MIXTURE_TEXTS
from sspcompile.select.scoring import CURVATURE_TEXTS, cached_keys, reads_cache, source_of
from sspcompile.select.search import COMPARED_FIT, COMPARED_HELD
from sspcompile.select.selection import RATES, RUNS, SHAPES
from sspcompile.slicing.layouts import uniform_choices
from sspcompile.slicing.measures import Bound, of_size
from sspcompile.slicing.sizes import even_worth, per_layer_counts, smallest_size
from sspcompile.workspace import Workspace

# Budgets that only the scenario, or a measurement, makes known: of the heads, and of all parameters.
UNKNOWN_KEEP = 0.5
UNKNOWN_SIZE = 0.85
# Both models as stored and rounded in two precisions, and the dense one once more.
WEIGHED = 7
# float64 against float32, where a processor computes.
DOUBLE = 2.0


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


class Lengths:
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


def recognised(given: PoolSet) -> tuple[list[str], list[str]]:
    """The texts that recognition reads: of the domains, and of the outside subjects."""
    outside = recognised_part(given.outside, OUTSIDE_PROMPTS)
    read = corpus_of(recognised_part(fit_part(given.candidates))).texts
    return [*read], [text for one in outside for text in one.prompts]


def recognition_tokens(
    request: Request, loaded: LoadedModel, prompts: Sequence[Prompt], rendering: Rendering = BARE
) -> int:
    """Tokens of prompts as recognition reads them: no more than its part of each, without the chat template."""
    most = recognised_tokens(request.options.max_tokens)
    return sum(len(item.ids) for item in sentences(loaded.tokenizer, prompts, most, rendering))


def _recognising(loaded: LoadedModel) -> float:
    """A pass that ends at the last layer that recognition reads, in whole ones."""
    layers = loaded.geometry.layers
    return (layers_read(layers)[-1] + 1) / layers


def learning(
    request: Request, dense: DenseModel, loaded: LoadedModel, workspace: Workspace, lengths: Lengths
) -> Iterator[Stage]:
    """What the toolkit still lacks for this request, as `toolkit_for` measures it."""
    options, given = request.options, pools_of(request.options)
    if is_stated(request.scenario, options, cached_keys(request)):
        return
    candidates = fit_part(given.candidates)
    pool = [text for one in candidates for text in one.prompts]
    toolkit = stored_toolkit(dense, options, workspace, template_digest(loaded.tokenizer, loaded.rendering))
    if toolkit is None:
        read, other = recognised(given)
        part = _recognising(loaded)
        yield Stage("recognition: domain pools", len(read), recognition_tokens(request, loaded, read), part)
        yield Stage("recognition: other subjects", len(other), recognition_tokens(request, loaded, other), part)
    missing = [key for key in cached_keys(request) if toolkit is None or key not in toolkit.importance]
    axes = asks_directions(options) or any(of_key(key)[0].per_axis for key in missing)
    if axes and (toolkit is None or toolkit.directions is None):
        every = corpus_of(recognised_part(candidates)).texts
        tokens = recognition_tokens(request, loaded, every, loaded.rendering)
        yield Stage("directions of the domains", len(every), tokens, 1)
    if missing:
        tokens = _continued(pool, lengths, options.continuation_tokens)
        yield _continuing("continuations of the pools", pool, lengths, options.continuation_tokens)
        for key in missing:
            yield Stage(f"{key} on the pools", len(pool), tokens, _passes_of(key, loaded))


def deciding(
    request: Request, dense: DenseModel, loaded: LoadedModel, lengths: Lengths, placement: Placement
) -> Iterator[Stage]:
    """What `select` measures, and the proof."""
    options, scenario, source = request.options, request.scenario, source_of(request)
    given, new = pools_of(options), options.continuation_tokens
    if scenario.domains is None:
        read = thinned(scenario.texts, MIXTURE_TEXTS)
        tokens = recognition_tokens(request, loaded, read)
        yield Stage("what the scenario is made of", len(read), tokens, _recognising(loaded))
    # Without a pass the mixture is not known; the texts that stand in for it are as long as the pools' on average.
    even = np.full(len(given.candidates), 1 / len(given.candidates))
    # Without a mixture, what the scenario is not about stands for every domain.
    protect = protected_pools(options, np.zeros_like(even), given.candidates)
    splits = draw_splits(scenario.prompts, even, given.candidates, options.seed, protect)
    off = splits.off or tuple(text for one in given.candidates for text in one.prompts)[:OFF_PROMPTS]
    guards = [prompt for one in splits.protected for prompt in one.guard]
    judges = [prompt for one in splits.protected for prompt in one.judge]
    every = [*splits.fit, *splits.guard, *splits.judge, *off, *guards, *judges]
    yield _continuing("continuations", every, lengths, new)
    parts = (splits.fit, splits.guard, splits.judge, off, guards, judges)
    fit, guard, judge, apart, spared, told = (_continued(one, lengths, new) for one in parts)
    held = guard + judge + apart + spared + told
    yield Stage("dense model on held-out texts", len(every) - len(splits.fit), held, 1)
    mean = fit / max(1, len(splits.fit))
    some = min(len(splits.fit), CURVATURE_TEXTS)
    yield from _scoring(request, loaded, len(splits.fit), fit, some)
    masks, layouts = _masks(request, loaded)
    count = min(len(splits.fit) * 2 // 3, COMPARED_FIT)
    if options.max_loss is not None:
        name = "repairing masks on the way to the smallest"
        once = _repairing(name, count, int(count * mean), AT_ONCE, request, dense, loaded)
        yield replace(once, passes=ROUNDS * once.passes)
        yield Stage("measuring masks on the way to the smallest", len(splits.guard), guard, 2 * ROUNDS * AT_ONCE)
    if masks > 1:
        name = f"repairing {masks} masks to compare"
        yield _repairing(name, count, int(count * mean), masks, request, dense, loaded)
        count = min(len(splits.fit) // 3, COMPARED_HELD)
        yield Stage("comparing masks", count, int(count * mean), 1 + masks)
    if layouts > 1:
        yield Stage("comparing layouts", len(splits.guard), guard, 2 * layouts)
    sized = bool(_bounds(request, loaded))
    rivals = most_rivals(options.baselines, source, sized=sized, layers=options.removes_layers)
    if options.baselines == "all" and sized and not options.removes_layers:
        yield Stage("influence of layers (baseline)", some, int(some * mean), 1)
    name = "repairing this build and its baselines"
    yield _repairing(name, len(splits.fit), fit, 1 + rivals, request, dense, loaded)
    yield Stage("judging the repair", len(splits.guard), guard, 2)
    yield Stage("judging this build and its baselines", len(splits.judge) + len(off), judge + apart, 2 + rivals)
    yield from _sparing(guards, spared, judges, told, ROUNDS * AT_ONCE if options.max_loss is not None else 0, layouts)
    probes = spread(sorted(min(PROBE_TOKENS, length + new) for length in lengths.of(splits.judge)))
    if options.quantize is not None:
        yield Stage("weighing what is rounded", len(splits.judge), judge, WEIGHED)
    # Layer by layer nothing is decoded. Whole models decode probes of one length by twos, the dense and the cut one.
    alike = [probes.count(length) for length in set(probes)]
    reading = (
        1 if goes_layerwise(dense.checkpoint, placement) else NEW_TOKENS * sum(-(-count // TOGETHER) for count in alike)
    )
    yield Stage("proof", len(probes), sum(probes), 2 * DOUBLE, steps=int(2 * DOUBLE * reading))


def _scoring(request: Request, loaded: LoadedModel, texts: int, tokens: int, some: int) -> Iterator[Stage]:
    """Of the texts that choose, `some` are read where one pass scores all units."""
    options, mean = request.options, tokens / max(1, texts)
    if options.removes_layers:
        yield Stage("influence of layers", some, int(some * mean), 1)
    elif options.criterion == AUTO:
        yield Stage("head scores", some, int(some * mean), _gradient_passes(loaded))
    elif source_of(request) != "domains":
        yield Stage("head scores", texts, tokens, _passes_of(options.criterion, loaded))


def _sparing(
    guards: Sequence[Prompt], decide: int, judges: Sequence[Prompt], judge: int, walked: int, layouts: int
) -> Iterator[Stage]:
    """Of what is protected: tokens that `decide`, read for every mask on the way, for each of several layouts and twice
    for what is built, and those that `judge`.
    """
    if guards:
        compared = layouts if layouts > 1 else 0
        yield Stage("measuring what is protected", len(guards), decide, walked + compared + 2)
        yield Stage("judging what is protected", len(judges), judge, 1)


def _repairing(
    name: str, texts: int, tokens: int, masks: int, request: Request, dense: DenseModel, loaded: LoadedModel
) -> Stage:
    """The dense model once for every round of masks, and each mask."""
    repair = request.options.repair
    if repair == "none":
        return Stage(name, texts, tokens, 0)
    if repair == "flap-bias":
        return Stage(name, texts, tokens, 1)  # of the dense model, for all masks
    width = refitted_width(request, loaded)
    at_once = min(masks, masks_at_once(loaded, tokens, refitted_dtype(dense.checkpoint), mlp=width is not None))
    passes = -(-masks // at_once) + masks * _mask_passes(loaded.geometry, width, tokens)
    return Stage(name, texts, tokens, passes, masks=at_once)


def _continued(prompts: Sequence[Prompt], lengths: Lengths, new: int) -> int:
    return lengths.sum(prompts) + sum(lengths.answers(prompts, new))


def _continuing(name: str, prompts: Sequence[Prompt], lengths: Lengths, new: int) -> Stage:
    """The prompts that the model continues once, then a step for each new token of each batch."""
    prompts = [prompt for prompt in prompts if is_open(prompt)]
    tokens = lengths.sum(prompts)
    batches = -(-tokens // BATCH_TOKENS)
    return Stage(name, len(prompts), tokens, 1, steps=batches * max(0, new - 1))


def layer_parameters(loaded: LoadedModel) -> int:
    return sum(p.numel() for p in loaded.layers[-1].parameters())


def _gradient_passes(loaded: LoadedModel) -> float:
    """Forward, forward again, backward, and two products of inputs [n] with themselves in every layer."""
    n = loaded.geometry.heads * loaded.geometry.head_dim
    return 3 + 2 * n * n / layer_parameters(loaded)


def _passes_of(key: str, loaded: LoadedModel) -> float:
    """A backward pass without gradients of weights is as dear as a forward one."""
    criterion, granularity = of_key(key)
    units = loaded.geometry.total_heads if granularity == "head" else loaded.geometry.layers * loaded.geometry.kv_heads
    found = criterion.per_prompt(units)
    return found.forward + found.backward


def refitted_width(request: Request, loaded: LoadedModel) -> int | None:
    """Channels of an MLP that a repair fits its down_proj to, on average over layers; None where it stays as it was."""
    g, bounds = loaded.geometry, _bounds(request, loaded)
    if request.options.removes_layers and g.has_channels:
        return g.intermediate
    if bounds and cuts_channels(request.options, g):
        groups_only = request.options.granularity == "group"
        (counts,) = per_layer_counts(even_worth(g, channels=True), g, [bounds], groups_only=groups_only)
        return round(sum(counts.widths) / g.layers)
    return g.intermediate if request.options.repair == "least-squares-mlp" else None


def _bounds(request: Request, loaded: LoadedModel) -> tuple[Bound, ...]:
    """The budget as bounds on parameters and memory; nothing where it is one of the heads."""
    options, g = request.options, loaded.geometry
    if bounded(options):
        return bounds_of(options, Checkpoint(loaded.path))
    if options.max_loss is not None and options.removes_layers:
        return (of_size(g, UNKNOWN_SIZE),)
    if options.max_loss is None or not cuts_channels(options, g):
        return ()
    smallest = smallest_size(g, channels=True, groups_only=options.granularity == "group")
    return (of_size(g, max(UNKNOWN_SIZE, smallest)),)


def _mask_passes(g: Geometry, width: int | None, tokens: int) -> float:
    """Of one mask that is repaired: each layer once, normal equations in float64 and their solution. Where down_proj is
    refitted to `width` channels, what comes before it once more, and normal equations of those in fp32.
    """
    n, d = g.heads * g.head_dim, g.hidden
    mlp = 3 * d * g.intermediate
    layer = (2 * g.heads + 2 * g.kv_heads) * g.head_dim * d + mlp
    passes = 1 + DOUBLE * (_normal(n, d) + _solving(n, d) / max(1, tokens)) / layer
    if width is None:
        return passes
    again = 2 * mlp / 3 + _normal(width, d) + DOUBLE * _solving(width, d) / max(1, tokens)
    return passes + again / layer


def _normal(inputs: int, outputs: int) -> int:
    """Multiplications for one token."""
    return inputs * (inputs + outputs)


def _solving(inputs: int, outputs: int) -> float:
    """Multiplications in all: a factorisation, and two triangular systems for each output."""
    return inputs**3 / 3 + inputs**2 * outputs


def _masks(request: Request, loaded: LoadedModel) -> tuple[int, int]:
    """How many masks are compared, and of how many layouts."""
    options, g = request.options, loaded.geometry
    layouts = {"auto": ("uniform", "per-layer"), "uniform": ("uniform",), "per-layer": ("per-layer",)}[options.layout]
    if options.layout == "auto" and options.wanted_host is not None:
        layouts = ("uniform",)
    if options.removes_layers:
        return 1 + RUNS, 1
    if _bounds(request, loaded) and options.criterion == AUTO:
        per_layer = len(RATES) if cuts_channels(options, g) else 1
        return sum(SHAPES if name == "uniform" else per_layer for name in layouts), len(layouts)
    if options.max_loss is not None and options.layout == "auto":
        layouts = ("per-layer",)  # few uniform shapes keep as much as a bound on the loss leaves
    if options.criterion != AUTO:
        return len(layouts), len(layouts)
    keep = options.keep if options.keep is not None else UNKNOWN_KEEP
    rankings = 2 if reads_cache(source_of(request)) else 1
    shapes = uniform_choices(np.ones((g.layers, g.heads)), g.kv_heads, keep, groups_only=options.granularity == "group")
    return sum(rankings * (len(shapes) if name == "uniform" else 1) for name in layouts), len(layouts)
