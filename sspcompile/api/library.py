"""What `import sspcompile` offers: `plan`, `frontier`, `build`, `trim`, `load`, and what they give back.

Everything runs in this process and prints nothing. `progress` is called with (stage, steps done, steps in all). Errors
are those of `sspcompile.errors`, each with a message and a hint. Options are the keywords that `docs/options.md` lists,
their numbers Python's or NumPy's; the environment's `SSPCOMPILE_...` variables count as they do on the command line.

What runs a model takes `device`, `dtype`, `device_map`, `memory` (bytes, or text such as "8GB") and `threads`: where it
is computed. They decide nothing about what comes out but its rounding, and raise InputError for what is not there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sspcompile.api.artifact import Artifact, placement_in
from sspcompile.api.given import Place, ScenarioLike, options_of, path_of, scenario_of, text_of
from sspcompile.api.several import NestedArtifact
from sspcompile.errors import InputError
from sspcompile.model.placement import NAMES as PLACING
from sspcompile.model.placement import Placement, Placing
from sspcompile.progress import Progress, silent
from sspcompile.request.keywords import Keywords
from sspcompile.request.request import Request, read_request
from sspcompile.request.scenario import Scenario
from sspcompile.startup import let_threads_sleep
from sspcompile.workspace import Workspace

if TYPE_CHECKING:
    from sspcompile.api.trim import TrimOutcome
    from sspcompile.slicing.frontier import Frontier
    from sspcompile.slicing.plan import SlicePlan

# Where torch is not imported yet; it reads this once.
let_threads_sleep()


class BuildKeywords(Keywords, Placing, total=False):
    """The options of a build, and where it is computed."""


# Sizes follow from counts alone, but options are resolved together with a scenario.
_UNNAMED = Scenario("a-model", "a model without a scenario", (), None, "sentence")


def plan(
    model: Place | None = None,
    scenario: ScenarioLike | None = None,
    *,
    mask: Place | None = None,
    root: Place = ".",
    progress: Progress = silent,
    **options: Unpack[BuildKeywords],
) -> SlicePlan:
    """What a build would write: sizes, KV bytes, FLOPs, and which runtimes load it. No weights are written.

    Without a `scenario` the plan follows from counts alone (a config.json is enough): which heads and channels stay is
    left open. With one, the model is read, and prepared first where that was not done under `root`; where `layout` is
    "auto", the plan is that of the uniform layout if a class can hold it. `mask` plans the cut of a mask.json instead.
    With `max_latency`, layers are timed here first, once under `root`.

    Raises InputError, RecipeError, BudgetError, CheckpointError or UnsupportedModelError.
    """
    from sspcompile.api.plan import plan_mask, plan_scenario, plan_sizes, table_of_plan

    if mask is not None and scenario is not None:
        raise InputError("mask and scenario exclude each other.", hint="A mask was compiled already; give one.")
    asked, placement = _parted(options)
    request = _request(model, scenario if scenario is not None else _UNNAMED, asked)
    if mask is not None:
        return plan_mask(request.options.source, path_of(mask, "mask"), request.options.wanted_host)
    workspace = Workspace(path_of(root, "root"))
    if scenario is None:
        return plan_sizes(request.options, table_of_plan(request.options, workspace, placement, progress))
    plans, _ = plan_scenario(request, workspace, progress, placement=placement)
    return plans[0]


def frontier(
    model: Place | None = None, *, root: Place = ".", progress: Progress = silent, **options: Unpack[BuildKeywords]
) -> Frontier:
    """What sizes a model can be cut to in the layouts that the options allow, down to the smallest, by counts alone.

    Memory is counted for `batch` sequences of `context` tokens, and with `max_latency` the time of a decoded token, by
    layers that are timed here, once under `root`. Raises what `plan` raises.
    """
    from sspcompile.api.plan import reachable, table_of_plan

    asked, placement = _parted(options)
    found = _request(model, _UNNAMED, asked).options
    return reachable(found, table_of_plan(found, Workspace(path_of(root, "root")), placement, progress))


def build(
    model: Place | None,
    scenario: ScenarioLike,
    *,
    out: Place | None = None,
    overwrite: bool = False,
    root: Place = ".",
    progress: Progress = silent,
    **options: Unpack[BuildKeywords],
) -> Artifact:
    """Compile a scenario into a smaller model: choose heads and channels, repair, cut, prove, report.

    `model` is a folder or a hub name, None for the embedded one; `scenario` is what --scenario takes, or the prompts
    themselves: texts, or mappings like the lines of a .jsonl file, which may hold answers. The artifact is written to
    `out`, by default to `root`/artifacts/NAME; it is whole, or absent when anything fails. A call that was interrupted
    goes on where it was when it is made again. The first build of a model prepares its toolkit under `root`, later ones
    reuse it. With `nested` ("1,0.9,0.8") it is one artifact for several sizes, a `NestedArtifact`. Raises what the
    command `build` exits with: InputError and its kin for what cannot be used, BudgetError and ParityError for promises
    that do not hold.
    """
    from sspcompile.api.build import build as run
    from sspcompile.api.nested import build_nested
    from sspcompile.api.reads import refuse_output
    from sspcompile.model.dense import open_dense

    asked, placement = _parted(options)
    request, workspace = _request(model, scenario, asked), Workspace(path_of(root, "root"))
    folder = path_of(out, "out") if out is not None else workspace.artifact(request.scenario.name)
    refuse_output(folder, _file_of(scenario), request.options, overwrite=overwrite)
    dense = open_dense(request.options.source)
    if request.options.shares:
        build_nested(request, dense, folder, workspace, progress, overwrite=overwrite, placement=placement)
        return NestedArtifact(folder, workspace.root)
    run(request, dense, folder, workspace, progress, overwrite=overwrite, placement=placement)
    return Artifact(folder, workspace.root)


def trim(
    model: Place | None,
    scenario: ScenarioLike,
    *,
    out: Place,
    tokens: int | None = None,
    max_loss_off: float | None = None,
    overwrite: bool = False,
    root: Place = ".",
    progress: Progress = silent,
    **options: Unpack[BuildKeywords],
) -> TrimOutcome:
    """Write a model with the part of its vocabulary that a scenario reads and writes, as an ordinary checkpoint.

    `tokens` are kept, or as few as lose at most `max_loss` (0.01) of the next tokens and of the tokens read on the
    scenario, and `max_loss_off` (0.05) in general, on texts that choose nothing. Of the options those of texts count:
    `pools`, `raw`, `chat_template`, `max_tokens`, `continuation_tokens`, `seed`. The `max_loss` of a recipe or of the
    environment is of builds, and does not count. Raises InputError for both kinds of
    bounds, UnsupportedModelError for a tokenizer that is not a byte-pair encoding, and BudgetError for fewer tokens
    than any text needs.
    """
    from sspcompile.api.reads import refuse_output
    from sspcompile.api.trim import TrimBounds
    from sspcompile.api.trim import trim as run
    from sspcompile.model.dense import open_dense

    asked, placement = _parted(options)
    bounds = TrimBounds.of(tokens=tokens, max_loss=asked.pop("max_loss", None), max_loss_off=max_loss_off)
    request, folder = _request(model, scenario, asked), path_of(out, "out")
    refuse_output(folder, _file_of(scenario), request.options, overwrite=overwrite)
    return run(
        request,
        open_dense(request.options.source),
        folder,
        Workspace(path_of(root, "root")),
        progress,
        bounds=bounds,
        overwrite=overwrite,
        placement=placement,
    )


def load(path: Place, *, root: Place = ".") -> Artifact:
    """Open a finished build: a folder, or the name of one under `root`/artifacts. A nested one is a `NestedArtifact`.

    Raises ArtifactError for nothing of ours, and InputError for a cut, an export or a model folder.
    """
    from sspcompile.api.arguments import demand, named

    found = demand(
        named(str(path_of(path, "path")), Workspace(path_of(root, "root"))), "build", "nested", command="load"
    )
    kind = NestedArtifact if found.kind == "nested" else Artifact
    return kind(found.folder, path_of(root, "root"))


def _parted(given: Mapping[str, Any]) -> tuple[dict[str, Any], Placement]:
    """The options of a build, and where it is computed. Raises InputError for the latter."""
    options = {name: value for name, value in given.items() if name not in PLACING}
    return options, placement_in(**{name: given[name] for name in PLACING if name in given})


def _file_of(scenario: ScenarioLike) -> str | None:
    """What may be the file of a scenario; nothing for prompts that are given themselves."""
    return str(scenario) if isinstance(scenario, str | Path) else None


def _request(model: Place | None, scenario: ScenarioLike, options: Mapping[str, Any]) -> Request:
    return read_request(scenario_of(scenario), {**options_of(options), "model": text_of(model)}, os.environ, call=str)
