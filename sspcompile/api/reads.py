"""What a command reads on this machine: places that what it writes must not replace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sspcompile.checkpoint.locate import read_paths
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.request.hub import HUB
from sspcompile.request.recipe import load_recipe
from sspcompile.request.scenario import PROMPT_SUFFIXES, RECIPE_SUFFIXES
from sspcompile.workspace import RECIPE

if TYPE_CHECKING:
    from sspcompile.model.dense import DenseModel
    from sspcompile.request.options import Options


def dense_reads(dense: DenseModel) -> tuple[Path, ...]:
    """The folder that is read, and what that was made of: an adapter with its base, or a GGUF file."""
    return (dense.checkpoint.path, *read_paths(dense.place))


def pool_reads(options: Options) -> tuple[Path, ...]:
    """The folder of domain pools of one's own."""
    return () if options.pools is None else (Path(options.pools),)


def refuse_output(out: Path, scenario: str | None, options: Options, *, overwrite: bool) -> None:
    """Raise what `refuse_existing` raises, before anything that was typed is opened.

    A build's own recipe holds all that it needs, and stands in the build that replaces it.
    """
    own = out / RECIPE
    reads = typed_reads(scenario, options)
    kept = [read for read in reads if not (own.is_file() and read.exists() and own.samefile(read))]
    refuse_existing(out, overwrite=overwrite, reads=kept)


def typed_reads(scenario: str | None, options: Options) -> tuple[Path, ...]:
    """What was typed for a build: the model, the domain pools, and the file of the scenario with its prompts."""
    return (*read_paths(options.source), *pool_reads(options), *scenario_reads(scenario))


def scenario_reads(scenario: str | None) -> tuple[Path, ...]:
    """A recipe with the file of prompts that it names, or a file of prompts; nothing for a sentence or a name.

    Raises RecipeError.
    """
    if scenario is None or scenario.startswith(HUB):
        return ()
    file = Path(scenario)
    if file.suffix.lower() in PROMPT_SUFFIXES:
        return (file,)
    if file.suffix.lower() not in RECIPE_SUFFIXES:
        return ()
    prompts = load_recipe(file).scenario.prompts_file
    return (file,) if prompts is None else (file, file.parent / prompts)
