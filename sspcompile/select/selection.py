"""What a build decides, as one value: what is kept, by which score, what was tried, what it costs, and the repair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch

from sspcompile.errors import InputError, UnsupportedModelError
from sspcompile.families import Geometry
from sspcompile.model.decoder import LoadedModel
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress, silent
from sspcompile.repair.repair import Repair
from sspcompile.request.options import AUTO
from sspcompile.request.pools import pools_of
from sspcompile.request.request import Request
from sspcompile.request.splits import Splits, draw_splits
from sspcompile.select.baselines import Baseline, measure_baselines
from sspcompile.select.judging import Decision, Judge, Reported, decide
from sspcompile.select.reading import Ranking, Reading, choices_for, read_through
from sspcompile.select.search import Searched, Tried, best_mask, rankings
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.mask import HeadMask, Layout, kept_of
from sspcompile.slicing.plan import host_of


@dataclass(frozen=True)
class Selection:
    """Everything that a build decided about a model, and what that was decided on.

    `mask` names every kept unit, the score that ranked them and the scenario they are for; `repair` is what the kept
    ones are refitted to, None for none. `cost` is the divergence from the dense model on texts that decided nothing,
    `decision` the layouts that were measured, `tried` the masks that were compared on the way (best first, empty where
    the score was given), `baselines` what else could have been cut at this budget. `splits` are the texts, `probes`
    token ids [prompts][tokens] of some that decided nothing, to prove the cut with.
    """

    reading: Reading
    mask: HeadMask
    repair: Repair | None
    cost: Reported
    decision: Decision
    tried: tuple[Tried, ...]
    baselines: tuple[Baseline, ...]
    splits: Splits
    probes: tuple[tuple[int, ...], ...]


def select(
    request: Request, toolkit: Toolkit, loaded: LoadedModel, *, dtype: torch.dtype, progress: Progress = silent
) -> Selection:
    """Decide what stays of a model for a scenario, by measuring masks against the dense model.

    `dtype` is the one that refitted weights will be written in: what is measured is what is written. Raises BudgetError
    for a budget below the floors, and what `choices_for` raises.
    """
    reading = read_through(request, toolkit, loaded, progress)
    geometry = loaded.geometry
    choices = dict(choices_for(reading, geometry))
    splits = splits_for(reading)
    judge = Judge(loaded, splits, request.options, dtype=dtype, progress=progress)
    searched = search(judge, reading, choices, geometry) if request.options.criterion == AUTO else {}
    choices |= {layout: found.choice for layout, found in searched.items()}
    measured = judge.candidates(list(choices.items()), "layouts")
    decision = decide(dict(zip(choices, measured, strict=True)))
    chosen = decision.chosen
    best = searched.get(chosen.layout)
    tried = best.tried if best is not None else ()
    ranking = best.ranking if best is not None else reading.ranking
    return Selection(
        reading=reading,
        mask=mask_of(reading, loaded, chosen.choice, chosen.layout, ranking, tried),
        repair=chosen.final_repair,
        cost=judge.reported(chosen),
        decision=decision,
        tried=tried,
        baselines=measure_baselines(judge, reading, toolkit, chosen.layout),
        splits=splits,
        probes=tuple(map(tuple, judge.probes())),
    )


def splits_for(reading: Reading) -> Splits:
    """The texts of a build, drawn from the scenario and the pools."""
    options = reading.options
    pools = pools_of(options).named(reading.mixture.domains)
    return draw_splits(reading.request.scenario.prompts, reading.mixture.parts, pools, options.seed)


def search(
    judge: Judge, reading: Reading, choices: Mapping[Layout, Choice], geometry: Geometry
) -> dict[Layout, Searched]:
    """The best measured choice of every layout in which something is cut and a class holds one."""
    cut = [layout for layout, choice in choices.items() if not choice.kept.all()]
    if not cut:
        return {}

    def holds(layout: Layout, choice: Choice) -> bool:
        try:
            host_of(geometry, choice.shapes, reading.options.wanted_host, layout=layout)
        except (UnsupportedModelError, InputError):
            return False
        return True

    ranked = rankings(judge, reading.ranking, cut, reading.options.granularity)
    found = {
        layout: best_mask(
            judge,
            ranked,
            layout,
            reading.whitelist,
            reading.keep,
            groups_only=reading.groups_only,
            holds=partial(holds, layout),
        )
        for layout in cut
    }
    return {layout: one for layout, one in found.items() if one is not None}


def mask_of(
    reading: Reading,
    loaded: LoadedModel,
    choice: Choice,
    layout: Layout,
    ranking: Ranking | None = None,
    tried: tuple[Tried, ...] = (),
) -> HeadMask:
    """The mask as a value that can be saved; whitelisted heads are those which the choice kept.

    `ranking` is what the heads were chosen by, where it was not the scenario's own.
    """
    ranking = ranking or reading.ranking
    g, scenario = loaded.geometry, reading.request.scenario
    privileged = np.argwhere(reading.whitelist & choice.kept)
    facts = {
        "name": scenario.name,
        "source": scenario.source,
        **reading.mixture.as_mapping(),
        "importance": reading.scores.as_mapping(),
        "without": list(reading.options.without),
        "repair": reading.options.repair,
    }
    if tried:
        facts["tried"] = [asdict(one) for one in tried]
    return HeadMask(
        model=loaded.fingerprint,
        layers=g.layers,
        heads=g.heads,
        kv_heads=g.kv_heads,
        kept=kept_of(choice.kept),
        layout=layout,
        keep_requested=reading.keep,
        keep_achieved=choice.ratio,
        scores=tuple(tuple(float(f"{score:.6g}") for score in row) for row in ranking.values),
        whitelist=tuple((int(layer), int(head)) for layer, head in privileged),
        criterion=ranking.name,
        scenario=facts,
    )
