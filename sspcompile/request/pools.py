"""Which pools a build learns its domains from: the shipped ones, the user's own, and how many of them become axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sspcompile.embedded import EMBEDDED, POOLS_DIR
from sspcompile.errors import InputError
from sspcompile.request.domains import DomainPool, load_outside, load_pools, pools_fingerprint
from sspcompile.request.options import Options

KEY_CHARACTERS = 12


@dataclass(frozen=True)
class PoolSet:
    """`axes` of the `candidates` become domains (None: all of them), chosen for the model at hand; the others serve as
    text of no domain, together with `outside`."""

    candidates: tuple[DomainPool, ...]
    outside: tuple[DomainPool, ...]
    axes: int | None

    @property
    def every(self) -> tuple[DomainPool, ...]:
        """All pools, the outside ones last."""
        return (*self.candidates, *self.outside)

    def named(self, names: Sequence[str]) -> tuple[DomainPool, ...]:
        """The candidates with these names, in their order."""
        by_name = {pool.name: pool for pool in self.candidates}
        return tuple(by_name[name] for name in names)


def shipped_pools(model: str | None) -> PoolSet:
    """The pools that ship for a model; the embedded one (None, or its name) has its own, in the language it knows."""
    folder = POOLS_DIR if model in (None, EMBEDDED) else None
    return PoolSet(load_pools(folder), load_outside(folder / "outside" if folder else None), None)


def pools_of(options: Options) -> PoolSet:
    """The pools that a request asks for.

    Without `axes` the shipped domains and the user's own (`pools`) are all domains. With `axes`, and when axis
    selection is switched off, every pool is a candidate, the shipped outside ones too. Raises RecipeError for a pool
    folder with errors, and InputError for names that clash or more axes than candidates.
    """
    own = load_pools(Path(options.pools)) if options.pools else ()
    ready = shipped_pools(options.model)
    shipped, outside = ready.candidates, ready.outside
    clash = sorted({pool.name for pool in own} & {pool.name for pool in (*shipped, *outside)})
    if clash:
        raise InputError(f"{options.pools} has shipped names: {', '.join(clash)}.", hint="Rename those pools.")
    if "axes" in options.without:
        return PoolSet((*shipped, *outside, *own), (), None)
    if options.axes is None:
        return PoolSet((*shipped, *own), outside, None)
    candidates = (*shipped, *outside, *own)
    if options.axes > len(candidates):
        raise InputError(
            f"--axes {options.axes} asks for more domains than there are pools ({len(candidates)}).",
            hint="Add pools of your own with --pools DIR, or ask for fewer.",
        )
    return PoolSet(candidates, (), options.axes)


def pools_suffix(options: Options) -> str:
    """What tells a toolkit's folder from those of other pools or axes; empty for the default ones."""
    if options.pools is None and options.axes is None and "axes" not in options.without:
        return ""
    chosen = pools_of(options)
    return f"-axes{chosen.axes or 'all'}-{pools_fingerprint(chosen.candidates)[:KEY_CHARACTERS]}"
