"""`--quantize q8_0` and `q4_0`: a repair that knows how a GGUF rounds, and what it is worth in bytes."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from builders import Shape, make_checkpoint, stated
from commands import Done, inside
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from gguf_models import config_for, dense
from test_rounding import row_of, section_of
from torch import nn

from sspcompile.checkpoint import check_manifest
from sspcompile.checkpoint.headers import read_words
from sspcompile.checkpoint.source import tensor_table
from sspcompile.evaluate import rounded_gguf
from sspcompile.evaluate.rounded_gguf import GgufScales
from sspcompile.evaluate.rounding import Form, Pair, weigh
from sspcompile.export.gguf import publish
from sspcompile.export.gguf.rounding import TYPES, as_floats, stored_type
from sspcompile.export.refitted import FOLDER, REFITTED, read_refit
from sspcompile.model.blocks import BLOCK, GGUF_ROUNDINGS, ROUNDINGS
from sspcompile.model.llama_session import MODEL
from sspcompile.model.loading import load_cut
from sspcompile.model.text import Sentence
from sspcompile.report.json import read_report
from sspcompile.report.rounding import rounding_table, rounding_verdict
from sspcompile.report.verdict import verdict
from sspcompile.request.options import Options
from sspcompile.request.rounding import Rounded

FAST = ("--max-tokens", "48", "--continuation-tokens", "4", "--baselines", "none", "-q")
BUDGET = ("--keep", "0.5", "--criterion", "magnitude", "--layout", "per-layer")


@pytest.fixture(autouse=True, scope="module")
def _without_llama_cpp():
    """What is published is the same whether llama.cpp is installed here or not."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(publish, "has_llama_cpp", lambda: False)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model whose down_proj has rows that are not whole blocks."""
    home = tmp_path_factory.mktemp("home")
    dense(home / "model", config_for("llama", tied=True, intermediate_size=112))
    stated(home / "sums.yaml")
    return home


def build(home: Path, out: str, *more: str) -> Done:
    return inside(home, "build", "-s", "sums.yaml", "-m", "model", "--out", out, *more, *BUDGET, *FAST)


@pytest.fixture(scope="module")
def built(home) -> Path:
    """A build that was rounded to q4_0."""
    done = build(home, "cut", "--quantize", "q4_0")
    assert done.code == 0, done.err
    return home / "cut"


def by_gguf(numbers: np.ndarray, kind: str) -> np.ndarray:
    """What `gguf` makes of rows in a type."""
    found = GGMLQuantizationType[kind]
    with np.errstate(all="ignore"):  # of scales that fp16 cannot hold
        return dequantize(quantize(np.ascontiguousarray(numbers), found), found)


def awkward() -> np.ndarray:
    """Rows [64, 320] of all sizes, some of them made to be rounded in another way."""
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((64, 320)).astype(np.float32) * 10.0 ** draw.integers(-12, 4, (64, 1))
    rows[0] = 0
    rows[1], rows[1, 5] = 0, 1e4  # one number alone
    rows[2] = np.tile([1, -1], 160)  # two of the largest magnitude: the first decides
    rows[3] = np.arange(320) - 160
    rows[4] = np.tile([127, 0.5, -0.5, 1.5, -1.5, 2.5, -126.5, 126.5], 40)  # halves in Q8_0
    rows[5] = np.tile([-8, 0.5, -0.5, 1.5, -1.5, 7.5, 7.9, 8], 40)  # halves in Q4_0, and its end
    rows[6] = draw.standard_normal(320) * 1e-42  # the inverse of the scale is infinite
    rows[7] = draw.standard_normal(320) * 1e-7  # the scale is subnormal in fp16
    rows[8] = draw.standard_normal(320) * 1e-30
    rows[9] = np.where(np.arange(320) % 3, 1e-6, 1e5)
    rows[10] = -np.abs(rows[10]) - 1
    return rows.astype(np.float32)


@pytest.mark.parametrize("kind", GGUF_ROUNDINGS)
def test_what_a_repair_takes_for_rounded_is_what_a_gguf_holds_to_the_bit(kind):
    rows = awkward()
    assert np.array_equal(GGUF_ROUNDINGS[kind].of(torch.from_numpy(rows)).numpy(), by_gguf(rows, kind.upper()))


@pytest.mark.parametrize("kind", GGUF_ROUNDINGS)
@pytest.mark.parametrize("kept", [96, 112, 0])
def test_columns_that_are_left_decide_whether_a_matrix_is_rounded_in_blocks(kind, kept):
    """Blocks are those of the columns that are written, and rows that are not whole blocks stay in F16."""
    weight, draw = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)), np.random.default_rng(0)
    columns = torch.zeros(128, dtype=torch.bool)
    columns[draw.permutation(128)[:kept]] = True
    found = GGUF_ROUNDINGS[kind].of_columns(weight, columns)
    assert not found[:, ~columns].any()
    if kept:
        written = weight[:, columns].numpy()
        stored = stored_type(TYPES[kind].here, written.shape, exact=False)
        assert stored == ("F16" if kept % BLOCK else kind.upper())
        assert np.array_equal(found[:, columns].numpy(), by_gguf(written, stored))


def test_a_rounding_is_known_by_one_name_wherever_it_is_asked_for():
    assert tuple(ROUNDINGS) == get_args(Rounded)
    named = {rounding: kind.upper() for kind, rounding in GGUF_ROUNDINGS.items()}
    for name, rounding in GGUF_ROUNDINGS.items():
        assert (TYPES[name].here, TYPES[name].embedding) == (named[rounding], named[rounding.table])
    assert set(GGUF_ROUNDINGS) == {name for name, kind in TYPES.items() if kind.rounded and kind.here}


def test_a_build_refits_for_its_type_and_exports_what_it_refitted(home, built):
    plain = build(home, "plain")
    assert plain.code == 0, plain.err
    same = [(home / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "plain")]
    assert same[0] == same[1], "the model beside it stays as it is"
    tensors = tensor_table(built / "model")
    refit = read_refit(built, ROUNDINGS["q4_0"], tensors)
    assert refit is not None and refit.precision == "q4_0"
    assert set(refit.tensors) == {name for name in tensors if name.endswith(("o_proj.weight", "down_proj.weight"))}
    exported = home / "exported" / "cut-gguf-q4_0"
    origin = check_manifest(exported).origin
    assert origin["type"] == "q4_0" and origin[REFITTED] is True
    assert "refitted `o_proj` and `down_proj` for q4_0" in (exported / "README.md").read_text("utf-8")
    stored = {one.name: one for one in GGUFReader(exported / MODEL).tensors}
    for layer in range(4):
        for ours, theirs in (("attn_output", "self_attn.o_proj"), ("ffn_down", "mlp.down_proj")):
            info = refit.tensors[f"model.layers.{layer}.{theirs}.weight"]
            one = stored[f"blk.{layer}.{ours}.weight"]
            assert one.tensor_type.name == ("F16" if ours == "ffn_down" else "Q4_0")
            found = dequantize(one.data, one.tensor_type)
            assert np.array_equal(found, by_gguf(as_floats(read_words(info), info.dtype), one.tensor_type.name))
            own = tensors[f"model.layers.{layer}.{theirs}.weight"]
            assert not np.array_equal(read_words(info), read_words(own))


def test_the_report_weighs_what_the_file_holds(home, built):
    section = section_of(built)
    assert section.precision == "q4_0" and section.refitted and section.runtime.endswith("rounded as in a GGUF")
    names = {(row.of, row.precision) for row in section.rows}
    assert names == {(of, form) for of in ("dense", "cut") for form in ("fp32", "q8_0", "q4_0")}
    file = GGUFReader(home / "exported" / "cut-gguf-q4_0" / MODEL)
    assert row_of(section, "cut", "q4_0").weight_bytes == sum(one.n_bytes for one in file.tensors)
    assert "cut, q4_0, refitted for it" in [cells[0] for cells in rounding_table(section)[2]]
    check_manifest(built)
    found = json.loads((built / "report.json").read_text())
    ours = found["quality"][0]["mean_kl"]["value"]
    assert row_of(section, "cut", "fp32").mean_kl.value == pytest.approx(ours, rel=1e-4), "the texts that judged it"
    losses = [row_of(section, "dense", form).mean_kl.value for form in ("fp32", "q8_0", "q4_0")]
    assert losses[0] == 0 and 0 < losses[1] < losses[2], "fewer bits lose more"


def offloaded(*args, **options):
    """A cut whose layers accelerate keeps elsewhere and brings whenever they run."""
    model = load_cut(*args, **options)
    for layer in model.model.model.layers:
        cpu_offload(layer, execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("loads", [load_cut, offloaded])
def test_a_form_is_read_with_the_numbers_of_its_file(loads, home, built, monkeypatch):
    """Every matrix replaced by what `gguf` makes of it, refitted ones first, embeddings and head in Q8_0."""
    monkeypatch.setattr(rounded_gguf, "load_cut", loads)
    tensors = tensor_table(built / "model")
    refit = read_refit(built, ROUNDINGS["q4_0"], tensors)
    scales = GgufScales(Pair(home / "model", built / "model", "q4_0", refit.tensors, custom_code=True))
    model = load_cut(built / "model", trust_remote_code=True)
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and name != "lm_head":  # it is tied
            info = refit.tensors.get(f"{name}.weight", tensors[f"{name}.weight"])
            wanted = TYPES["q4_0"].embedding if isinstance(module, nn.Embedding) else TYPES["q4_0"].here
            numbers = as_floats(read_words(info), info.dtype)
            rounded = by_gguf(numbers, stored_type(wanted, numbers.shape, exact=False))
            module.weight.data = torch.from_numpy(rounded)
    model.model.tie_weights()
    ids = torch.tensor([[5, 40, 50, 60, 7, 30]])
    asked = ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool)
    with scales.opened(Form("cut", "q4_0")) as opened:
        assert torch.equal(opened.scored_logits(*asked), model.scored_logits(*asked))
    with scales.opened(Form("cut", "q8_0")) as other:
        assert not torch.equal(other.scored_logits(*asked), model.scored_logits(*asked))


def test_one_form_at_a_time_is_in_memory(home, built, monkeypatch):
    loaded: list[weakref.ref[nn.Parameter]] = []

    def load(*args, **options):
        assert not [one for one in loaded if one() is not None]
        model = load_cut(*args, **options)
        model.model.lm_head.forward = model.model.lm_head.forward  # a circle, as reading layers from disk makes them
        loaded.append(weakref.ref(model.model.lm_head.weight))
        return model

    monkeypatch.setattr(rounded_gguf, "load_cut", load)
    scales = GgufScales(Pair(home / "model", built / "model", "q4_0", {}, custom_code=True))
    texts = [Sentence(tuple(range(5, 5 + n)), n - 3) for n in (9, 12)]
    gc.disable()
    try:
        weighed = weigh(scales, texts, home)
    finally:
        gc.enable()
    assert len(loaded) == 1 + len(weighed)


def test_types_may_be_named_as_llama_cpp_names_them():
    assert Options(quantize="Q4_0").quantize == "q4_0"


def test_a_finished_build_is_weighed_again_in_another_type(home, built, run, monkeypatch):
    monkeypatch.chdir(home)
    before = section_of(built)
    code, out, err = run("eval", "cut", "--quantize", "q4_0", "--json", "-q")
    assert (code, err) == (0, "") and section_of(built) == before
    assert json.loads(out)["rounding"]["precision"] == "q4_0"
    code, out, _ = run("eval", "cut", "--quantize", "q8_0", "-q")
    again = section_of(built)
    assert code == 0 and again.precision == "q8_0" and not again.refitted and "cut, q8_0" in out
    assert rounding_verdict(again) in verdict(read_report(built / "report.json"))
    check_manifest(built)


TAKEN = "as the build refitted them for q4_0"
LEFT = "The build refitted o_proj and down_proj for q4_0; this export has the model's own."


@pytest.mark.parametrize(
    ("words", "told", "refitted"),
    [
        (("gguf", "--type", "q4_0"), TAKEN, True),
        (("gguf", "--type", "Q4_0"), TAKEN, True),
        (("gguf", "--type", "q8_0"), LEFT, False),
        (("gguf",), LEFT, False),
        (("onnx", "--precision", "int4"), LEFT, False),
    ],
    ids=["its type", "in capitals", "another type", "as it is stored", "another runtime"],
)
def test_an_export_says_whether_it_holds_what_was_refitted(home, built, words, told, refitted):
    done = inside(home, "export", "cut", "--format", *words, "--out", "exported/one", "--overwrite", "-q")
    assert done.code == 0 and done.out.count(told) == 1, done.err
    assert (REFITTED in check_manifest(home / "exported" / "one").origin) is refitted
    assert ("refitted" in (home / "exported" / "one" / "README.md").read_text("utf-8")) is refitted


def test_an_export_says_so_in_json_too(home, built):
    words = ("export", "cut", "--format", "gguf", "--out", "exported/one", "--overwrite", "--json", "-q")
    for kind in ("q4_0", "q8_0"):
        done = inside(home, *words, "--type", kind)
        assert done.json["refit"] == {"precision": "q4_0", "taken": kind == "q4_0"}, done.err


def test_a_build_without_a_refit_says_nothing_of_one(home):
    done = build(home, "bare", "--quantize", "q8_0", "--repair", "none")
    assert done.code == 0, done.err
    assert not (home / "bare" / FOLDER).exists() and not section_of(home / "bare").refitted
    done = inside(home, "export", "bare", "--format", "gguf", "--type", "q8_0", "--out", "again", "-q")
    assert done.code == 0 and "refitted" not in done.out


REFUSED = {
    "written by llama.cpp alone": (("-m", "model", "--quantize", "q4_k_m"), "rounded by llama.cpp's own quantiser"),
    "written by llama.cpp alone, in capitals": (("-m", "model", "--quantize", "Q6_K"), "--type q6_k"),
    "unknown": (("-m", "model", "--quantize", "q9"), "must be 'int8', 'int4', 'q8_0' or 'q4_0'"),
    "a tokenizer without merges": (("-m", "bytes", "--quantize", "q4_0"), "it has no merges"),
    "layers that may differ": (("-m", "smol", "--quantize", "q4_0"), "build with --layout uniform"),
    "an export that is there": (("-m", "model", "--quantize", "q4_0", "--out", "other/cut"), "exists and is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_gguf_holds_is_refused_before_any_work(home, built, case):
    words, told = REFUSED[case]
    if not (home / "bytes").exists():
        make_checkpoint(home / "bytes", Shape())
        dense(home / "smol", config_for("smollm3", no_rope_layers=[1, 1, 1, 0]))
    out = () if "--out" in words else ("--out", "never")
    done = inside(home, "build", "-s", "sums.yaml", *words, *out, "--keep", "0.5", "-q")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1) and told in done.err, done.err
    assert not (home / "never").exists() and not (home / "other").exists()
