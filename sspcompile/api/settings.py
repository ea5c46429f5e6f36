"""What can be said of options before any model is looked at."""

from __future__ import annotations

from sspcompile.criteria import criterion
from sspcompile.request.options import AUTO, Options
from sspcompile.request.pools import pools_of
from sspcompile.request.protecting import demand_protected


def demand_settings(options: Options) -> None:
    """Raise InputError for a criterion that there is not, for pools that cannot be read or counted to so many axes, and
    for a protected domain that has none."""
    if options.criterion != AUTO:
        criterion(options.criterion)
    # To read the pools takes a moment, and a plan by counts alone needs none of them.
    if options.pools is not None or options.axes is not None:
        pools_of(options)
    demand_protected(options)
