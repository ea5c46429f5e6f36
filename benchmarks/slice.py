"""What cutting a checkpoint costs, against `cp` of the bytes that it writes; and what planning a large one costs.

    python benchmarks/slice.py [--sizes 4GB,8GB] [--repeats 5] [--folder DIR] [--plan-size 140GB]

Makes sharded bf16 checkpoints of random bytes, streamed. For each size, in alternating order: `sspcompile slice` to
keep 0.5 in a process of its own, and `cp` of the folder that it wrote, both followed by a sync of their files (slice
syncs before it publishes). The source is read once before each pair, so both start from the same page cache; when the
memory does not hold it, both read from the disk. Prints medians of wall time, their ratio with its range over the
pairs, and the peak resident memory of the slicing process. `plan` runs on sparse files with a real header.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from sspcompile.checkpoint import Checkpoint, OutputTensor, fingerprint, write_checkpoint
from sspcompile.checkpoint.headers import WORD_BYTES
from sspcompile.request.sizes import byte_size
from sspcompile.slicing.layouts import choose
from sspcompile.slicing.mask import HeadMask, Layout, dump_mask, kept_of

GIGA = 10**9
SHARD_BYTES = 1 * GIGA
CHUNK = 8 << 20
# Attention is 16 % of such a layer, as in Llama-3-70B.
SHAPE = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def sized_config(folder: Path, target: int, shape: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose weights come closest to `target` bytes: the number of layers follows from it."""
    sizes = []
    for layers in (1, 2):
        (folder / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": layers}))
        expected = Checkpoint(folder).expected().values()
        sizes.append(sum(int(np.prod(dims)) * WORD_BYTES[dtype] for dims, dtype in expected))
    layer = sizes[1] - sizes[0]
    return {**shape, "num_hidden_layers": max(1, round((target - sizes[0] + layer) / layer))}


def random_bytes(count: int, seed: int) -> Iterator[bytes]:
    """`count` bytes from one random block, rotated so that no two pieces are alike."""
    block = np.random.default_rng(seed).integers(0, 256, CHUNK, dtype=np.uint8)
    for number, start in enumerate(range(0, count, CHUNK)):
        yield np.roll(block, 64 * number)[: min(CHUNK, count - start)].tobytes()


def make(folder: Path, target: int, shape: dict[str, Any]) -> Path:
    """Write a checkpoint of about `target` bytes in shards of SHARD_BYTES at most."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sized_config(folder, target, shape)))
    tensors = []
    for seed, (name, (dims, dtype)) in enumerate(Checkpoint(folder).expected().items()):
        count = int(np.prod(dims)) * WORD_BYTES[dtype]
        tensors.append(OutputTensor(name, dtype, dims, partial(random_bytes, count, seed)))
    write_checkpoint(folder, tensors, max_shard_bytes=min(SHARD_BYTES, max(1, target // 4)))
    os.sync()
    return folder


def make_sparse(folder: Path, target: int) -> Path:
    """The headers of a model of `target` bytes, with holes where the weights would be."""
    shape = {**SHAPE, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(sized_config(folder, target, shape)))
    shards: list[dict[str, Any]] = [{}]
    ends, places = [0], {}
    for name, (dims, dtype) in Checkpoint(folder).expected().items():
        count = int(np.prod(dims)) * WORD_BYTES[dtype]
        if ends[-1] and ends[-1] + count > 5 * GIGA:
            shards.append({})
            ends.append(0)
        offsets = [ends[-1], ends[-1] + count]
        shards[-1][name] = {"dtype": dtype, "shape": list(dims), "data_offsets": offsets}
        ends[-1], places[name] = offsets[1], len(shards)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, header, end in zip(names, shards, ends, strict=True):
        encoded = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + end)
    weight_map = {tensor: names[shard - 1] for tensor, shard in places.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write_mask(model: Path, path: Path, keep: float, layout: Layout = "per-layer") -> Path:
    checkpoint = Checkpoint(model)
    g = checkpoint.geometry
    scores = np.random.default_rng(0).random((g.layers, g.heads))
    choice = choose(scores, g.kv_heads, keep, layout)
    mask = HeadMask(
        fingerprint(checkpoint),
        g.layers,
        g.heads,
        g.kv_heads,
        kept_of(choice.kept),
        layout,
        keep,
        choice.ratio,
        tuple(map(tuple, scores.tolist())),
        (),
        "random",
        {},
    )
    path.write_text(dump_mask(mask))
    return path


def measured(command: list[str]) -> tuple[float, int]:
    """Wall seconds of a process, and its peak resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copied(source: Path, target: Path) -> float:
    """Wall seconds of `cp -r`, the files synced as a publication demands."""
    script = 'cp -r "$1" "$2" && sync "$2"/*'
    return measured(["sh", "-c", script, "sh", str(source), str(target)])[0]


def warm(folder: Path) -> None:
    """Read every weight file once."""
    buffer = bytearray(CHUNK)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def slice_case(folder: Path, target: int, repeats: int, keep: float) -> dict[str, Any]:
    model = make(folder / "dense", target, SHAPE)
    mask = write_mask(model, folder / "mask.json", keep)
    slicing = [
        sys.executable,
        "-m",
        "sspcompile.cli.main",
        "slice",
        "-q",
        "--model",
        str(model),
        "--mask",
        str(mask),
        "--out",
        str(folder / "cut"),
    ]
    measured(slicing)  # what cp copies, and a warm-up that does not count
    shutil.copytree(folder / "cut", folder / "written", copy_function=os.link)
    shutil.rmtree(folder / "cut")
    seconds: dict[str, list[float]] = {"slice": [], "cp": []}
    peak = 0
    for number in range(repeats):
        for name in ("slice", "cp") if number % 2 == 0 else ("cp", "slice"):
            os.sync()
            if name == "slice":
                warm(model)
                took, resident = measured(slicing)
                peak = max(peak, resident)
                shutil.rmtree(folder / "cut")
            else:
                warm(folder / "written")
                took = copied(folder / "written", folder / "copy")
                shutil.rmtree(folder / "copy")
            seconds[name].append(took)
    written = sum(file.stat().st_size for file in (folder / "written").iterdir())
    held = sum(file.stat().st_size for file in model.iterdir())
    shutil.rmtree(folder)
    ratios = [a / b for a, b in zip(seconds["slice"], seconds["cp"], strict=True)]
    return {"source_bytes": held, "written_bytes": written, **seconds, "ratios": ratios, "peak_bytes": peak}


def plan_case(folder: Path, target: int, repeats: int) -> dict[str, Any]:
    model = make_sparse(folder / "large", target)
    command = [sys.executable, "-m", "sspcompile.cli.main", "plan", "--model", str(model), "--keep", "0.5", "--json"]
    samples = [measured(command) for _ in range(repeats + 1)][1:]
    held = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    shutil.rmtree(model)
    return {"bytes": held, "seconds": [took for took, _ in samples], "peak_bytes": max(peak for _, peak in samples)}


def show(cases: list[dict[str, Any]], plan: dict[str, Any]) -> None:
    memory = psutil.virtual_memory().total
    title = f"slice to keep 0.5 against cp of what it writes; {memory / GIGA:.0f} GB of memory, source read before each"
    table = Table("source", "written", "slice s", "cp s", "ratio", "range", "peak MB", title=title)
    for case in cases:
        fits = "" if case["source_bytes"] + case["written_bytes"] < memory else " (exceeds the page cache)"
        ratios = case["ratios"]
        table.add_row(
            f"{case['source_bytes'] / GIGA:.2f} GB{fits}",
            f"{case['written_bytes'] / GIGA:.2f} GB",
            f"{np.median(case['slice']):.2f}",
            f"{np.median(case['cp']):.2f}",
            f"{np.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{case['peak_bytes'] / 1e6:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    took, peak = np.median(plan["seconds"]), plan["peak_bytes"] / 1e6
    console.print(f"plan of {plan['bytes'] / GIGA:.0f} GB: {took:.2f} s, peak {peak:.0f} MB")


@click.command()
@click.option("--sizes", default="4GB,8GB", show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--keep", default=0.5, show_default=True)
@click.option("--plan-size", default="140GB", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to work; a temporary folder by default.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the raw samples to a file.")
def main(sizes: str, repeats: int, keep: float, plan_size: str, folder: Path | None, out: Path | None) -> None:
    """Time the cut and the plan."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        cases = [
            slice_case(Path(scratch) / f"case{number}", byte_size(size, "--sizes") or 0, repeats, keep)
            for number, size in enumerate(sizes.split(","))
        ]
        plan = plan_case(Path(scratch), byte_size(plan_size, "--plan-size") or 0, repeats)
    show(cases, plan)
    if out is not None:
        facts = {"machine_bytes": psutil.virtual_memory().total, "page_size": resource.getpagesize()}
        out.write_text(json.dumps({**facts, "slice": cases, "plan": plan}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
