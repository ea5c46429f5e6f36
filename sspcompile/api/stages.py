"""The stages of a build, counted before it is begun: the tokens of each, and forward passes of the decoder over them.

The numbers are those that the stages themselves work with. What depends on what the texts will say (the mixture, which
masks coincide) is counted as if it came out dear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sspcompile.api.parts import Lengths, Part, Parts, continued
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.criteria.llm_pruner import has_gradients
from sspcompile.criteria.table import of_key
from sspcompile.families import Geometry
from sspcompile.model.chat import BARE, Rendering, template_digest
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.placement import Placement
from sspcompile.model.text import BATCH_TOKENS, sentences
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
from sspcompile.request.prompts import Prompt, is_open
from sspcompile.request.request import Request
from sspcompile.request.splits import fit_part, thinned
from sspcompile.select.baselines import most_rivals
from sspcompile.select.budget import bounded, bounds_of, cuts_channels
from sspcompile.select.descent import AT_ONCE, USUAL_ROUNDS
from sspcompile.select.judging import REFITS, spread
from sspcompile.select.peers import GRADIENT_PASSES, GRADIENTS, INPUTS, scored_by_peers
from sspcompile.select.reading import MIXTURE_TEXTS
from sspcompile.select.scoring import CURVATURE_TEXTS, INFLUENCES, cached_keys, reads_cache, source_of
from sspcompile.select.search import COMPARED_FIT, COMPARED_HELD, HOLD_EVERY
from sspcompile.select.selection import RATES, RUNS, SHAPES
from sspcompile.slicing.layouts import uniform_choices
from sspcompile.slicing.measures import Bound, of_size
from sspcompile.slicing.sizes import even_worth, per_layer_counts, smallest_size
from sspcompile.workspace import Workspace

# Budgets that only the scenario, or a measurement, makes known: of the heads, and of all parameters.
UNKNOWN_KEEP = 0.5
UNKNOWN_SIZE = 0.85
# Both models as stored and rounded in two precisions, and in ONNX Runtime the dense one once more.
WEIGHED = 7
# float64 against float32, where a processor computes.
DOUBLE = 2.0
# What removing the heads of a layer with n inputs takes, in n^3 multiplications of a pass: thin products in float64,
# inverses of small blocks, copies. Measured at n of 576 and 2048, where it came to 24 and 20.
REMOVING = 20


@dataclass(frozen=True)
class Stage:
    """`passes` of the decoder over `tokens` of `texts`; a stage's cost is the product. `steps`: decoding steps, which
    are bound by reading the weights instead. `masks`: how many are repaired at a time, whose hidden states are held;
    `down_projs`: of how many of them the fitted down_proj of every layer is held, too.
    """

    name: str
    texts: int
    tokens: int
    passes: float
    steps: int = 0
    masks: int = 0
    down_projs: int = 0


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
        tokens = continued(pool, lengths, options.continuation_tokens)
        yield _continuing("continuations of the pools", pool, lengths, options.continuation_tokens)
        for key in missing:
            yield Stage(f"{key} on the pools", len(pool), tokens, _passes_of(key, loaded))


def reading(request: Request, loaded: LoadedModel, lengths: Lengths, parts: Parts) -> Iterator[Stage]:
    """What is measured before there is a mask."""
    if request.scenario.domains is None:
        read = thinned(request.scenario.texts, MIXTURE_TEXTS)
        tokens = recognition_tokens(request, loaded, read)
        yield Stage("what the scenario is made of", len(read), tokens, _recognising(loaded))
    yield _continuing("continuations", parts.every, lengths, request.options.continuation_tokens)
    held = (parts.guard, parts.judge, parts.off, parts.spared, parts.told)
    yield Stage("dense model on held-out texts", sum(one.texts for one in held), sum(one.tokens for one in held), 1)
    yield from _scoring(request, loaded, parts.fit)


def deciding(
    request: Request, dense: DenseModel, loaded: LoadedModel, lengths: Lengths, parts: Parts, placement: Placement
) -> Iterator[Stage]:
    """What `select` measures, and the proof."""
    options = request.options
    yield from reading(request, loaded, lengths, parts)
    layouts, width = _masks(request, loaded)[1], refitted_width(request, loaded)
    if options.floored:
        name = "repairing masks on the way to the smallest"
        once = repairing(name, _compared(parts.fit), [width] * AT_ONCE, request, dense, loaded)
        yield replace(once, passes=USUAL_ROUNDS * once.passes)
        yield Stage("measuring masks on the way to the smallest", *parts.guard, 2 * USUAL_ROUNDS * AT_ONCE)
    yield from comparing(request, dense, loaded, parts.fit)
    if layouts > 1:
        yield Stage("comparing layouts", *parts.guard, 2 * layouts)
    sized = bool(_bounds(request, loaded))
    peers = scored_by_peers(loaded.geometry, cuts_channels(options, loaded.geometry))
    whole = options.whole is not None
    rivals = most_rivals(options.baselines, source_of(request), sized=sized, whole=whole, peers=peers)
    if options.baselines == "all" and sized and not whole:
        yield from _rivalling(loaded, parts.fit.some(CURVATURE_TEXTS), peers=peers)
    yield repairing("repairing this build and its baselines", parts.fit, [width] * (1 + rivals), request, dense, loaded)
    yield Stage("judging the repair", *parts.guard, 2)
    yield Stage("judging this build and its baselines", *parts.reported, 2 + rivals)
    yield from _sparing(parts, USUAL_ROUNDS * AT_ONCE if options.floored else 0, layouts)
    if options.quantize is not None:
        if options.repair in REFITS:
            every = widest_refit(request, loaded)
            yield repairing("repairing what will be rounded", parts.fit, [every], request, dense, loaded)
            yield Stage("judging that repair", *parts.guard, 2)
        yield Stage("weighing what is rounded", *parts.judge, WEIGHED)
    yield proving(request, dense, lengths, parts, placement)


def _rivalling(loaded: LoadedModel, read: Part, *, peers: bool) -> Iterator[Stage]:
    """What scores all baselines within bounds on parameters; published pruners where they score what may go."""
    if peers:
        yield Stage(INPUTS, *read, 1)
    if peers and has_gradients(loaded):
        yield Stage(GRADIENTS, *read, GRADIENT_PASSES)
    yield Stage("influence of layers (baseline)", *read, 1)


def comparing(request: Request, dense: DenseModel, loaded: LoadedModel, fit: Part) -> Iterator[Stage]:
    """Masks of one budget, each repaired on a part of the texts that fit and measured on another."""
    masks, _ = _masks(request, loaded)
    if masks > 1:
        widths = [refitted_width(request, loaded)] * masks
        yield repairing(f"repairing {masks} masks to compare", _compared(fit), widths, request, dense, loaded)
        count = min(fit.texts // HOLD_EVERY, COMPARED_HELD)
        yield Stage("comparing masks", *fit.some(count), 1 + masks)


def _compared(fit: Part) -> Part:
    """Of the texts that fit, those that repair masks to be compared."""
    return fit.some(min(fit.texts - fit.texts // HOLD_EVERY, COMPARED_FIT))


def proving(request: Request, dense: DenseModel, lengths: Lengths, parts: Parts, placement: Placement) -> Stage:
    """Layer by layer nothing is decoded. Whole models decode probes of one length by twos, dense and cut ones."""
    probes = probe_tokens(request, lengths, parts)
    alike = [probes.count(length) for length in set(probes)]
    steps = NEW_TOKENS * sum(-(-count // TOGETHER) for count in alike)
    reading = 1 if goes_layerwise(dense.checkpoint, placement) else steps
    return Stage("proof", len(probes), sum(probes), 2 * DOUBLE, steps=int(2 * DOUBLE * reading))


def probe_tokens(request: Request, lengths: Lengths, parts: Parts) -> list[int]:
    """Tokens of the texts that prove what is written."""
    new = request.options.continuation_tokens
    return spread(sorted(min(PROBE_TOKENS, length + new) for length in lengths.of(parts.judged)))


def _scoring(request: Request, loaded: LoadedModel, fit: Part) -> Iterator[Stage]:
    """Of the texts that choose, some are read where one pass scores all units."""
    options, some = request.options, fit.some(CURVATURE_TEXTS)
    if options.whole is not None:
        yield Stage(INFLUENCES[options.whole], *some, 1)
    elif options.criterion == AUTO:
        yield Stage("head scores", *some, _gradient_passes(loaded, some.tokens))
    elif source_of(request) != "domains":
        yield Stage("head scores", *fit, _passes_of(options.criterion, loaded))


def _sparing(parts: Parts, walked: int, layouts: int) -> Iterator[Stage]:
    """What is protected: read for every mask on the way, for each of several layouts and twice for what is built, and
    judged.
    """
    if parts.spared.texts:
        compared = layouts if layouts > 1 else 0
        yield Stage("measuring what is protected", *parts.spared, walked + compared + 2)
        yield Stage("judging what is protected", *parts.told, 1)


def repairing(
    name: str, read: Part, widths: Sequence[int | None], request: Request, dense: DenseModel, loaded: LoadedModel
) -> Stage:
    """The dense model once for every round of masks, and each mask; `widths` as `refitted_width` has them."""
    repair, masks = request.options.repair, len(widths)
    if repair == "none":
        return Stage(name, *read, 0)
    if repair == "flap-bias":
        return Stage(name, *read, 1)  # of the dense model, for all masks
    down = any(width is not None for width in widths)
    at_once = min(masks, masks_at_once(loaded, read.tokens, refitted_dtype(dense.checkpoint), down=down))
    passes = -(-masks // at_once) + sum(_mask_passes(loaded.geometry, width, read.tokens) for width in widths)
    return Stage(name, *read, passes, masks=at_once, down_projs=at_once if down else 0)


def _continuing(name: str, prompts: Sequence[Prompt], lengths: Lengths, new: int) -> Stage:
    """The prompts that the model continues once, then a step for each new token of each batch."""
    prompts = [prompt for prompt in prompts if is_open(prompt)]
    tokens = lengths.sum(prompts)
    batches = -(-tokens // BATCH_TOKENS)
    return Stage(name, len(prompts), tokens, 1, steps=batches * max(0, new - 1))


def layer_parameters(loaded: LoadedModel) -> int:
    return sum(p.numel() for p in loaded.layers[-1].parameters())


def _gradient_passes(loaded: LoadedModel, tokens: int) -> float:
    """Forward, forward again, backward, and two products of inputs [n] with themselves in every layer; then, whatever
    the texts, the heads of a layer are removed one by one.
    """
    n = loaded.geometry.heads * loaded.geometry.head_dim
    removing = REMOVING * n**3 / (layer_multiplications(loaded.geometry) * max(1, tokens))
    return 3 + 2 * n * n / layer_parameters(loaded) + removing


def _passes_of(key: str, loaded: LoadedModel) -> float:
    """A backward pass without gradients of weights is as dear as a forward one."""
    criterion, granularity = of_key(key)
    units = loaded.geometry.total_heads if granularity == "head" else loaded.geometry.layers * loaded.geometry.kv_heads
    found = criterion.per_prompt(units)
    return found.forward + found.backward


def refitted_width(request: Request, loaded: LoadedModel) -> int | None:
    """Channels of an MLP, or of an expert, that a repair fits its down projection to, on average over layers; None
    where that stays as it was.
    """
    g, bounds = loaded.geometry, _bounds(request, loaded)
    if request.options.whole is not None:
        return g.intermediate if g.is_dense else None
    if bounds and cuts_channels(request.options, g):
        groups_only = request.options.granularity == "group"
        (counts,) = per_layer_counts(even_worth(g, channels=True), g, [bounds], groups_only=groups_only)
        return round(sum(counts.widths) / g.layers)
    return g.intermediate if request.options.repair == "least-squares-mlp" else None


def widest_refit(request: Request, loaded: LoadedModel) -> int | None:
    """The same of all repairs of a build: one that knows of a rounding to come fits every down_proj."""
    width, options = refitted_width(request, loaded), request.options
    rounds = options.quantize is not None and options.repair in REFITS
    return loaded.geometry.intermediate if width is None and rounds else width


def _bounds(request: Request, loaded: LoadedModel) -> tuple[Bound, ...]:
    """The budget as bounds on parameters and memory; nothing where it is one of the heads."""
    options, g = request.options, loaded.geometry
    if bounded(options):
        return bounds_of(options, Checkpoint(loaded.path))
    if options.floored and options.whole is not None:
        return (of_size(g, UNKNOWN_SIZE),)
    if not options.floored or not cuts_channels(options, g):
        return ()
    smallest = smallest_size(g, channels=True, groups_only=options.granularity == "group")
    return (of_size(g, max(UNKNOWN_SIZE, smallest)),)


def _mask_passes(g: Geometry, width: int | None, tokens: int) -> float:
    """Of one mask that is repaired: each layer once, normal equations in float64 and their solution. Where down_proj is
    refitted to `width` channels, what comes before it once more, and a system in fp32. Where those of experts are, the
    MLP twice more, once with all experts and then one by one, and a system for each.
    """
    n, d = g.heads * g.head_dim, g.hidden
    mlp, layer = 3 * d * g.visited, layer_multiplications(g)
    passes = 1 + DOUBLE * (_normal(n, d) + _solving(n, d) / max(1, tokens)) / layer
    if width is None:
        return passes
    if g.is_dense:
        again = 2 * mlp / 3 + _normal(width, d) + DOUBLE * _solving(width, d) / max(1, tokens)
    else:
        rows = tokens * g.active_experts / g.experts
        again = 2 * mlp + g.experts * _fitting(rows, width, d) / max(1, tokens)
    return passes + again / layer


def _fitting(rows: float, inputs: int, outputs: int) -> float:
    """Multiplications in all of the system that `repair/systems.py` makes of so many rows."""
    if rows < inputs:
        return rows**2 * inputs + 2 * rows * inputs * outputs + DOUBLE * _solving(rows, outputs)
    return rows * _normal(inputs, outputs) + DOUBLE * _solving(inputs, outputs)


def layer_multiplications(g: Geometry) -> int:
    """Of a token that passes a layer."""
    return (2 * g.heads + 2 * g.kv_heads) * g.head_dim * g.hidden + 3 * g.hidden * g.visited


def _normal(inputs: int, outputs: int) -> int:
    """Multiplications for one token."""
    return inputs * (inputs + outputs)


def _solving(inputs: float, outputs: int) -> float:
    """Multiplications in all: a factorisation, and two triangular systems for each output."""
    return inputs**3 / 3 + inputs**2 * outputs


def _masks(request: Request, loaded: LoadedModel) -> tuple[int, int]:
    """How many masks are compared, and of how many layouts."""
    options, g = request.options, loaded.geometry
    layouts = {"auto": ("uniform", "per-layer"), "uniform": ("uniform",), "per-layer": ("per-layer",)}[options.layout]
    if options.layout == "auto" and options.wanted_host is not None:
        layouts = ("uniform",)
    if options.whole is not None:
        return 1 + (RUNS if options.whole == "layers" else 0), 1
    if _bounds(request, loaded) and options.criterion == AUTO:
        per_layer = len(RATES) if cuts_channels(options, g) else 1
        return sum(SHAPES if name == "uniform" else per_layer for name in layouts), len(layouts)
    if options.floored and options.layout == "auto":
        layouts = ("per-layer",)  # few uniform shapes keep as much as a bound on the loss leaves
    if options.criterion != AUTO:
        return len(layouts), len(layouts)
    keep = options.keep if options.keep is not None else UNKNOWN_KEEP
    rankings = 2 if reads_cache(source_of(request)) else 1
    shapes = uniform_choices(np.ones((g.layers, g.heads)), g.kv_heads, keep, groups_only=options.granularity == "group")
    return sum(rankings * (len(shapes) if name == "uniform" else 1) for name in layouts), len(layouts)
