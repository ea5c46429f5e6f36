"""`build --quantize` and `eval --quantize`: is a cut worth it next to rounding, and on top of it?"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sspcompile.api.arguments import Named, named
from sspcompile.api.export import ExportRequest, Published, export, onnx_folder
from sspcompile.checkpoint import check_manifest, write_manifest
from sspcompile.checkpoint.publish import refuse_existing, scratch
from sspcompile.evaluate.rounding import Weighed, weigh
from sspcompile.export.onnx.decoder import read_decoder
from sspcompile.export.refitted import read_refitted
from sspcompile.model.chat import rendering_of
from sspcompile.model.dense import DenseModel
from sspcompile.model.divergence import compare_divergences
from sspcompile.model.onnx_session import demand_runtime
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.model.text import Sentence
from sspcompile.progress import Progress, silent, stage_of
from sspcompile.report.json import read_report
from sspcompile.report.model import RoundingRow, RoundingSection
from sspcompile.report.write import write_report
from sspcompile.request.options import Rounded
from sspcompile.request.pools import pools_of
from sspcompile.request.request import Request, built_request
from sspcompile.request.splits import draw_splits
from sspcompile.select.texts import Texts
from sspcompile.slicing.mask import load_mask
from sspcompile.workspace import MASK, RECIPE, REPORT, Workspace

log = logging.getLogger("sspcompile")


def demand_rounding(request: Request, dense: DenseModel, out: Path, workspace: Workspace, *, overwrite: bool) -> None:
    """Refuse before any work what `--quantize` cannot do: raises InputError, UnsupportedModelError, OutputExistsError.

    Nothing is refused where it was not asked for.
    """
    precision = request.options.quantize
    if precision is None:
        return
    demand_runtime()
    read_decoder(dense.checkpoint.path)
    refuse_existing(onnx_folder(workspace, out.resolve().name, precision), overwrite=overwrite)


def rounding_of(
    dense: DenseModel,
    cut: Path,
    texts: Sequence[Sentence],
    precision: Rounded,
    beside: Path,
    *,
    refitted: Path | None = None,
    custom_code: bool,
    seed: int,
    placement: Placement = ANYWHERE,
    progress: Progress = silent,
) -> RoundingSection:
    """Weigh the model folder `cut`, rounded, against the dense model, in a scratch folder in `beside`. `refitted`: the
    artifact that holds what was fitted for that rounding, where there is one.

    Raises what `weigh` raises.
    """
    import onnxruntime

    fitted = read_refitted(refitted, precision, read_decoder(cut).tensors) if refitted is not None else {}
    with tempfile.TemporaryDirectory(dir=beside) as place:
        found = weigh(
            dense.checkpoint.path,
            cut,
            texts,
            precision,
            Path(place),
            refitted=fitted,
            custom_code=custom_code,
            seed=seed,
            placement=replace(placement, device="cpu", dtype="float32", device_map=None),
            progress=progress,
        )
    asked = next(one for one in found if (one.form.of, one.precision) == ("cut", precision))
    return RoundingSection(
        precision=precision,
        runtime=f"ONNX Runtime {onnxruntime.__version__}",
        texts=len(asked.divergence.prompts),
        refitted=bool(fitted),
        rows=tuple(_row(one, asked, seed) for one in found),
    )


def _row(one: Weighed, asked: Weighed, seed: int) -> RoundingRow:
    rounded = one.form.precision is not None
    return RoundingRow(
        of=one.form.of,
        precision=one.precision,
        block_size=one.form.blocks.size if rounded else None,
        weight_bytes=one.weight_bytes,
        mean_kl=one.divergence.mean_kl,
        top1_agreement=one.divergence.top1_agreement,
        answer_perplexity=one.divergence.perplexity,
        kl_above_asked=None if one is asked else compare_divergences(one.divergence, asked.divergence, seed=seed),
    )


def export_rounded(
    out: Path, precision: Rounded, workspace: Workspace, progress: Progress, *, overwrite: bool, placement: Placement
) -> Published:
    """The last step of `build --quantize`: the finished cut in `out`, rounded, at exported/NAME-onnx-PRECISION.

    A line of the log says what is there already, should this step not come to its end.
    """
    built, request = named(str(out), workspace), ExportRequest("onnx", precision=precision)
    log.info(
        f"{out} is finished. In {precision} it goes to {onnx_folder(workspace, built.name, precision)}; later, "
        f"`sspcompile export {out} --format onnx --precision {precision}` does that."
    )
    return export(built, request, workspace, progress, overwrite=overwrite, placement=placement)


def weigh_build(
    built: Named,
    precision: Rounded,
    *,
    model: str | None = None,
    option: str = "--model",
    placement: Placement = ANYWHERE,
    progress: Progress = silent,
) -> RoundingSection:
    """Weigh a finished build on the texts that judged it, and put that into its report.

    `model` says where the dense model is now, which the command calls `option`. Raises what `weigh` raises, and
    ArtifactError for a build that is damaged.
    """
    # The manifest is written anew at the end: without this check a damaged file would be blessed there.
    manifest = check_manifest(built.folder)
    dense, request = built.dense(model, option=option), built_request(built.folder / RECIPE)
    demand_runtime()
    read_decoder(dense.checkpoint.path)
    texts = judged_texts(built, request, dense, placement=placement, progress=progress)
    with scratch(built.folder.resolve().parent, f"{built.name}-rounding") as place:
        section = rounding_of(
            dense,
            built.model,
            texts,
            precision,
            place,
            refitted=built.folder,
            custom_code=built.custom_code,
            seed=request.options.seed,
            placement=placement,
            progress=progress,
        )
    report = read_report(built.folder / REPORT).model_copy(update={"rounding": section})
    write_report(report, built.folder)
    write_manifest(built.folder, manifest.origin)
    return section


def judged_texts(
    built: Named, request: Request, dense: DenseModel, *, placement: Placement, progress: Progress
) -> list[Sentence]:
    """The texts that judged a finished build, drawn again from its recipe and its mixture, and continued again."""
    options, stated = request.options, load_mask(built.folder / MASK).scenario
    weights = np.array([*stated["mixture"].values()])
    parts = (1 - stated["unknown"]) * weights + stated["unknown"] / len(weights)
    pools = pools_of(options).named(tuple(stated["mixture"]))
    judge = draw_splits(request.scenario.prompts, parts, pools, options.seed).judge
    loaded = dense.load(placement=placement, rendering=rendering_of(options))
    return Texts(loaded, options).continued(judge, stage_of(progress, "continuations (judge)"))
