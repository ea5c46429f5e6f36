"""What `import sspcompile` offers: `plan`, `frontier`, `build`, `load`, and what they give back.

Everything runs in this process and prints nothing. `progress` is called with (stage, steps done, steps in all). Errors
are those of `sspcompile.errors`, each with a message and a hint. Options are the keywords that `docs/options.md` lists;
the environment's `SSPCOMPILE_...` variables count here as they do on the command line.

What runs a model takes `device`, `dtype`, `device_map`, `memory` (bytes, or text such as "8GB") and `threads`: where it
is computed. They decide nothing about what comes out but its rounding, and raise InputError for what is not there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from sspcompile.progress import Progress, silent
from sspcompile.request.keywords import Keywords
from sspcompile.request.options import Options
from sspcompile.request.request import Request, read_request
from sspcompile.request.scenario import Scenario, of_prompts
from sspcompile.startup import let_threads_sleep
from sspcompile.workspace import MASK, PLAN, RECIPE, REPORT, Workspace

if TYPE_CHECKING:
    from sspcompile.api.arguments import Named
    from sspcompile.api.bench import BenchRequest
    from sspcompile.api.verify import Verified
    from sspcompile.bench.latency import BenchResult
    from sspcompile.evaluate.asking import Limits
    from sspcompile.evaluate.results import SuiteResult
    from sspcompile.model.decoder import TextModel
    from sspcompile.model.placement import Placement
    from sspcompile.report.model import Report, RoundingSection
    from sspcompile.slicing.frontier import Frontier
    from sspcompile.slicing.mask import HeadMask
    from sspcompile.slicing.plan import SlicePlan

# Where torch is not imported yet; it reads this once.
let_threads_sleep()

Place = str | os.PathLike[str]
Format = Literal["hf", "onnx", "gguf"]
PrecisionName = Literal["fp32", "fp16", "int8", "int4"]
# A sentence, a recipe (file or shipped name), a file of prompts, or the prompts themselves.
ScenarioLike = str | os.PathLike[str] | Sequence[str] | Scenario
# Sizes follow from counts alone, but options are resolved together with a scenario.
_UNNAMED = Scenario("a-model", "a model without a scenario", (), None, "sentence")


def plan(
    model: Place | None = None,
    scenario: ScenarioLike | None = None,
    *,
    mask: Place | None = None,
    root: Place = ".",
    progress: Progress = silent,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    **options: Unpack[Keywords],
) -> SlicePlan:
    """What a build would write: sizes, KV bytes, FLOPs, and which runtimes load it. No weights are written.

    Without a `scenario` the plan follows from counts alone (a config.json is enough): which heads and channels stay is
    left open. With one, the model is read, and prepared first where that was not done under `root`; where `layout` is
    "auto", the plan is that of the uniform layout if a class can hold it. `mask` plans the cut of a mask.json instead.
    Raises InputError, RecipeError, BudgetError, CheckpointError or UnsupportedModelError.
    """
    from sspcompile.api.plan import plan_mask, plan_scenario, plan_sizes

    request = _request(model, scenario if scenario is not None else _UNNAMED, options)
    if mask is not None:
        return plan_mask(request.options.source, Path(mask), request.options.wanted_host)
    if scenario is None:
        return plan_sizes(request.options)
    placement = _placement(device=device, dtype=dtype, device_map=device_map, memory=memory, threads=threads)
    plans, _ = plan_scenario(request, Workspace(Path(root)), progress, placement=placement)
    return plans[0]


def frontier(model: Place | None = None, **options: Unpack[Keywords]) -> Frontier:
    """What sizes a model can be cut to in the layouts that the options allow, down to the smallest, by counts alone.

    Memory is counted for `batch` sequences of `context` tokens. Raises what `plan` raises.
    """
    from sspcompile.api.plan import reachable

    return reachable(_request(model, _UNNAMED, options).options)


def build(
    model: Place | None,
    scenario: ScenarioLike,
    *,
    out: Place | None = None,
    overwrite: bool = False,
    root: Place = ".",
    progress: Progress = silent,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    **options: Unpack[Keywords],
) -> Artifact:
    """Compile a scenario into a smaller model: choose heads and channels, repair, cut, prove, report.

    `model` is a folder or a hub name, None for the embedded one. The artifact is written to `out`, by default to
    `root`/artifacts/NAME; it is whole, or absent when anything fails. A call that was interrupted goes on where it was
    when it is made again. The first build of a model prepares its toolkit under `root`, later ones reuse it. With
    `nested` ("1,0.9,0.8") it is one artifact for several sizes, a `NestedArtifact`. Raises what the command `build`
    exits with: InputError and its kin for what cannot be used, BudgetError and ParityError for promises that do not
    hold.
    """
    from sspcompile.api.build import build as run
    from sspcompile.api.nested import build_nested
    from sspcompile.api.several import NestedArtifact
    from sspcompile.model.dense import open_dense

    request, workspace = _request(model, scenario, options), Workspace(Path(root))
    folder = Path(out) if out is not None else workspace.artifact(request.scenario.name)
    placement = _placement(device=device, dtype=dtype, device_map=device_map, memory=memory, threads=threads)
    dense = open_dense(request.options.source)
    if request.options.shares:
        build_nested(request, dense, folder, workspace, progress, overwrite=overwrite, placement=placement)
        return NestedArtifact(folder, workspace.root)
    run(request, dense, folder, workspace, progress, overwrite=overwrite, placement=placement)
    return Artifact(folder, workspace.root)


def load(path: Place, *, root: Place = ".") -> Artifact:
    """Open a finished build: a folder, or the name of one under `root`/artifacts. A nested one is a `NestedArtifact`.

    Raises ArtifactError for nothing of ours, and InputError for a cut, an export or a model folder.
    """
    from sspcompile.api.arguments import demand, named
    from sspcompile.api.several import NestedArtifact

    found = demand(named(os.fspath(path), Workspace(Path(root))), "build", "nested", command="load")
    kind = NestedArtifact if found.kind == "nested" else Artifact
    return kind(found.folder, Path(root))


@dataclass(frozen=True)
class Artifact:
    """A finished build in the folder `path`. `root` is the folder that holds `artifacts` and `exported`."""

    path: Path
    root: Path = Path()

    @property
    def report(self) -> Report:
        """What the build came to, as it stands in report.json; with the speed, once it was measured."""
        from sspcompile.report.json import read_report

        return read_report(self.path / REPORT)

    @property
    def mask(self) -> HeadMask:
        """Which heads and channels stay, and what they were chosen by."""
        from sspcompile.slicing.mask import load_mask

        return load_mask(self.path / MASK)

    @property
    def request(self) -> Request:
        """The scenario and the options that it was built with."""
        from sspcompile.request.request import built_request

        return built_request(self.path / RECIPE)

    @property
    def options(self) -> Options:
        """The options that it was built with, every one settled."""
        return self.request.options

    @property
    def model_path(self) -> Path:
        """The Hugging Face folder with the smaller model."""
        return self._named.model

    def plan(self) -> dict[str, object]:
        """plan.json: sizes before and after, by layer, and a verdict per runtime."""
        import json

        found: dict[str, object] = json.loads((self.path / PLAN).read_text("utf-8"))
        return found

    def load_model(
        self,
        *,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
    ) -> TextModel:
        """The smaller model and its tokenizer in memory; on the CPU in fp32. Raises InputError or CheckpointError."""
        from sspcompile.model.chat import rendering_of
        from sspcompile.model.loading import load_cut

        return load_cut(
            self.model_path,
            placement=_placement(device=device, dtype=dtype, device_map=device_map, memory=memory, threads=threads),
            trust_remote_code=self._named.custom_code,
            rendering=rendering_of(self.options),
        )

    def verify(
        self,
        *,
        model: Place | None = None,
        layerwise: bool | None = None,
        progress: Progress = silent,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
    ) -> Verified:
        """Hold every file against the manifest, and the model against the masked dense one.

        `model` says where the dense model is now; None means where the build found it. Raises ArtifactError or
        ParityError.
        """
        from sspcompile.api.verify import verify

        placement = _placement(device=device, dtype=dtype, device_map=device_map, memory=memory, threads=threads)
        return verify(self._named, _text(model), progress, layerwise=layerwise, placement=placement)

    def evaluate(
        self,
        *,
        data: Place | Sequence[Place] = (),
        scenario: str | None = None,
        items: int | None = None,
        model: Place | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        progress: Progress = silent,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        memory: int | str | None = None,
        threads: int | None = None,
    ) -> list[SuiteResult]:
        """Ask the smaller and the dense model the same questions: on the scenario, off it, and from files `data`.

        `items` bounds the prompts of each suite. Prompts that chose or repaired anything are never asked. Raises
        InputError for unusable data.
        """
        from sspcompile.api.arguments import with_dense
        from sspcompile.api.evaluate import evaluate

        files = [data] if isinstance(data, str | os.PathLike) else list(data)
        placement = _placement(device=device, dtype=dtype, device_map=device_map, memory=memory, threads=threads)
        return evaluate(
            with_dense(self._named, _text(model), placement=placement),
            Workspace(self.root),
            progress,
            scenario=scenario,
            data=[Path(file) for file in files],
            items=items,
            limits=limits,
            seed=seed,
        )

    def weigh(
        self,
        precision: Literal["int8", "int4"] = "int4",
        *,
        model: Place | None = None,
        progress: Progress = silent,
        memory: int | str | None = None,
        threads: int | None = None,
    ) -> RoundingSection:
        """Weigh it, rounded, against the dense model that is only rounded: bytes and losses, in ONNX Runtime.

        On the texts that judged the build; the report gets it too. Raises InputError where ONNX Runtime is not
        installed, and UnsupportedModelError for what it cannot compute.
        """
        from sspcompile.api.rounding import weigh_build

        placement = _placement(memory=memory, threads=threads)
        return weigh_build(self._named, precision, model=_text(model), placement=placement, progress=progress)

    def export(
        self,
        format: Format = "hf",
        out: Place | None = None,
        *,
        precision: PrecisionName | None = None,
        host: str | None = None,
        context_length: int | None = None,
        last_logits: bool = False,
        type: str | None = None,
        overwrite: bool = False,
        progress: Progress = silent,
        memory: int | str | None = None,
        threads: int | None = None,
    ) -> Path:
        """Write the model in the form that a runtime takes, run it where it is ONNX or GGUF, and give its folder.

        `precision` (fp32), `context_length` and `last_logits` are for "onnx", `host` (a family whose stock class loads
        it) for "hf", `type` (f32, bf16, q8_0 and so on; by default as it is stored) for "gguf". Raises InputError for
        an option of another format, and ParityError for an export that computes something else.
        """
        from sspcompile.api.export import ExportRequest, export

        asked = ExportRequest(
            format, host, precision, context_length=context_length, last_logits=last_logits, type=type
        )
        place = Path(out) if out is not None else None
        placement, root = _placement(memory=memory, threads=threads), Workspace(self.root)
        return export(self._named, asked, root, progress, out=place, overwrite=overwrite, placement=placement).folder

    def bench(self, request: BenchRequest | None = None, *, progress: Progress = silent) -> BenchResult:
        """Measure latency and memory against the dense model; the summary goes into the report.

        By default a quick look: few tokens, many processes. Raises InputError for loads that cannot be measured.
        """
        from sspcompile.api.bench import BenchRequest, bench

        wanted = request if request is not None else BenchRequest.of(quick=True)
        return bench([str(self.path)], wanted, Workspace(self.root), progress).result

    @property
    def _named(self) -> Named:
        from sspcompile.api.arguments import demand, named

        return demand(named(str(self.path), Workspace(self.root)), "build", command="load")


def _request(model: Place | None, scenario: ScenarioLike, options: Mapping[str, Any]) -> Request:
    return read_request(_scenario(scenario), {**options, "model": _text(model)}, os.environ, call=str)


def _placement(**given: Any) -> Placement:
    from sspcompile.model.placement import placement_of

    return placement_of(given, os.environ, call=str)


def _scenario(given: ScenarioLike) -> str | Scenario:
    if isinstance(given, str | Scenario):
        return given
    return os.fspath(given) if isinstance(given, os.PathLike) else of_prompts(given)


def _text(place: Place | None) -> str | None:
    return None if place is None else os.fspath(place)
