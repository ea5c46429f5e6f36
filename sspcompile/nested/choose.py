"""One selection for all sizes: one worth of units, a budget for each size, and the repair of each.

Channels against heads is settled once, by measuring masks of the middle size; masks of one worth are nested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.errors import UnsupportedModelError
from sspcompile.families import Geometry
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import batches_of
from sspcompile.nested.low_rank import Stored
from sspcompile.nested.order import Order, Size, order_of, prefix_of
from sspcompile.nested.truncating import Energies, Place, Pool, Truncated, budget_of, energies_of, places_of, repair_of
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress, silent, stage_of
from sspcompile.request.request import Request
from sspcompile.request.splits import thinned
from sspcompile.select.budget import Budget, bounds_of
from sspcompile.select.judging import Judge, Reported
from sspcompile.select.reading import RATE, Reading, read_through
from sspcompile.select.search import COMPARED_FIT, best_of
from sspcompile.select.selection import RATES, mask_of
from sspcompile.select.texts import Texts
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.mask import HeadMask, Layout
from sspcompile.slicing.plan import host_of
from sspcompile.slicing.sizes import Worth, per_layer_counts, realised


@dataclass(frozen=True)
class Chosen:
    """What is kept at every size, the whole first, before any repair. `probes` as in Selection."""

    reading: Reading
    order: Order
    sizes: tuple[Size, ...]
    choices: tuple[Choice, ...]
    probes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Measured:
    """A member's repair as it is stored, empty where none is kept, and what the member costs on texts that decided
    nothing.
    """

    repair: Mapping[str, Stored]
    cost: Reported


def one_size(request: Request, share: float) -> Request:
    """The request of one member by itself: whole groups, counts by layer."""
    changed = {"nested": None, "size": share, "granularity": "group", "layout": "per-layer"}
    return replace(request, options=request.options.model_copy(update=changed))


def choose_members(
    request: Request, toolkit: Toolkit, loaded: LoadedModel, *, dtype: torch.dtype, progress: Progress = silent
) -> tuple[Chosen, Judge]:
    """Decide what every size keeps. Raises BudgetError for a size below the floors, and what `read_through` raises."""
    shares, g = request.options.shares, loaded.geometry
    smallest = one_size(request, shares[-1])
    texts = Texts(loaded, smallest.options)
    reading = read_through(smallest, toolkit, loaded, texts, progress, build=True)
    judge = Judge(loaded, reading.splits, smallest.options, texts, dtype=dtype, progress=progress)
    checkpoint = Checkpoint(loaded.path)
    budgets = [Budget(bounds=bounds_of(one_size(request, share).options, checkpoint)) for share in shares]
    worth = _settled(judge, reading, g, budgets)
    choices = choices_within(worth, g, budgets)
    sizes = tuple(
        Size(share, _mask(replace(reading, budget=budget), loaded, choice), prefix_of(choice, g))
        for share, budget, choice in zip(shares, budgets, choices, strict=True)
    )
    return Chosen(reading, order_of(worth, g), sizes, choices, tuple(map(tuple, judge.probes()))), judge


def choices_within(worth: Worth, g: Geometry, budgets: Sequence[Budget]) -> tuple[Choice, ...]:
    """The masks of falling budgets, each a part of the one before. Raises BudgetError."""
    every = per_layer_counts(worth, g, [budget.bounds for budget in budgets], groups_only=True)
    return tuple(realised(worth, g, counts, per_layer=True) for counts in every)


def _settled(judge: Judge, reading: Reading, g: Geometry, budgets: Sequence[Budget]) -> Worth:
    """Heads against channels at the rate whose mask of the middle size diverges least once repaired."""
    rates = RATES if reading.scores.channels is not None else (RATE,)
    worths = [reading.worth(rate) for rate in rates]
    cut = budgets[1:]
    masks: dict[bytes, tuple[Worth, Choice]] = {}
    for worth in worths:
        (choice,) = choices_within(worth, g, [cut[len(cut) // 2]])
        masks.setdefault(choice.units.key, (worth, choice))
    if len(masks) == 1:
        return worths[0]
    layout: Layout = "per-layer"
    best = best_of(judge, {layout: tuple((reading.ranking, choice) for _, choice in masks.values())})
    return masks[best[layout].choice.units.key][0]


def _mask(reading: Reading, loaded: LoadedModel, choice: Choice) -> HeadMask:
    return mask_of(reading, loaded, choice, _layout(choice, loaded.geometry))


def _layout(choice: Choice, g: Geometry) -> Layout:
    """Uniform where the counts are and a stock class holds them, which then loads the member cut by itself."""
    if len(set(choice.shapes)) > 1 or len(set(choice.widths)) > 1:
        return "per-layer"
    try:
        host_of(g, choice.shapes, widths=choice.widths or (g.intermediate,) * g.layers)
    except UnsupportedModelError:
        return "per-layer"
    return "uniform"


def measured(chosen: Chosen, judge: Judge, checkpoint: Checkpoint) -> Iterator[Measured]:
    """The members from the whole down. What there is room for of a repair is measured, and stays as a repair does in a
    build of its own. `checkpoint` is the dense one.
    """
    places = [places_of(checkpoint, chosen.order, size.prefix) for size in chosen.sizes]
    rooms = _rooms(chosen, judge, checkpoint, places)
    for member, choice in enumerate(chosen.choices):
        room, rooms[member] = rooms[member], None  # what it has stored goes with it
        stored: Mapping[str, Stored] = {}
        if room is not None and room.room:
            name = f"repair (member {chosen.sizes[member].share:g})"
            stored = room.stored(judge.fitted_as(choice.units, room, name))
        repair = repair_of(stored, places[member], checkpoint)
        if not judge.candidate("per-layer", choice, repair).keeps_repair:
            stored, repair = {}, None
        yield Measured(stored, judge.reported(choice.units, repair))


def _rooms(
    chosen: Chosen, judge: Judge, checkpoint: Checkpoint, places: Sequence[Sequence[Place]]
) -> list[Truncated | None]:
    """How much of each member's repair there is room for, from a fit to some of the texts; None where there is none.
    In full one repair is in memory at a time.
    """
    pool, device = Pool(checkpoint, budget_of(checkpoint)), judge.loaded.device
    batches = batches_of(judge.loaded, thinned(judge.sentences, COMPARED_FIT))
    report = stage_of(judge.progress, "repair (room for members)")
    repairs = judge.fitted([choice.units for choice in chosen.choices], batches, report)
    energies: dict[int, Energies] = {}
    for member, (choice, repair) in enumerate(zip(chosen.choices, repairs, strict=True)):
        if repair is not None:
            energies[member] = energies_of(judge.loaded, choice.units, repair, batches)
            report = stage_of(judge.progress, f"low-rank repair ({chosen.sizes[member].share:g})")
            pool.add(member, places[member], repair, energies[member], device, report)
    return [
        Truncated(checkpoint, places[member], pool.room(member), energies[member], device)
        if member in energies
        else None
        for member in range(len(chosen.choices))
    ]
