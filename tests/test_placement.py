"""A model whose weights lie on disk gives what the same model in memory gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint
from transformers import AutoModelForCausalLM

import sspcompile
from sspcompile.api.cost import _seconds
from sspcompile.checkpoint import check_manifest
from sspcompile.cli.main import cli
from sspcompile.criteria.channels import head_columns
from sspcompile.criteria.llm_pruner import llm_pruner
from sspcompile.criteria.units import CriterionInput
from sspcompile.errors import InputError
from sspcompile.machine import free_memory, resident_bytes, usable_cores
from sspcompile.model.capture import features
from sspcompile.model.hooks import head_gates
from sspcompile.model.loading import load
from sspcompile.model.modules import o_proj
from sspcompile.model.placement import (
    DEVICE_MAPS,
    ON_CPU,
    Placement,
    devices_here,
    loading_options,
    placement_of,
    resolve,
    wait_for,
)
from sspcompile.model.text import encode
from sspcompile.model.weights import input_device, weight_of
from sspcompile.startup import SLEEPING

SPREAD = Placement(device="cpu", dtype="float32", device_map="auto")
FAST = {"criterion": "subspace", "continuation_tokens": 1, "max_tokens": 16}
ROOM = 40_000_000
WAITING = (*SLEEPING, "GOMP_SPINCOUNT")
DESK = [f"What is {n} plus {n + 1}?" for n in range(24)]
PROMPTS = ["What is 3 plus 4?", "Name a metal.", "x"]


@pytest.fixture
def model(tmp_path):
    return make_checkpoint(tmp_path / "dense", Shape(layers=3, hidden=64, kv_heads=4, head_dim=16))


def test_unknown_map_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="Accepted: auto"):
        placement_of({"device_map": "everywhere"}, {})
    assert loading_options(resolve(ON_CPU)) == {} and "auto" in DEVICE_MAPS


def test_weights_on_disk_are_found_and_give_the_same_features(model, tmp_path):
    whole = load(model, fingerprint="")
    spread = load(model, fingerprint="", placement=SPREAD)
    # As if the memory held a third of it: nothing is left but the disk.
    stored = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map="auto", max_memory={"cpu": 100_000}, offload_folder=tmp_path / "offload"
    )
    object.__setattr__(spread, "model", stored)
    assert o_proj(spread.layers[2]).weight.is_meta and input_device(stored) == torch.device("cpu") == spread.device
    assert np.array_equal(features(spread, PROMPTS, 16), features(whole, PROMPTS, 16))
    for layer in range(3):
        assert weight_of(o_proj(spread.layers[layer])).equal(o_proj(whole.layers[layer]).weight)
        assert head_columns(spread, layer).equal(head_columns(whole, layer))
    gates = torch.ones(3, 8)
    gates[1, :3] = 0
    ids = torch.tensor([[1, 2, 3]])
    with torch.inference_mode(), head_gates(whole, gates), head_gates(spread, gates):
        assert stored(ids).logits.equal(whole.model(ids).logits)
    with pytest.raises(InputError, match="llm-pruner needs gradients of weights"):
        llm_pruner(spread, CriterionInput([], 0))


COMMANDS = ("build", "plan", "prepare", "eval", "verify", "run", "bench", "export")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_runs_a_model_takes_the_options(name):
    options = {text for parameter in cli.commands[name].params for text in parameter.opts}
    assert {"--device", "--dtype", "--device-map", "--memory", "--threads"} <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_heeds_the_options_and_the_environment_before_any_work(name, monkeypatch):
    words = [name, *{"build": ["-s", "A helpdesk for chemistry"], "run": ["-p", "x"]}.get(name, [])]
    with pytest.raises(InputError, match="--threads is 0"):
        cli.main([*words, "--threads", "0"], standalone_mode=False)
    monkeypatch.setenv("SSPCOMPILE_DEVICE", "tpu")
    with pytest.raises(InputError, match="no device 'tpu'"):
        cli.main(words, standalone_mode=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "tpu"}, "no device 'tpu'. Accepted: auto, cpu, cuda, cuda:N, mps"),
        ({"device": "cuda:x"}, "no device 'cuda:x'"),
        ({"dtype": "int8"}, "'int8'. Accepted: auto, float32, bfloat16, float16"),
        ({"memory": "much"}, "--memory 'much' is not a size. Type 5GB"),
        ({"threads": 0}, "--threads is 0. Give a whole number from 1"),
        ({"threads": "many"}, "--threads is many"),
        ({"device_map": "disk"}, "no device map 'disk'. Accepted: auto"),
    ],
)
def test_what_no_machine_has_is_refused_in_one_line(given, said):
    with pytest.raises(InputError) as error:
        placement_of(given, {})
    assert said in str(error.value)


def test_flags_go_before_the_environment():
    environment = {"SSPCOMPILE_DEVICE": "cpu", "SSPCOMPILE_MEMORY": "2GiB", "SSPCOMPILE_THREADS": "3", "OTHER": "x"}
    assert placement_of({"threads": 2}, environment) == Placement("cpu", memory=2 << 30, threads=2)
    assert placement_of({"memory": 5_000}, {}) == Placement(memory=5_000)
    with pytest.raises(InputError, match="SSPCOMPILE_THREADS is few"):
        placement_of({}, {"SSPCOMPILE_THREADS": "few"})


def test_auto_is_what_is_there_and_what_is_not_there_is_refused():
    place = resolve(Placement())
    assert str(place.device) == devices_here()[0]
    if devices_here() == ("cpu",):
        assert place.dtype == torch.float32 and place.facts()["device"] == "cpu"
        with pytest.raises(InputError, match=r"has no device 'cuda:1'\. It has cpu"):
            resolve(Placement(device="cuda:1"))
    with pytest.raises(InputError, match="has no device 'cuda:999'"):
        resolve(Placement(device="cuda:999"))
    assert resolve(Placement("cpu", "bfloat16")).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_computes_what_the_processor_computes_and_reads_layers_from_disk(model):
    whole = load(model, fingerprint="")
    on_gpu = load(model, fingerprint="", placement=Placement("cuda", "float32"))
    assert on_gpu.device.type == "cuda"
    expected = features(whole, PROMPTS, 16)
    np.testing.assert_allclose(features(on_gpu, PROMPTS, 16), expected, rtol=1e-3, atol=1e-4)
    small = load(model, fingerprint="", placement=Placement("cuda", "float32", memory=20_000_000))
    assert any(parameter.is_meta for parameter in small.model.parameters())
    np.testing.assert_allclose(features(small, PROMPTS, 16), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_logits_in_float32(model, dtype):
    loaded = load(model, fingerprint="", placement=Placement("cpu", dtype))
    assert loaded.model.dtype == getattr(torch, dtype)
    batch = encode(loaded, PROMPTS, 16)[0]
    logits = loaded.scored_logits(batch.input_ids, batch.attention_mask, batch.score_mask)
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def test_threads_are_set_for_torch_and_for_what_numpy_multiplies_with():
    code = (
        "import numpy, scipy.linalg, torch, threadpoolctl\n"
        "from sspcompile.model.placement import Placement, use_threads\n"
        "use_threads(Placement(threads=2))\n"
        "print(torch.get_num_threads(), *{pool['num_threads'] for pool in threadpoolctl.threadpool_info()})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "2"]


def test_threads_sleep_unless_the_user_said_how_they_wait():
    code = (
        "import os\nfrom sspcompile.startup import let_threads_sleep\nlet_threads_sleep()\n"
        "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('KMP_BLOCKTIME'))"
    )
    bare = {name: value for name, value in os.environ.items() if name not in WAITING}
    for said, expected in (
        ({}, "PASSIVE 0"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"KMP_BLOCKTIME": "200"}, "None 200"),
    ):
        command = [sys.executable, "-P", "-c", code]
        done = subprocess.run(command, env={**bare, **said}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


HOLES = """
import sys, numpy as np
from sspcompile.machine import give_memory_back, resident_bytes
if sys.argv[1] == "bounded":
    give_memory_back()
del_one = np.ones(3 << 20)  # 24 MB: from here on glibc keeps what is smaller
del del_one
before, held = resident_bytes(), [np.ones(1 << 20) for _ in range(40)]
full = resident_bytes() - before
held[::2] = [None] * 20
print(full, resident_bytes() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone keeps what is freed in this way")
def test_a_process_below_a_limit_keeps_no_holes():
    found = {}
    for kind in ("bounded", "free"):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", HOLES, kind], capture_output=True, text=True, check=True, env=environment
        )
        full, left = map(int, done.stdout.split())
        assert full > 300e6
        found[kind] = left / full
    assert found["bounded"] < 0.6 < 0.9 < found["free"]


def test_a_container_bounds_cores_and_memory(tmp_path):
    cores, free = usable_cores(tmp_path), free_memory(tmp_path)
    assert cores >= 1 and free > 0
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 500000\nactive_file 7\n")
    assert usable_cores(tmp_path) == 1 and free_memory(tmp_path) == 2_500_000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_cores(tmp_path) == cores and free_memory(tmp_path) > 5_000_000


def files_of(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def content_of(name: str, folder: Path) -> bytes:
    return (folder / name).read_bytes()


@pytest.mark.whole
def test_a_build_in_little_memory_is_the_same_build(tmp_path):
    """With layers on disk the whole way: scoring, search, repair and proof."""
    model, made = make_checkpoint(tmp_path / "dense", Shape(layers=3, hidden=256, kv_heads=4, head_dim=32)), []
    for name in ("whole", "little"):
        # Embeddings and one layer have room beside what is held now, and what will be; all layers and a batch have not.
        options = FAST if name == "whole" else {**FAST, "memory": resident_bytes() + ROOM}
        place = {"out": tmp_path / name / "desk", "root": tmp_path / name}
        artifact = sspcompile.build(model, DESK, keep=0.5, layout="uniform", **place, **options)
        made.append({path: content_of(path, artifact.path) for path in sorted(files_of(artifact.path))})
        origin = check_manifest(artifact.path).origin
        assert (origin["device"], origin["dtype"]) == ("cpu", "float32") and int(origin["threads"]) >= 1
        assert artifact.report.origin["threads"] == origin["threads"]
    whole, little = made
    assert whole == little


def test_what_is_timed_waits_for_every_device_of_a_model(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append(str(device)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: done.append("mps"))
    wait_for(*map(torch.device, ("cpu", "meta", "cuda:1", "mps")))
    assert done == ["cuda:1", "mps"]
    loaded = SimpleNamespace(
        device=torch.device("cuda:0"),
        model=SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device("cuda:1"))] * 2),
    )
    done.clear()
    assert _seconds(loaded, lambda: done.append("run")) >= 0
    assert done[2] == "run" and sorted(done[:2]) == sorted(done[3:]) == ["cuda:0", "cuda:1"]
