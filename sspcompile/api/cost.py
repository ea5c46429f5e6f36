"""What a build will cost, before it is begun: tokens, forward passes per stage, minutes here, and peak memory.

Stages are counted in forward passes of the decoder over one token (`stages`); one short pass on this machine turns them
into seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sspcompile.api.latency import in_parameters, table_for
from sspcompile.api.member_stages import deciding_members
from sspcompile.api.parts import Lengths, parts_of
from sspcompile.api.stages import (
    Stage,
    deciding,
    layer_parameters,
    learning,
    recognised,
    recognition_tokens,
    widest_refit,
)
from sspcompile.model.chat import rendering_of, template_digest
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import DenseModel
from sspcompile.model.logits import LOGITS_AT_ONCE
from sspcompile.model.placement import ANYWHERE, Placement, wait_for
from sspcompile.model.text import BATCH_TOKENS, GRADIENT_TOKENS, Batch, Sentence, batches_of, greedy, sentences
from sspcompile.model.working import refitted_bytes, repair_bytes
from sspcompile.nested.choose import one_size
from sspcompile.prepare import unlearned
from sspcompile.prepare.toolkits import is_stated, stored_toolkit
from sspcompile.repair.repair import refitted_dtype
from sspcompile.request.pools import pools_of
from sspcompile.request.prompts import Prompt
from sspcompile.request.request import Request
from sspcompile.request.splits import thinned
from sspcompile.select.mixture import Mixture, given_mixture
from sspcompile.select.peers import GRADIENTS
from sspcompile.select.reading import mixture_through
from sspcompile.select.scoring import cached_keys, source_of
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
# With what was freed and is not given back, where no limit is stated: on SmolLM2-135M (2.4 GB at the peak) twice as
# much again as is in use.
ALLOCATOR = 3
# What starting two processes and writing take beside any pass, in seconds; loading is timed.
STARTING = 11.0


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
    """Count the stages of a build, and run one short pass and a few decoding steps to time them. A bound on time is
    counted as the size that it comes to; the layers that it is measured by are timed here already.

    Raises what loading the model and reading the prompts raise.
    """
    table = table_for(request.options, dense.checkpoint, workspace, placement)
    request = in_parameters(request, dense.checkpoint, table)
    begun = time.perf_counter()
    loaded = dense.load(placement=placement, rendering=rendering_of(request.options))
    loading = time.perf_counter() - begun
    lengths, shares = Lengths(loaded, request.options.max_tokens), request.options.shares
    decided = deciding_members if shares else deciding
    parts = parts_of(request, lengths, _mixture(request, dense, loaded, workspace))
    decide = decided(request, dense, loaded, lengths, parts, placement)
    if shares:
        request = one_size(request, shares[1])  # the largest that is refitted
    stages = (*learning(request, dense, loaded, workspace, lengths), *decide)
    own = source_of(request) == "prompts"
    read, other = recognised(pools_of(request.options))
    pooled = [*read, *other]
    tokens = lengths.sum(request.scenario.prompts) if own else recognition_tokens(request, loaded, pooled)
    sample = _sample(request.scenario.prompts if own else pooled, lengths)
    per_token, per_step = _speed(loaded, sample)
    # A batch costs a step beside its tokens: the weights are read once, from memory or from disk.
    taken = tuple(
        s.passes * (s.tokens * per_token + -(-s.tokens // BATCH_TOKENS) * per_step) + s.steps * per_step for s in stages
    )
    seconds, whole = STARTING + loading + sum(taken), tokens * per_token + -(-tokens // BATCH_TOKENS) * per_step
    written, widest = refitted_dtype(dense.checkpoint), widest_refit(request, loaded)
    peak = _peak(loaded, stages, lengths, widest, written, limited=placement.memory is not None)
    return Cost(
        stages=stages,
        stage_seconds=taken,
        tokens=tokens,
        passes=seconds / whole,
        seconds=seconds,
        peak_bytes=peak,
        seconds_per_pass=whole,
        device=str(loaded.device),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _mixture(request: Request, dense: DenseModel, loaded: LoadedModel, workspace: Workspace) -> Mixture | None:
    """What the scenario is made of, where it says so itself, or where pools' texts stand in for its own and an earlier
    build has learned to tell them apart; None otherwise.
    """
    scenario, options = request.scenario, request.options
    if scenario.domains is not None and is_stated(scenario, options, cached_keys(request)):
        return given_mixture(unlearned(loaded, pools_of(options).candidates), scenario.domains, source=scenario.name)
    if source_of(request) == "prompts":
        return None
    digest = template_digest(loaded.tokenizer, loaded.rendering)
    toolkit = stored_toolkit(dense, options, workspace, digest)
    return None if toolkit is None else mixture_through(request, toolkit, loaded)


def _sample(prompts: Sequence[Prompt], lengths: Lengths) -> tuple[Prompt, ...]:
    """Texts of about SAMPLE_TOKENS, evenly spaced."""
    return thinned(prompts, max(1, int(SAMPLE_TOKENS / max(1.0, lengths.mean(prompts)))))


def _first(items: Sequence[Sentence], tokens: int) -> Sequence[Sentence]:
    """The first sentences of `tokens` in all, at least one."""
    ends = np.cumsum([len(item.ids) for item in items])
    return items[: max(1, int((ends <= tokens).sum()))]


@torch.inference_mode()
def _speed(loaded: LoadedModel, sample: Sequence[Prompt]) -> tuple[float, float]:
    """Seconds of a forward pass per token beside those of a step, and of a decoding step of a batch.

    Each is the better of two, and one has to do where weights are read for seconds from disk each time.
    """
    every = sentences(loaded.tokenizer, sample, loaded.positions or BATCH_TOKENS, loaded.rendering)

    def forward(batches: Sequence[Batch]) -> None:
        for batch in batches:
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    few = _first(every, LEAST_TOKENS)
    short = batches_of(loaded, few)
    forward(short)  # warm
    first = _seconds(loaded, partial(forward, short))
    rate, repeats = sum(len(item.ids) for item in few) / first, 2 if first < SAMPLE_SECONDS else 1
    items = _first(every, max(LEAST_TOKENS, int(rate * SAMPLE_SECONDS)))
    batches = batches_of(loaded, items)
    passed = min(_seconds(loaded, partial(forward, batches)) for _ in range(repeats))
    one, several = (
        min(_seconds(loaded, partial(greedy, loaded, few, n)) for _ in range(repeats)) for n in (1, 1 + STEPS)
    )
    step = min(max(0.0, several - one) / STEPS, passed / (2 * len(batches)))
    return (passed - len(batches) * step) / sum(len(item.ids) for item in items), step


def _seconds(loaded: LoadedModel, run: Callable[[], object]) -> float:
    devices = {loaded.device, *(p.device for p in loaded.model.parameters())}
    wait_for(*devices)
    start = time.perf_counter()
    run()
    wait_for(*devices)
    return time.perf_counter() - start


def _peak(
    loaded: LoadedModel,
    stages: Sequence[Stage],
    lengths: Lengths,
    refitted: int | None,
    written: torch.dtype,
    *,
    limited: bool,
) -> int:
    """Weights, then the dearest of: gradients of a batch, what a repair holds (`_repairing`), activations of a layer.

    `refitted`: to how many channels down_proj is refitted at most, None where it is not; `written`: its dtype.
    """
    g = loaded.geometry
    n, width = g.heads * g.head_dim, 4
    # Of weights that lie on disk, those of the layer that runs are in memory.
    held = {id(p): p for p in loaded.model.parameters() if not p.is_meta}
    weights = sum(p.numel() * p.element_size() for p in held.values())
    if any(p.is_meta for p in loaded.model.parameters()):
        weights += layer_parameters(loaded) * width
    batch = max(BATCH_TOKENS, lengths.longest)
    layer = batch * (3 * g.visited + 6 * g.hidden + 4 * n) * width
    logits = 6 * LOGITS_AT_ONCE * width
    backward = max(GRADIENT_TOKENS, lengths.longest) / batch
    gradients = backward * ((g.layers + 2) * batch * g.hidden * width + 2 * layer) + logits
    beside = 2 * g.layers * n * n * width  # curvature
    if any(stage.name == GRADIENTS for stage in stages):
        beside = max(beside, layer_parameters(loaded) * g.layers * width)
    states = max((_repairing(loaded, one, refitted, written) for one in stages if one.masks), default=0)
    more = 1 if limited else ALLOCATOR
    return int(LIBRARIES + weights + max(beside + more * gradients, more * (layer + max(states, logits))))


def _repairing(loaded: LoadedModel, stage: Stage, refitted: int | None, written: torch.dtype) -> int:
    """The larger of what is held while masks are fitted and while one of them is measured."""
    g, width, computing = loaded.geometry, 4, loaded.model.dtype
    # Fitted matrices lie in the memory of the machine, as they will be written.
    in_place = written == computing and loaded.device.type == "cpu"
    sizes = written.itemsize, computing.itemsize
    repairs, copy = refitted_bytes(g, stage.down_projs, *sizes, in_place=in_place)
    # Of the layer that is fitted: what its attention puts out, and of experts their inputs and what they have to add.
    fitted, states = 1 if g.is_dense else 3, stage.tokens * g.hidden * width
    fitting = (2 + fitted) * states + repair_bytes(g, refitted)
    return int(stage.masks * states + repairs + max(fitting, copy))
