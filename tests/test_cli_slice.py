"""`slice`, `plan --mask` and `verify` on what `slice` wrote, as their users meet them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from builders import Shape as ModelShape
from builders import family_config, make_checkpoint, save_random
from test_slicing_exact import mask_for
from transformers import AutoModelForCausalLM

from sspcompile.checkpoint import Checkpoint, fingerprint
from sspcompile.errors import InputError
from sspcompile.request.sizes import byte_size
from sspcompile.slicing.mask import HeadMask, dump_mask, load_mask


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    shape = ModelShape(family="qwen2", layers=3, hidden=64, kv_heads=4, head_dim=16, shard_bytes=20_000)
    return make_checkpoint(tmp_path_factory.mktemp("model") / "dense", shape)


def written(mask: HeadMask, path: Path) -> Path:
    path.write_text(dump_mask(mask))
    return path


@pytest.fixture(params=["uniform", "per-layer"])
def mask(request, model, tmp_path) -> Path:
    checkpoint = Checkpoint(model)
    made = replace(mask_for(checkpoint, 0.5, request.param, 3), model=fingerprint(checkpoint))
    return written(made, tmp_path / "mask.json")


def refused(done: tuple[int, str, str], code: int, *expected: str) -> None:
    assert done[0] == code and done[1] == "" and done[2].startswith("Error: ") and done[2].count("\n") == 1, done
    assert all(text in done[2] for text in expected), done


def test_slice_writes_a_folder_that_verify_proves_and_transformers_loads(run, model, mask, tmp_path):
    out = tmp_path / "cut"
    code, text, _ = run("slice", "--model", model, "--mask", mask, "--out", out)
    assert code == 0 and str(out) in text
    assert json.loads((out / "manifest.json").read_text())["origin"]["source_name"] == str(model)
    assert "Qwen2ForCausalLM" in (out / "README.md").read_text()
    custom = (out / "modeling_sspcompile.py").exists()
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=custom)
    for way in ((), ("--layerwise",)):
        code, text, err = run("verify", out, "--json", *way)
        found = json.loads(text)
        assert code == 0 and found["same_text"] and found["layerwise"] == (way == ("--layerwise",)), err
        assert found["dtype"] == "float64" and found["relative"] <= found["bound"]
    refused(run("slice", "--model", model, "--mask", mask, "--out", out), 2, "exists")
    assert run("slice", "--model", model, "--mask", mask, "--out", out, "--overwrite")[0] == 0
    weights = next(out.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(run("verify", out), 2, "is not the file that was built")


def test_checksums_find_a_flipped_bit_in_weights(run, model, mask, tmp_path):
    out = tmp_path / "cut"
    assert run("slice", "--model", model, "--mask", mask, "--out", out, "--checksums", "--hard-link", "-q")[0] == 0
    assert run("verify", out, "--layerwise")[0] == 0
    weights = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    refused(run("verify", out), 2, "is not the file that was built")


def test_verify_says_what_is_wrong_in_weights_without_checksums(run, model, mask, tmp_path):
    out = tmp_path / "cut"
    assert run("slice", "--model", model, "--mask", mask, "--out", out, "-q")[0] == 0
    weights = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for way in ("--layerwise", "--whole"):
        done = run("verify", out, way)
        refused(done, 3, "of the written model is not what the mask leaves")
        assert "ublished" not in done[2]


def test_slice_needs_no_torch(model, mask, tmp_path):
    program = (
        "import sys; from sspcompile.cli.main import cli\n"
        f"cli.main(['slice', '--model', {str(model)!r}, '--mask', {str(mask)!r}, '--out', {str(tmp_path / 'cut')!r}],"
        " standalone_mode=False)\n"
        f"cli.main(['plan', '--model', {str(model)!r}, '--keep', '0.5', '--json'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done


def test_mask_of_another_model_is_refused_unless_asked_for(run, model, mask, tmp_path):
    other = make_checkpoint(
        tmp_path / "other", ModelShape(family="qwen2", layers=3, hidden=64, kv_heads=4, head_dim=16), seed=9
    )
    refused(run("slice", "--model", other, "--mask", mask, "--out", tmp_path / "x"), 2, "another model", "--any-model")
    assert run("slice", "--model", other, "--mask", mask, "--out", tmp_path / "x", "--any-model")[0] == 0
    assert run("verify", tmp_path / "x", "--layerwise")[0] == 0


def test_plan_of_a_mask_is_the_plan_that_slice_follows(run, model, mask, tmp_path):
    code, text, _ = run("plan", "--model", model, "--mask", mask, "--json")
    planned = json.loads(text)
    assert code == 0 and "Layer" not in text and len(planned["layers"]) == 3
    assert sum(layer["kv_heads"] for layer in planned["layers"]) == sum(kv for _, kv in planned["counts"])
    code, text, _ = run("slice", "--model", model, "--mask", mask, "--out", tmp_path / "cut", "--dry-run", "--json")
    dry = json.loads(text)
    assert code == 0 and dry.pop("folder") is None and not (tmp_path / "cut").exists()
    assert dry == json.loads(json.dumps({key: planned[key] for key in dry}))
    table = run("plan", "--model", model, "--mask", mask, "--by-layer")[1]
    assert ("tensor parallel" in table) == (len(set(map(tuple, planned["counts"]))) == 1)
    told = next(one for one in planned["runtimes"] if one["runtime"] == "vLLM")
    assert told["loads"] and ("--trust-remote-code" in told["reason"]) == planned["custom_code"]
    refused(run("plan", "--mask", mask, "--model", model, "--scenario", "some words"), 2, "exclude each other")


def test_tensor_parallel_degrees_are_what_divides_every_layer(run, model, mask):
    planned = json.loads(run("plan", "--model", model, "--mask", mask, "--json")[1])
    degrees = next(v for v in planned["runtimes"] if v["runtime"] == "vLLM")["tensor_parallel"]
    assert set(degrees) == {str(n) for n in range(1, 9)}
    for degree, verdict in degrees.items():
        tp = int(degree)
        fits = all(q % tp == 0 and (kv % tp == 0 or tp % kv == 0) for q, kv in planned["counts"])
        fits = fits and all(width % tp == 0 for width in planned["widths"])
        assert verdict["loads"] == fits and bool(verdict["reason"]) != fits


def test_host_is_written_and_proven(run, model, tmp_path):
    checkpoint = Checkpoint(model)
    mask = written(mask_for(checkpoint, 0.5, "uniform", 3), tmp_path / "mask.json")
    out = tmp_path / "cut"
    assert run("slice", "--model", model, "--mask", mask, "--out", out, "--any-model", "--host", "seed_oss")[0] == 0
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "SeedOssForCausalLM"
    assert "SeedOssForCausalLM" in (out / "README.md").read_text()
    assert run("verify", out, "--layerwise")[0] == 0
    refused(
        run("slice", "--model", model, "--mask", mask, "--out", tmp_path / "x", "--host", "bert"), 2, "Accepted: auto"
    )


def test_a_mask_with_an_empty_layer_takes_its_attention_out(run, tmp_path):
    model = save_random(tmp_path / "dense", family_config("llama", bias=True), seed=2)
    made = mask_for(Checkpoint(model), 0.5, "per-layer", 3)
    made = replace(made, kept=((), *made.kept[1:]))
    mask = written(made, tmp_path / "mask.json")
    assert load_mask(mask).silent == (0,)
    assert run("slice", "--model", model, "--mask", mask, "--out", tmp_path / "cut", "--any-model")[0] == 0
    for way in ("--layerwise", "--whole"):
        assert run("verify", tmp_path / "cut", way)[0] == 0
    planned = run("plan", "--model", model, "--mask", mask, "--by-layer")[1]
    assert "Attention removed, MLP kept: layer 0." in planned
    assert json.loads((tmp_path / "cut" / "plan.json").read_text())["removed_attention"] == [0]
    assert "the whole attention of 1 layer" in (tmp_path / "cut" / "README.md").read_text()
    assert "attention removed" in run("inspect", tmp_path / "cut")[1]
    none = written(replace(made, kept=((),) * made.layers), tmp_path / "none.json")
    refused(run("slice", "--model", model, "--mask", none, "--out", tmp_path / "x"), 2, "no layer keeps a head")


def test_a_mask_of_no_model_is_cut_only_where_that_is_asked_for(run, model, tmp_path):
    mask = written(mask_for(Checkpoint(model), 0.5, "uniform", 3), tmp_path / "mask.json")
    cut = ("slice", "--model", model, "--mask", mask, "--out", tmp_path / "cut", "-q")
    refused(run(*cut), 2, "does not say which model", "--any-model")
    assert not (tmp_path / "cut").exists()
    assert run("plan", "--model", model, "--mask", mask)[0] == 0
    assert run(*cut, "--any-model")[0] == 0


def test_sizes_are_read_as_they_are_typed():
    sizes = {"5GB": 5 * 10**9, "200 MiB": 200 << 20, "1000": 1000, "1.5kb": 1500}
    assert {text: byte_size(text, "--max-shard-size") for text in sizes} == sizes
    for text in ("", "x", "5TB", "-1", "0", "GB"):
        with pytest.raises(InputError, match="--max-shard-size"):
            byte_size(text, "--max-shard-size")


def test_max_shard_size_bounds_every_file(run, model, mask, tmp_path):
    out = tmp_path / "cut"
    assert run("slice", "--model", model, "--mask", mask, "--out", out, "--max-shard-size", "90kB")[0] == 0
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < 93_000
    assert run("verify", out, "--layerwise")[0] == 0
