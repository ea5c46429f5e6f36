"""What sizes a model can be cut to, counted before any weight is read: uniform and per layer, down to the smallest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.errors import InputError, UnsupportedModelError
from sspcompile.families import Geometry
from sspcompile.request.options import WHOLE_LAYOUTS, Whole
from sspcompile.slicing.depth import any_layers, shallowest
from sspcompile.slicing.layouts import GONE
from sspcompile.slicing.mask import Layout
from sspcompile.slicing.measures import SECOND, Bound, Measure, Serving, at_most, memory_of, parameters_of, shared
from sspcompile.slicing.plan import host_of
from sspcompile.slicing.sizes import (
    Counts,
    even_worth,
    per_layer_counts,
    smallest_counts,
    uniform_counts,
    uniform_worth,
)

SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Reach:
    """What is left at most at the `share` of all parameters that is asked for (None: the smallest possible model).

    `size` is what is left of all parameters as a share, `memory_bytes` weights and KV cache while it serves,
    `token_seconds` the time of a decoded token where a table foretells it.
    """

    share: float | None
    layout: Layout
    size: float
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    memory_bytes: int
    heads: int
    channels: int
    token_seconds: float | None = None


@dataclass(frozen=True)
class Frontier:
    """Every size by layout, the largest first, what memory and time are counted for, and what goes to reach it."""

    serving: Serving
    cutting: str
    points: tuple[Reach, ...]

    def as_mapping(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def frontier_of(
    checkpoint: Checkpoint,
    serving: Serving,
    layouts: Sequence[Layout],
    *,
    channels: bool,
    whole: Whole | None = None,
    host: str | None = None,
    groups_only: bool = False,
    latency: Measure | None = None,
) -> Frontier:
    """The sizes that `plan_within` finds for SHARES and for the smallest model: the counts of any mask of that budget.
    `latency` counts the time of a token (`slicing.latency`).

    A layout is left out where no class holds it. Raises what opening the headers of the checkpoint raises.
    """
    g = checkpoint.geometry
    parameters = parameters_of(g, checkpoint.expected(), host)
    if whole is not None:
        smallest = shallowest(parameters, whole)
    else:
        least = smallest_counts(g, channels=channels, groups_only=groups_only)
        smallest = parameters.kept(g, least.shapes, least.widths)
    budgets: list[tuple[float | None, Bound]] = [(share, shared(parameters, share, "--size")) for share in SHARES]
    # With a host that adds biases even the whole model has more than it had.
    budgets = [(share, bound) for share, bound in budgets if bound.most > smallest]
    budgets.append((None, at_most(parameters, smallest, "--size")))
    worth, counted = even_worth(g, channels=channels), _Counted.of(checkpoint, serving, host, latency)
    bounds = [(bound,) for _, bound in budgets]
    found: dict[Layout, list[Counts | None]] = {}
    if whole is not None:
        found[WHOLE_LAYOUTS[whole]] = [Counts(any_layers(g, one, whole).shapes) for one in bounds]
    elif "uniform" in layouts:
        value = uniform_worth(worth, g)
        every = (uniform_counts(g, one, channels=channels, groups_only=groups_only) for one in bounds)
        found["uniform"] = [_held(g, sorted(counts, key=value, reverse=True), host) for counts in every]
    if "per-layer" in layouts and whole is None:
        found["per-layer"] = [*per_layer_counts(worth, g, bounds, groups_only=groups_only)]
    points = [
        counted.reach(g, share, layout, parameters, counts)
        for number, (share, _) in enumerate(budgets)
        for layout, some in found.items()
        if (counts := some[number]) is not None
    ]
    cutting = (
        {"layers": "whole layers", "attention": "the attention of layers"}[whole] if whole is not None else "heads"
    )
    return Frontier(serving, f"{cutting} and channels" if channels and whole is None else cutting, tuple(points))


@dataclass(frozen=True)
class _Counted:
    """Bytes of weights alone, with the cache of one token, and while the model serves; and the time of a token."""

    weights: Measure
    with_token: Measure
    served: Measure
    latency: Measure | None

    @staticmethod
    def of(checkpoint: Checkpoint, serving: Serving, host: str | None, latency: Measure | None) -> _Counted:
        weights, with_token, served = (
            memory_of(checkpoint, one, host) for one in (Serving(0, 1), Serving(1, 1), serving)
        )
        return _Counted(weights, with_token, served, latency)

    def reach(self, g: Geometry, share: float | None, layout: Layout, parameters: Measure, counts: Counts) -> Reach:
        def kept(one: Measure) -> int:
            return one.kept(g, counts.shapes, counts.widths)

        left, weights = kept(parameters), kept(self.weights)
        whole = sum(shape != GONE for shape in counts.shapes) * g.width
        return Reach(
            share=share,
            layout=layout,
            size=left / parameters.whole,
            parameters=left,
            weight_bytes=weights,
            kv_bytes_per_token=kept(self.with_token) - weights,
            memory_bytes=kept(self.served),
            heads=sum(groups * each for groups, each in counts.shapes),
            channels=g.mlps * (sum(counts.widths) if counts.widths else whole),
            token_seconds=None if self.latency is None else kept(self.latency) / SECOND,
        )


def _held(g: Geometry, best_first: Iterable[Counts], host: str | None) -> Counts | None:
    """The first uniform counts that a class holds."""
    for counts in best_first:
        try:
            host_of(g, counts.shapes, host, widths=counts.widths)
        except (UnsupportedModelError, InputError):  # another shape may fit
            continue
        return counts
    return None
