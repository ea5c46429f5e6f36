"""`--quantize`: a cut that is rounded beside the dense model that is only rounded, byte by byte."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape, family_config, make_checkpoint, save_random, stated
from commands import inside
from safetensors.torch import save_file

from sspcompile.api.cost import cost_of
from sspcompile.checkpoint import check_manifest
from sspcompile.errors import ArtifactError
from sspcompile.evaluate.rounded_onnx import COARSER, forms_of
from sspcompile.export.onnx.decoder import read_decoder
from sspcompile.export.onnx.weights import DATA_FILE
from sspcompile.export.onnx.write import PRECISIONS, Blocks, rounded_bytes, write_graph
from sspcompile.export.refitted import FOLDER, REFITTED, read_refit
from sspcompile.intervals import Estimate
from sspcompile.model.blocks import BLOCK, ROUNDINGS, OnnxRounding, Rounding
from sspcompile.model.dense import open_dense
from sspcompile.model.modules import down_proj, o_proj
from sspcompile.model.rounding import rounded_embedding, rounded_inside
from sspcompile.model.text import batches_of, continued
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import Repair
from sspcompile.repair.rounded import rounded
from sspcompile.report.json import read_report
from sspcompile.report.model import BudgetSection, Report, RoundingRow, RoundingSection
from sspcompile.report.page import report_page
from sspcompile.report.rounding import AS_GOOD, BETTER, rounding_table, rounding_verdict
from sspcompile.report.verdict import alarming, verdict
from sspcompile.request.request import read_request
from sspcompile.select.judging import HeldOut
from sspcompile.slicing.mask import Kept
from sspcompile.workspace import Workspace
from training.corpus import DOMAINS, items

FAST = ("--max-tokens", "48", "--continuation-tokens", "4", "--baselines", "none", "-q")
BUDGET = ("--keep", "0.5", "--criterion", "magnitude", "--layout", "per-layer")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "model", Shape(layers=2, hidden=64, kv_heads=2, group_size=2, head_dim=16, tied=True))
    stated(home / "sums.yaml")
    return home


@pytest.fixture(scope="module")
def built(home) -> Path:
    """A build that was rounded to int4."""
    built = ("build", "-s", "sums.yaml", "-m", "model", "--quantize", "int4", "--out", "cut", *BUDGET, *FAST)
    done = inside(home, *built)
    assert done.code == 0, done.err
    return home / "cut"


def section_of(folder: Path) -> RoundingSection:
    found = read_report(folder / "report.json").rounding
    assert found is not None
    return found


def row_of(section: RoundingSection, of: str, precision: str) -> RoundingRow:
    return next(row for row in section.rows if (row.of, row.precision) == (of, precision))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_rounded_weights_are_those_of_the_file(tmp_path, precision, size, tied):
    """Rows that are no whole blocks, biases, and embeddings that stay in floats included."""
    model = make_checkpoint(
        tmp_path / "model", Shape(family="qwen2", hidden=80, kv_heads=1, group_size=3, head_dim=24, tied=tied)
    )
    decoder, blocks = read_decoder(model), Blocks(size)
    (tmp_path / "out").mkdir()
    write_graph(decoder, tmp_path / "out", PRECISIONS[precision], blocks)
    found = (tmp_path / "out" / DATA_FILE).stat().st_size
    assert rounded_bytes(decoder, PRECISIONS[precision], blocks) == found


def test_the_dense_rival_has_the_finest_blocks_that_take_no_more_bytes_than_the_cut(tmp_path):
    shape = {"hidden": 256, "layers": 2, "head_dim": 32, "kv_heads": 8, "group_size": 1, "tied": True}
    dense = read_decoder(save_random(tmp_path / "dense", family_config("mistral", **shape)))
    cut = read_decoder(save_random(tmp_path / "cut", family_config("mistral", **{**shape, "kv_heads": 7})))
    rounding = PRECISIONS["int4"]
    (rival,) = (form for form in forms_of(dense, cut, "int4") if form.block != BLOCK)
    most = rounded_bytes(cut, rounding, Blocks())
    sizes = {block: rounded_bytes(dense, rounding, Blocks(block)) for block in (BLOCK, *COARSER)}
    assert rival.of == "dense" and sizes[rival.block] <= most
    assert all(size > most for block, size in sizes.items() if block < rival.block)
    assert all(form.block == BLOCK for form in forms_of(dense, dense, "int4")), "equal models need no rival"


def test_a_build_rounds_its_cut_and_weighs_what_it_wrote(home, built):
    section = section_of(built)
    names = {(row.of, row.precision) for row in section.rows}
    assert names == {(of, form) for of in ("dense", "cut") for form in ("fp32", "int8", "int4")}
    check_manifest(built)
    exported = home / "exported" / "cut-onnx-int4"
    assert check_manifest(exported).origin["precision"] == "int4"
    assert row_of(section, "cut", "int4").weight_bytes == (exported / DATA_FILE).stat().st_size
    assert not list(built.glob("tmp*")), "what was written to be weighed is gone"
    names = [cells[0] for cells in rounding_table(section)[2]]
    assert (
        section.refitted and "cut, int4, refitted for it" in names and "dense, int4" in names and "cut, int8" in names
    )


def test_unrounded_rows_are_what_transformers_measured_on_the_same_texts(built):
    """The dense model has no loss, the cut that of the build; so texts, reference and graph are the right ones."""
    section, report = section_of(built), read_report(built / "report.json")
    dense, cut = row_of(section, "dense", "fp32"), row_of(section, "cut", "fp32")
    assert (dense.mean_kl.value, dense.top1_agreement.value) == (0, 1)
    ours = report.quality[0]
    assert cut.mean_kl.value == pytest.approx(ours.mean_kl.value, rel=1e-4)
    assert cut.top1_agreement.value == pytest.approx(ours.top1_agreement.value, abs=1e-6)
    losses = [row_of(section, "dense", form).mean_kl.value for form in ("int8", "int4")]
    assert 0 < losses[0] < losses[1], "fewer bits lose more"


def test_differences_are_paired_with_the_rounded_cut(built):
    section = section_of(built)
    ours = row_of(section, "cut", "int4")
    assert ours.kl_above_asked is None
    for row in section.rows:
        if row is not ours:
            gap = row.mean_kl.value - ours.mean_kl.value
            assert row.kl_above_asked.value == pytest.approx(gap, abs=1e-9)


def test_a_finished_build_is_weighed_on_the_same_texts(home, built, run, monkeypatch):
    monkeypatch.chdir(home)
    before = section_of(built)
    code, out, err = run("eval", "cut", "--quantize", "int4", "--json", "-q")
    assert (code, err) == (0, "")
    again = section_of(built)
    assert again == before and json.loads(out)["rounding"]["precision"] == "int4"
    check_manifest(built)
    code, out, _ = run("eval", "cut", "--quantize", "int8", "-q")
    assert code == 0 and section_of(built).precision == "int8" and "cut, int8" in out
    built_report = read_report(built / "report.json")
    assert rounding_verdict(section_of(built)) in verdict(built_report)
    (block,) = (block for block in report_page(built_report).blocks if block.key == "rounding")
    assert block.sentences == (rounding_verdict(section_of(built)),)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("eval", "cut/model", "--quantize", "int4"), 2, "does not take it"),
        (("eval", "cut", "--quantize", "int4", "--items", "3"), 2, "as the build read them"),
        (("build", "-s", "sums.yaml", "-m", "model", "--quantize", "int4", "--out", "other/cut"), 2, "exists and is"),
        (("build", "-s", "sums.yaml", "-m", "bent", "--quantize", "int4", "--out", "bent-cut"), 2, "ONNX"),
    ],
)
def test_what_cannot_be_rounded_is_refused_before_any_work(home, built, run, monkeypatch, words, code, told):
    monkeypatch.chdir(home)
    if not (home / "bent").exists():
        save_random(home / "bent", family_config("starcoder2"))
    found = run(*words, *(BUDGET if words[0] == "build" else ()), "-q")
    assert found[0] == code and found[1] == "" and told in found[2] and found[2].count("\n") == 1, found
    assert not (home / "other").exists() and not (home / "bent-cut").exists()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (80, 32), (24, 32), (96, 16)])
def test_what_a_repair_takes_for_rounded_is_what_onnx_runtime_rounds_to(tmp_path, bits, inputs, block):
    """Rows that are no whole blocks, a block of zeros, and blocks of one sign included."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig as Config
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantizer

    weight = torch.randn(40, inputs, generator=torch.Generator().manual_seed(0))
    weight[3, :16], weight[4], weight[5] = 0, weight[4].abs() + 1, -weight[5].abs() - 1
    turned = np.ascontiguousarray(weight.numpy().T)
    config = Config(block_size=block, is_symmetric=False, bits=bits)
    codes, scales, zeros = DefaultWeightOnlyQuantizer(config).qbits_block_quant(turned)
    numbers = unpacked(codes.reshape(40, -1), bits).reshape(40, -1, block)
    points = unpacked(zeros.reshape(40, -1), bits)[:, : numbers.shape[1], None]
    expected = ((numbers - points) * scales.reshape(40, -1)[..., None]).reshape(40, -1)[:, :inputs]
    found = OnnxRounding(bits, block).of(weight).numpy()
    # A number halfway between two codes may go either way.
    close = np.isclose(found, expected, atol=1e-5)
    assert close.mean() > 0.999 and np.abs(found - expected).max() <= scales.max() * 1.001


def unpacked(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes.astype(np.float32)
    return np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1).astype(np.float32)


def by_hand(loaded, kept: Kept, repair: Repair, rounding: Rounding, held: HeldOut) -> float:
    """KL of the masked, repaired model whose matrices were rounded one by one, as they will be written."""
    g, weights, down = loaded.geometry, {}, {}
    channels = np.ones((g.layers, g.intermediate), dtype=bool) if kept.channels is None else kept.channels
    for index, layer in enumerate(loaded.layers):
        own = repair.weights.get(index, o_proj(layer).weight), repair.down.get(index, down_proj(layer).weight)
        heads = torch.from_numpy(np.repeat(kept.heads[index], g.head_dim))
        weights[index] = rounding.of_columns(own[0].detach(), heads)
        down[index] = rounding.of_columns(own[1].detach(), torch.from_numpy(channels[index]))
    with contextlib.ExitStack() as stack:
        for layer in loaded.layers:
            stack.enter_context(rounded_inside(layer, rounding))
        stack.enter_context(rounded_embedding(loaded, rounding, tied=g.tied))
        return held.divergence(kept, Repair(weights, down=down)).mean_kl.value


# The first is coarse, so that there is something to mend.
@pytest.mark.parametrize("rounding", [OnnxRounding(3), ROUNDINGS["q4_0"]], ids=["3 bits", "q4_0"])
@pytest.mark.parametrize("share", [None, 0.75])
def test_a_repair_that_knows_the_rounding_loses_less_once_rounded(embedded, share, rounding):
    """With nothing cut, and with heads and channels cut; the other repair knows of the cut alone."""
    g = embedded.geometry
    drawn = zip(*(items(domain, "heldout", 7, 16) for domain in DOMAINS), strict=True)
    questions = [item.prompt for row in drawn for item in row]
    texts = continued(embedded, questions, max_tokens=64)
    batches, held = batches_of(embedded, texts[:64]), HeldOut(embedded, texts[64:])
    draw = np.random.default_rng(0)
    kept = Kept(np.ones((g.layers, g.heads), dtype=bool))
    if share is not None:
        heads = np.ones((g.layers, g.heads), dtype=bool)
        heads[:, -1] = False
        kept = Kept(heads, draw.random((g.layers, g.intermediate)) < share)
    usual = next(fit_repairs(embedded, [kept], batches, dtype=torch.float32)) if share is not None else Repair({})
    knowing = next(fit_repairs(embedded, [kept], batches, dtype=torch.float32, rounding=rounding))
    with rounded(embedded, kept, rounding):
        lost = [held.divergence(kept, one).mean_kl.value for one in (usual, knowing)]
    assert lost[1] < 0.9 * lost[0]
    assert lost == pytest.approx([by_hand(embedded, kept, one, rounding, held) for one in (usual, knowing)], rel=1e-4)
    assert held.divergence(Kept(np.ones((g.layers, g.heads), dtype=bool))).mean_kl.value == 0, "nothing stays rounded"
    assert set(knowing.weights) == set(knowing.down) == set(range(g.layers)), "every matrix that can make up for it"
    closed = torch.from_numpy(~np.repeat(kept.heads[0], g.head_dim))
    assert not knowing.weights[0][:, closed].any(), "what was removed stays removed"


def test_a_build_refits_for_its_rounding_beside_a_model_that_stays_as_it_is(home, built):
    """And the export holds what was refitted: rounded again from those files, its weights are the same bytes."""
    plain = inside(home, "build", "-s", "sums.yaml", "-m", "model", "--out", "plain", *BUDGET, *FAST)
    assert plain.code == 0, plain.err
    same = [(home / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "plain")]
    assert same[0] == same[1]
    decoder = read_decoder(built / "model")
    refit = read_refit(built, ROUNDINGS["int4"], decoder.tensors)
    assert refit is not None and refit.precision == "int4"
    fitted = refit.tensors
    matrices = {name for name in decoder.tensors if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert set(fitted) == matrices
    exported = home / "exported" / "cut-onnx-int4"
    assert check_manifest(exported).origin[REFITTED]
    assert "refitted `o_proj` and `down_proj` for int4" in (exported / "README.md").read_text("utf-8")
    for number, one in enumerate((decoder, decoder.with_tensors(fitted))):
        (home / f"again-{number}").mkdir()
        write_graph(one, home / f"again-{number}", PRECISIONS["int4"], Blocks())
    stored = [(folder / DATA_FILE).read_bytes() for folder in (exported, home / "again-0", home / "again-1")]
    assert stored[0] == stored[2] != stored[1]


def test_only_the_rounding_that_was_fitted_for_takes_what_was_refitted(home, built):
    for name, words in (("coarse", ("--precision", "int4", "--block-size", "64")), ("eight", ("--precision", "int8"))):
        done = inside(home, "export", "cut", "--format", "onnx", *words, "--out", name, "-q")
        assert done.code == 0, done.err
        assert REFITTED not in check_manifest(home / name).origin
        assert "refitted" not in (home / name / "README.md").read_text("utf-8")


def test_without_a_refit_there_is_nothing_beside_the_model(home):
    words = ("-s", "sums.yaml", "-m", "model", "--quantize", "int4", "--repair", "none", "--out", "bare")
    done = inside(home, "build", *words, *BUDGET, *FAST)
    assert done.code == 0, done.err
    assert not (home / "bare" / FOLDER).exists() and not section_of(home / "bare").refitted
    assert REFITTED not in check_manifest(home / "exported" / "bare-onnx-int4").origin


def test_refitted_matrices_of_another_model_are_refused(built, tmp_path):
    tensors = read_decoder(built / "model").tensors
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    place = tmp_path / FOLDER / "int4"
    place.mkdir(parents=True)
    save_file({name: torch.zeros(3, 3)}, place / "model.safetensors")
    with pytest.raises(ArtifactError, match="does not belong to the model beside it"):
        read_refit(tmp_path, ROUNDINGS["int4"], tensors)


def test_the_cost_of_weighing_is_foretold(home):
    given = {"model": str(home / "model"), "keep": 0.5, "criterion": "magnitude", "baselines": "none"}
    dense, names = open_dense(str(home / "model")), []
    for more in ({}, {"quantize": "int4"}):
        cost = cost_of(read_request(str(home / "sums.yaml"), given | more, {}), dense, Workspace(home / "cost"))
        names.append({stage.name for stage in cost.stages})
        downs = {stage.name: stage.down_projs for stage in cost.stages if stage.down_projs}
    assert names[1] - names[0] == {"repairing what will be rounded", "judging that repair", "weighing what is rounded"}
    assert downs == {"repairing what will be rounded": 1}, "heads alone are cut, and one repair fits down_proj"


def row(of: str, precision: str, nbytes: int, kl: float, gap: tuple[float, float] | None = None, block: int = 32):
    stored = precision == "bf16"
    return RoundingRow(
        of=of,
        precision=precision,
        block_size=None if stored else block,
        weight_bytes=nbytes,
        mean_kl=Estimate(kl),
        top1_agreement=Estimate(1 - kl, max(0.0, 0.9 - kl), 1.0),
        kl_above_asked=Estimate(sum(gap) / 2, *gap) if gap else None,
    )


CUT = row("cut", "int4", 90, 0.3)
DENSE = (row("dense", "bf16", 400, 0), row("dense", "int8", 200, 0.01, (-0.4, -0.2)))


@pytest.mark.parametrize(("high", "broken"), [(1.04, False), (1.2, True)])
def test_what_rounding_does_to_replies_is_held_against_the_bound_on_them(high, broken):
    """Within that bound many tokens may change; without one that alone is a loss."""
    cut = CUT.model_copy(update={"reply_perplexity": Estimate(1.02, 1.0, high)})
    section = RoundingSection(precision="int4", runtime="ONNX Runtime", texts=20, rows=(*DENSE, cut))

    def losses(budget: BudgetSection | None) -> list[str]:
        return [one for one in verdict(Report(title="x", rounding=section, budget=budget)) if one.startswith("LOSS in")]

    found = losses(BudgetSection(keep_requested=1, keep_achieved=1, max_perplexity=1.05))
    assert bool(found) is broken and all("--max-perplexity allows 1.05 before rounding" in one for one in found)
    assert len(losses(None)) == 1


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ((row("dense", "int4", 100, 0.1, (-0.3, -0.1)),), "No dense model that is only rounded to int8 or int4 is as"),
        ((row("dense", "int4", 90, 0.1, (-0.3, -0.1)),), BETTER),
        ((row("dense", "int4", 90, 0.31, (-0.01, 0.03)),), AS_GOOD),
        ((row("dense", "int4", 80, 0.5, (0.1, 0.3)),), "lies below the line"),
        ((row("dense", "int4", 100, 0.1, (-0.3, -0.1)), row("dense", "int4", 85, 0.4, (0.05, 0.2), 128)), "below"),
        ((row("dense", "int4", 100, 0.1, (-0.3, -0.1)), row("dense", "int4", 85, 0.2, (-0.2, -0.01), 128)), BETTER),
        ((row("dense", "int4", 90, 0.1),), "Too few texts"),
    ],
)
def test_the_verdict_follows_bytes_and_paired_intervals(rows, expected):
    section = RoundingSection(precision="int4", runtime="ONNX Runtime", texts=20, rows=(*DENSE, *rows, CUT))
    told = rounding_verdict(section)
    assert expected in told and alarming(told) == (expected in (BETTER, AS_GOOD))
    report = Report(title="x", rounding=section)
    assert told in verdict(report)
    (block,) = (block for block in report_page(report).blocks if block.key == "rounding")
    assert told in block.sentences and len(block.tables[0].rows) == len(section.rows)


@pytest.mark.parametrize(
    ("changed", "allowed", "expected"),
    [
        (Estimate(0.03, 0.0, 0.08), 0.05, "LOSS in int4: 3 % (0 % to 8 %) of the next tokens change, where --max-loss"),
        (Estimate(0.03, 0.0, 0.04), 0.05, None),
        (Estimate(0.2, 0.15, 0.25), None, "LOSS in int4: 20 % (15 % to 25 %) of the next tokens change."),
        (Estimate(0.03, 0.0, 0.2), None, None),
    ],
)
def test_what_rounding_changes_is_held_against_the_bound_or_is_said_where_it_is_much(changed, allowed, expected):
    cut = CUT.model_copy(update={"top1_agreement": changed.rest})
    section = RoundingSection(precision="int4", runtime="r", texts=20, rows=(*DENSE, cut))
    budget = BudgetSection(keep_requested=0.5, keep_achieved=0.5, max_loss=allowed)
    found = [one for one in verdict(Report(title="x", rounding=section, budget=budget)) if one.startswith("LOSS in")]
    assert [one.startswith(expected) for one in found] == [True] if expected else not found
    assert all(map(alarming, found))


def test_the_table_goes_from_the_largest_to_the_smallest_and_names_other_blocks():
    rows = (*DENSE, row("dense", "int4", 85, 0.4, (0.05, 0.2), 128), CUT)
    _, headers, cells = rounding_table(RoundingSection(precision="int4", runtime="r", texts=20, rows=rows))
    assert [one[0] for one in cells] == ["dense, bf16", "dense, int8", "cut, int4", "dense, int4 in blocks of 128"]
    assert len(headers) == 5 and all(len(one) == 5 for one in cells)
