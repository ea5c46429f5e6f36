"""What can be said of options before any model is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sspcompile.criteria import criterion
from sspcompile.families import positions_of
from sspcompile.request.options import AUTO, Options
from sspcompile.request.pools import pools_of
from sspcompile.request.protecting import demand_protected


def context_warning(options: Options, config: Mapping[str, Any]) -> str | None:
    """A sentence where memory and time are to be counted for more tokens than a configuration has positions."""
    longest = positions_of(config)
    if options.context is None or longest is None or options.context <= longest:
        return None
    return (
        f"--context {options.context} is more than the {longest:,} positions that the model has; memory and time are "
        "counted for texts that it was not made to read."
    )


def demand_settings(options: Options) -> None:
    """Raise InputError for a criterion that there is not, for pools that cannot be read or counted to so many axes, and
    for a protected domain that has none."""
    if options.criterion != AUTO:
        criterion(options.criterion)
    # To read the pools takes a moment, and a plan by counts alone needs none of them.
    if options.pools is not None or options.axes is not None:
        pools_of(options)
    demand_protected(options)
