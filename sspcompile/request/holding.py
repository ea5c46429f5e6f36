"""Whether a scenario that says itself what it is about leaves texts to guard and to judge by."""

from __future__ import annotations

from pathlib import Path

from sspcompile.errors import InputError
from sspcompile.request.options import Options
from sspcompile.request.pools import pools_of
from sspcompile.request.scenario import Scenario
from sspcompile.request.splits import FEWEST, Holding, split


def demand_held_out(scenario: Scenario, options: Options) -> None:
    """Raise InputError for stated domains whose pools are too small to hold prompts out, where the scenario's own do
    not guard and judge. What domains a scenario has that states none, nobody knows before it is read.
    """
    _, guard, judge = split(scenario.prompts, holding=Holding.SPACED)
    if scenario.domains is None or (guard and judge):
        return
    for pool in pools_of(options).candidates:
        count = len(pool.prompts)
        if scenario.domains.get(pool.name, 0.0) > 0 and count < FEWEST:
            file = Path(options.pools or "") / f"{pool.name}.yaml"
            raise InputError(
                f"The pool {pool.name} has {count} prompt{'s' if count > 1 else ''}, of which none can be held out to "
                f"guard and to judge a build: {FEWEST} are needed.",
                hint=f"Add {FEWEST - count} or more to {file}, or give {scenario.name} {FEWEST} prompts of its own "
                "that begin differently.",
            )
