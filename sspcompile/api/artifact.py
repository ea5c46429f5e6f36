"""A finished build in Python: what was chosen, what it lost, and what can be done with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from sspcompile.api.given import (
    Place,
    ScenarioLike,
    number_of,
    path_of,
    paths_of,
    scenario_of,
    text_of,
    whole_of,
    word_of,
)
from sspcompile.progress import Progress, silent
from sspcompile.request.documents import plain
from sspcompile.request.options import Options
from sspcompile.request.request import Request
from sspcompile.request.rounding import Rounded
from sspcompile.workspace import MASK, PLAN, RECIPE, REPORT, Workspace

if TYPE_CHECKING:
    from sspcompile.api.arguments import Named
    from sspcompile.api.bench import BenchRequest
    from sspcompile.api.verify import Verified
    from sspcompile.bench.latency import BenchResult
    from sspcompile.evaluate.asking import Limits
    from sspcompile.evaluate.results import SuiteResult
    from sspcompile.model.decoder import TextModel
    from sspcompile.model.placement import Placement, Placing
    from sspcompile.report.model import Report, RoundingSection
    from sspcompile.slicing.mask import HeadMask

Format = Literal["hf", "onnx", "gguf"]
LAST_SEED = 2**32 - 1
PrecisionName = Literal["fp32", "fp16", "int8", "int4"]


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

    def load_model(self, **place: Unpack[Placing]) -> TextModel:
        """The smaller model and its tokenizer in memory; on the CPU in fp32. Raises InputError or CheckpointError."""
        from sspcompile.model.chat import rendering_of
        from sspcompile.model.loading import load_cut

        return load_cut(
            self.model_path,
            placement=placement_in(**place),
            trust_remote_code=self._named.custom_code,
            rendering=rendering_of(self.options),
        )

    def verify(
        self,
        *,
        model: Place | None = None,
        layerwise: bool | None = None,
        progress: Progress = silent,
        **place: Unpack[Placing],
    ) -> Verified:
        """Hold every file against the manifest, and the model against the masked dense one.

        `model` says where the dense model is now; None means where the build found it. Raises ArtifactError or
        ParityError.
        """
        from sspcompile.api.verify import verify

        placement = placement_in(**place)
        return verify(self._named, text_of(model), progress, layerwise=layerwise, placement=placement)

    def evaluate(
        self,
        *,
        data: Place | Sequence[Place] = (),
        scenario: ScenarioLike | None = None,
        items: int | None = None,
        model: Place | None = None,
        limits: Limits | None = None,
        seed: int = 0,
        progress: Progress = silent,
        **place: Unpack[Placing],
    ) -> list[SuiteResult]:
        """Ask the smaller and the dense model the same questions: on the scenario, off it, and from files `data`.

        `scenario` is what `build` takes, by default the build's own. `items` bounds the prompts of each suite. Prompts
        that chose or repaired anything are never asked. Raises InputError for unusable data.
        """
        from sspcompile.api.arguments import with_dense
        from sspcompile.api.evaluate import evaluate

        placement, files, asked = placement_in(**place), paths_of(data, "data"), scenario_of(scenario)
        items, seed = whole_of(items, "items"), whole_of(seed, "seed", least=0, most=LAST_SEED) or 0
        return evaluate(
            with_dense(self._named, text_of(model), placement=placement),
            Workspace(self.root),
            progress,
            scenario=asked,
            data=files,
            items=items,
            limits=limits,
            seed=seed,
        )

    def weigh(
        self,
        precision: Rounded = "int4",
        *,
        model: Place | None = None,
        progress: Progress = silent,
        memory: int | str | None = None,
        threads: int | None = None,
    ) -> RoundingSection:
        """Weigh it, rounded, against the dense model that is only rounded: bytes and losses, in ONNX Runtime (int8,
        int4) or with the numbers of a GGUF (q8_0, q4_0).

        On the texts that judged the build; the report gets it too. Raises InputError where ONNX Runtime is not
        installed, and UnsupportedModelError for what it, or llama.cpp, cannot compute.
        """
        from sspcompile.api.rounding import weigh_build

        placement = placement_in(memory=memory, threads=threads)
        return weigh_build(self._named, precision, model=text_of(model), placement=placement, progress=progress)

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
        size: float | None = None,
        overwrite: bool = False,
        progress: Progress = silent,
        memory: int | str | None = None,
        threads: int | None = None,
    ) -> Path:
        """Write the model in the form that a runtime takes, run it where it is ONNX or GGUF, and give its folder.

        `precision` (fp32), `context_length` and `last_logits` are for "onnx", `host` (a family whose stock class loads
        it) for "hf", `type` (f32, bf16, q8_0 and so on; by default as it is stored) for "gguf". `size` is the member of
        a nested artifact; without it, "onnx" takes all of them. Raises InputError for an option of another format, and
        ParityError for an export that computes something else.
        """
        from sspcompile.api.export import ExportRequest
        from sspcompile.api.nested_export import export_any

        asked = ExportRequest(
            format,
            word_of(host, "host"),
            word_of(precision, "precision"),
            context_length=whole_of(context_length, "context_length"),
            last_logits=last_logits,
            type=word_of(type, "type"),
            size=number_of(size, "size"),
        )
        place = path_of(out, "out") if out is not None else None
        placement, root = placement_in(memory=memory, threads=threads), Workspace(self.root)
        done = export_any(self._named, asked, root, progress, out=place, overwrite=overwrite, placement=placement)
        return done.folder

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


def placement_in(**given: Unpack[Placing]) -> Placement:
    """Where keywords, and the environment behind them, say that a model is computed.

    Raises InputError, and TypeError for a keyword that there is not.
    """
    from sspcompile.model.placement import NAMES, placement_of

    if unknown := sorted({*given} - {*NAMES}):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; where to compute is said by {', '.join(NAMES)}")
    # A torch.device is typed as its text is.
    told = {
        name: str(value) if name == "device" and value is not None else plain(value) for name, value in given.items()
    }
    return placement_of(told, os.environ, call=str)
