"""`build --quantize` and `eval --quantize`: is a cut worth it next to rounding, and on top of it?"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sspcompile.api.arguments import Named, named
from sspcompile.api.export import ExportRequest, Published, export, gguf_folder, onnx_folder
from sspcompile.api.reads import dense_reads, pool_reads
from sspcompile.checkpoint import check_manifest, write_manifest
from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.publish import scratch
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.checkpoint.source import tensor_table
from sspcompile.errors import InputError
from sspcompile.evaluate.rounded_gguf import GgufScales
from sspcompile.evaluate.rounded_onnx import OnnxScales
from sspcompile.evaluate.rounding import Form, Pair, Scales, Weighed, weigh
from sspcompile.export.gguf.source import read_source
from sspcompile.export.gguf.vocabulary import read_vocabulary
from sspcompile.export.onnx.decoder import read_decoder
from sspcompile.export.refitted import read_refit
from sspcompile.families import Geometry, gguf_model
from sspcompile.model.blocks import ROUNDINGS
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
from sspcompile.request.options import WHOLE_LAYOUTS, Options
from sspcompile.request.pools import pools_of
from sspcompile.request.request import Request, built_request
from sspcompile.request.rounding import Rounded
from sspcompile.request.splits import Holding, draw_splits
from sspcompile.select.budget import cuts_channels
from sspcompile.select.judging import Judging
from sspcompile.select.texts import Texts
from sspcompile.slicing.mask import load_mask
from sspcompile.workspace import MASK, RECIPE, REPORT, Workspace

log = logging.getLogger("sspcompile")


@dataclass(frozen=True)
class _Written:
    """What `--quantize` writes a cut to: an export, and what weighs it. `demand` refuses a model folder that cannot be
    written so, and `demand_cuts` what could not be written of the cuts of it that a build may come to.
    """

    request: ExportRequest
    scales: Callable[[Pair, Placement], Scales]
    demand: Callable[[Path], object]
    demand_cuts: Callable[[Options, Path], None]

    def folder(self, workspace: Workspace, name: str) -> Path:
        """Where the export goes."""
        if self.request.precision is not None:
            return onnx_folder(workspace, name, self.request.precision)
        return gguf_folder(workspace, name, self.request.type)

    @property
    def words(self) -> str:
        """The options of `export` that ask for it."""
        asked = f"--precision {self.request.precision}" if self.request.precision else f"--type {self.request.type}"
        return f"--format {self.request.form} {asked}"


def _written(precision: Rounded) -> _Written:
    if ROUNDINGS[precision].form == "onnx":
        return _Written(ExportRequest("onnx", precision=precision), OnnxScales, _demand_onnx, lambda *_: None)
    return _Written(ExportRequest("gguf", type=precision), GgufScales, read_source, _demand_ggufs)


def _demand_onnx(model: Path) -> None:
    demand_runtime()
    read_decoder(model)


def _demand_ggufs(options: Options, model: Path) -> None:
    """Tokenizers that a GGUF cannot hold are refused, and layers that differ: whether they do is known at the end."""
    source = read_source(model)
    read_vocabulary(model, source.geometry.vocab, source.geometry.family)
    layout = WHOLE_LAYOUTS[options.whole] if options.whole else options.layout
    if layout != "uniform" and options.wanted_host is None:
        gguf_model(source.config, source.geometry, *_uneven(options, source.geometry))


def _uneven(options: Options, g: Geometry) -> tuple[list[tuple[int, int]], list[int]]:
    """Counts and widths of a cut whose first layer alone is smaller: nobody looks at more than that they differ."""
    group = g.heads // g.kv_heads
    first = (group, 1) if g.kv_heads > 1 else (1, 1)
    if options.whole == "attention":
        first = (0, 0)
    narrower = g.intermediate - 1 if cuts_channels(options, g) and options.whole is None else g.intermediate
    return [first, *[(g.heads, g.kv_heads)] * (g.layers - 1)], [narrower, *[g.intermediate] * (g.layers - 1)]


def demand_rounding(request: Request, dense: DenseModel, out: Path, workspace: Workspace, *, overwrite: bool) -> None:
    """Refuse before any work what `--quantize` cannot do: raises InputError, UnsupportedModelError, OutputExistsError.

    Nothing is refused where it was not asked for.
    """
    options = request.options
    if options.quantize is None:
        return
    written = _written(options.quantize)
    written.demand(dense.checkpoint.path)
    written.demand_cuts(options, dense.checkpoint.path)
    reads = (*dense_reads(dense), *pool_reads(options))
    refuse_existing(written.folder(workspace, out.resolve().name), overwrite=overwrite, reads=reads)


def rounding_of(
    dense: DenseModel,
    cut: Path,
    texts: Sequence[Sentence],
    precision: Rounded,
    beside: Path,
    *,
    owners: Sequence[int] = (),
    refitted: Path | None = None,
    custom_code: bool,
    seed: int,
    placement: Placement = ANYWHERE,
    progress: Progress = silent,
) -> RoundingSection:
    """Weigh the model folder `cut`, rounded, against the dense model, in a scratch folder in `beside`. `owners`: the
    conversations of the texts (nothing: each its own). `refitted`: the artifact that holds what was fitted for that
    rounding, where there is one.

    Raises what `weigh` raises.
    """
    refit = read_refit(refitted, ROUNDINGS[precision], tensor_table(cut)) if refitted is not None else None
    taken: Mapping[str, TensorInfo] = refit.tensors if refit is not None else {}
    pair = Pair(dense.checkpoint.path, cut, precision, taken, custom_code)
    scales = _written(precision).scales(pair, placement)
    with tempfile.TemporaryDirectory(dir=beside) as place:
        found = weigh(scales, texts, Path(place), owners=owners, seed=seed, progress=progress)
    asked = next(one for one in found if one.form == Form("cut", precision))
    return RoundingSection(
        precision=precision,
        runtime=scales.runtime,
        texts=len(asked.divergence.prompts),
        refitted=bool(taken),
        rows=tuple(_row(one, asked, seed) for one in found),
    )


def _row(one: Weighed, asked: Weighed, seed: int) -> RoundingRow:
    rounded = one.form.precision is not None
    return RoundingRow(
        of=one.form.of,
        precision=one.precision,
        block_size=one.form.block if rounded else None,
        weight_bytes=one.weight_bytes,
        mean_kl=one.divergence.mean_kl,
        top1_agreement=one.divergence.top1_agreement,
        answer_perplexity=one.divergence.perplexity,
        reply_perplexity=one.divergence.reply_perplexity,
        kl_above_asked=None if one is asked else compare_divergences(one.divergence, asked.divergence, seed=seed),
    )


def export_rounded(
    out: Path, precision: Rounded, workspace: Workspace, progress: Progress, *, overwrite: bool, placement: Placement
) -> Published:
    """The last step of `build --quantize`: the finished cut in `out`, rounded, where `export` puts it by default.

    A line of the log says what is there already, should this step not come to its end.
    """
    built, written = named(str(out), workspace), _written(precision)
    log.info(
        f"{out} is finished. Now it is written in {precision} to {written.folder(workspace, built.name)}; should that "
        f"be interrupted, `sspcompile export {out} {written.words}` does it."
    )
    return export(built, written.request, workspace, progress, overwrite=overwrite, placement=placement)


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

    `model` says where the dense model is now, which the command calls `option`. Raises what `weigh` raises, InputError
    for a precision that there is not, and ArtifactError for a build that is damaged.
    """
    if precision not in ROUNDINGS:
        raise InputError(f"Nothing is weighed in {precision!r}.", hint=f"Accepted: {', '.join(ROUNDINGS)}.")
    # The manifest is written anew at the end: without this check a damaged file would be blessed there.
    manifest = check_manifest(built.folder)
    dense, request = built.dense(model, option=option), built_request(built.folder / RECIPE)
    for folder in (dense.checkpoint.path, built.model):
        _written(precision).demand(folder)
    judged = judged_texts(built, request, dense, Holding.of(manifest.origin), placement=placement, progress=progress)
    with scratch(built.folder.resolve().parent, f"{built.name}-rounding") as place:
        section = rounding_of(
            dense,
            built.model,
            judged.texts,
            precision,
            place,
            owners=judged.owners,
            refitted=built.folder,
            custom_code=built.custom_code,
            seed=request.options.seed,
            placement=placement,
            progress=progress,
        )
    report = read_report(built.folder / REPORT)
    if report.rounding is not None and report.rounding.precision != precision:
        log.info(
            f"The report of {built.folder} weighs {precision} now, where it weighed {report.rounding.precision}; "
            f"`sspcompile eval {built.folder} --quantize {report.rounding.precision}` puts that back."
        )
    report = report.model_copy(update={"rounding": section})
    write_report(report, built.folder)
    write_manifest(built.folder, manifest.origin)
    return section


def judged_texts(
    built: Named, request: Request, dense: DenseModel, holding: Holding, *, placement: Placement, progress: Progress
) -> Judging:
    """The texts that judged a finished build, drawn again from its recipe and its mixture, and continued again."""
    options, stated = request.options, load_mask(built.folder / MASK).scenario
    weights = np.array([*stated["mixture"].values()])
    parts = (1 - stated["unknown"]) * weights + stated["unknown"] / len(weights)
    pools = pools_of(options).named(tuple(stated["mixture"]))
    splits = draw_splits(request.scenario.prompts, parts, pools, options.seed, holding=holding)
    loaded = dense.load(placement=placement, rendering=rendering_of(options))
    texts = Texts(loaded, options).continued(splits.judge, stage_of(progress, "continuations (judge)"))
    return Judging(tuple(texts), splits.owners(splits.judge))
