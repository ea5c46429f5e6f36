"""What `--protect` names: a domain by its pool, or all that the scenario is not about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sspcompile.errors import InputError
from sspcompile.request.domains import DomainPool
from sspcompile.request.options import Options
from sspcompile.request.pools import pools_of
from sspcompile.request.splits import FEWEST, foreign

# All domains that the scenario is not about, as one; a pool of that name comes first.
GENERAL = "general"


def demand_protected(options: Options) -> None:
    """Raise InputError for a protected domain that is not known, or that has too few prompts."""
    wanted = options.protect or {}
    pools = {pool.name: pool for pool in pools_of(options).every} if wanted else {}
    if absent := [name for name in wanted if name not in pools and name != GENERAL]:
        raise InputError(
            f"--protect names no known domain: {', '.join(absent)}.",
            hint=f"Known: {', '.join(sorted(pools))}, and {GENERAL} for all that the scenario is not about.",
        )
    for name in wanted:
        if name in pools and len(pools[name].prompts) < FEWEST:
            count = len(pools[name].prompts)
            raise InputError(f"--protect {name}: its pool has {count} prompts.", hint=f"Give it {FEWEST} or more.")


def protected_pools(
    options: Options, parts: np.ndarray, pools: Sequence[DomainPool]
) -> Mapping[str, tuple[DomainPool, ...]]:
    """The pools of everything that is protected, by name. `parts` [K] is what each of the `pools` of the scenario's
    domains counts for.

    Raises InputError like `demand_protected`, and for GENERAL where the scenario is about every domain.
    """
    if not options.protect:
        return {}
    demand_protected(options)
    known = {pool.name: (pool,) for pool in pools_of(options).every}
    others = tuple(pool for pool, strange in zip(pools, foreign(parts), strict=True) if strange)
    found = {name: known.get(name, others) for name in options.protect}
    if not all(found.values()):
        raise InputError(
            f"--protect {GENERAL} means the domains that the scenario is not about, and it is about all of them.",
            hint="Name domains.",
        )
    return found
