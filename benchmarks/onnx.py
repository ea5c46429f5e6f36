"""ONNX exports against their peers, as ratios of one run: python -m benchmarks.onnx [--sizes 207M,1.2B] [--rounds 3].

Random weights of a Qwen3 shape (207 M parameters) and of Llama-3.2-1B's; `pruned` keeps half of the heads, the same in
every layer, `uneven` as many with counts that differ by layer. Measured are

* the export: writing an fp32 graph with its weights copied, and linked, against `cp` of the weights, in processes that
  have imported their libraries before the clock starts; peak resident memory;
* what the exports of torch.onnx (dynamo) and, where `make test-optimum` has made its environment, of optimum take;
* decoding one token at a context of 128 and of 1,024, and reading 512 tokens, for transformers (sdpa, fp32), for our
  graphs in fp32, int8 and int4 (of the pruned model also with the logits of the last token alone, which is what
  transformers computes when it reads), for the graphs that onnxruntime-genai's own builder makes of the pruned model,
  and for those of torch.onnx and optimum (whose exporter cannot hold a pruned model, so it gets the dense one);
* what must be compared closely (PAIRS: our graph with the builder's, the pruned model with the dense one) also side by
  side: both graphs in one process, which goes from one to the other and back, because what else uses the memory of a
  shared machine changes from minute to minute by more than these differ.

Every contender runs in a process of its own, with the same number of threads and OMP_WAIT_POLICY=PASSIVE (otherwise
torch's waiting threads slow ONNX Runtime); the order is turned round from round to round, ratios are taken within a
round. Writes benchmarks/results/onnx/SIZE.json, one finished round at a time, and prints the tables. Run it on a
machine that does nothing else; the large size takes minutes per round.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.slice import write_mask
from sspcompile.checkpoint import Checkpoint, OutputTensor, write_checkpoint
from sspcompile.intervals import ratio_interval
from sspcompile.slicing.mask import Layout, load_mask
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

RESULTS = Path("benchmarks/results/onnx")
OPTIMUM = Path(".venv-optimum/bin/python")
COMMON = {"torch_dtype": "float32", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
SHAPES: Mapping[str, dict[str, Any]] = {
    "207M": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 27648,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "use_sliding_window": False,
        **COMMON,
    },
    "1.2B": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        **COMMON,
    },
    "tiny": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": 1000,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        **COMMON,
    },
}
PROMPT, CONTEXTS = 512, (128, 1024)
SPREAD = 0.02
BASE = "transformers, dense"
PAIRS = tuple(
    (f"{base} {precision}, {of}", f"ours {precision}, pruned")
    for precision in ("fp32", "int4")
    for base, of in (("genai builder", "pruned"), ("ours", "dense"))
)
PAIR_STEPS, PAIR_VISITS = 5, 25


@dataclass(frozen=True)
class Contender:
    """A row of the table: how it is run, and the folder."""

    name: str
    kind: str
    folder: Path


def make_model(folder: Path, shape: Mapping[str, Any]) -> Path:
    """Normal weights of a small spread, streamed; norms are ones."""
    folder.mkdir(parents=True)
    config = {**shape, "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope_theta"]}}
    (folder / "config.json").write_text(json.dumps(config))

    def content(dims: tuple[int, ...], seed: int) -> Iterator[memoryview]:
        rng = np.random.default_rng(seed)
        step = max(1, (1 << 22) // int(np.prod(dims[1:], dtype=int)))
        for start in range(0, dims[0], step):
            size = (min(step, dims[0] - start), *dims[1:])
            values = np.ones(size, np.float32) if len(dims) == 1 else SPREAD * rng.standard_normal(size, np.float32)
            yield np.ascontiguousarray(values, dtype=np.float32).data.cast("B")

    tensors = [
        OutputTensor(name, "F32", dims, partial(content, dims, seed))
        for seed, (name, (dims, _)) in enumerate(Checkpoint(folder).expected().items())
    ]
    write_checkpoint(folder, tensors, max_shard_bytes=2 * 10**9)
    return folder


def cut(model: Path, out: Path, layout: Layout) -> Path:
    """Half of the heads."""
    mask = load_mask(write_mask(model, out.with_suffix(".json"), 0.5, layout))
    checkpoint = Checkpoint(model)
    write_model(checkpoint, make_plan(checkpoint, mask), out)
    return out


# VmHWM, not ru_maxrss: that one remembers the process which started this one.
EXPORT = """
import json, sys, time
from pathlib import Path
from sspcompile.export.onnx.decoder import read_decoder
from sspcompile.export.onnx.write import PRECISIONS, Blocks, write_graph
import torch
model, out, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
link, last_logits = sys.argv[4] == "link", sys.argv[5] == "last"
if PRECISIONS[precision].bits: import onnxruntime.quantization.matmul_nbits_quantizer

peak = lambda: 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
imported = peak()
out.mkdir(parents=True)
start = time.perf_counter()
write_graph(read_decoder(model), out, PRECISIONS[precision], Blocks(), last_logits=last_logits, link=link)
took = time.perf_counter() - start
print(json.dumps([took, peak(), imported]))
"""


def exported(
    model: Path, out: Path, precision: str, *, link: bool = False, last_logits: bool = False
) -> tuple[float, int, int]:
    """(seconds, peak resident bytes, resident bytes after the imports) of an export that nothing checks."""
    options = ["link" if link else "copy", "last" if last_logits else "all"]
    command = [sys.executable, "-c", EXPORT, str(model), str(out), precision, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    took, peak, imported = json.loads(done.stdout.strip().splitlines()[-1])
    return took, peak, imported


def copied(model: Path, out: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["sh", "-c", 'mkdir "$2" && cp "$1"/*.safetensors "$2"', "sh", str(model), str(out)], check=True)
    return time.perf_counter() - start


def export_rounds(model: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of exports and of `cp`, in turn; the files are removed after each."""
    kept: dict[str, list[float]] = {"export, copied": [], "export, linked": [], "cp": []}
    peaks: dict[str, int] = {}
    for number in range(rounds + 1):
        for name in (*kept,) if number % 2 else (*kept,)[::-1]:
            out = folder / "out"
            # Otherwise each waits for the disk to take what the one before it wrote.
            os.sync()
            if name == "cp":
                took = copied(model, out)
            else:
                took, peak, imported = exported(model, out, "fp32", link=name == "export, linked")
                peaks = {"peak_bytes": max(peak, peaks.get("peak_bytes", 0)), "imported_bytes": imported}
            shutil.rmtree(out)
            if number:  # the first one warms the page cache
                kept[name].append(took)
    return {**kept, **peaks}


def built(model: Path, out: Path, precision: str) -> Path | None:
    """The graph of onnxruntime-genai's builder, or None where it cannot make one."""
    command = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        str(model),
        "-o",
        str(out),
        "-p",
        precision,
        "-e",
        "cpu",
        "-c",
        str(out.parent / "cache"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        click.echo(f"the builder failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", err=True)
        return None
    return out


def contenders(
    folder: Path, shape: Mapping[str, Any], *, peers: bool, only: re.Pattern[str]
) -> tuple[list[Contender], dict[str, list[float]]]:
    """Make the models and every form of them; and what the exports of others took, [seconds, peak bytes]."""
    costs: dict[str, list[float]] = {}
    dense = make_model(folder / "dense", shape)
    models = {"dense": dense, "pruned": cut(dense, folder / "pruned", "uniform")}
    models["uneven"] = cut(dense, folder / "uneven", "per-layer")
    rows = [Contender(f"transformers, {name}", "transformers", path) for name, path in models.items()]
    rows = [row for row in rows if row.name == BASE or only.search(row.name)]
    for precision in ("fp32", "int8", "int4"):
        for name, path in models.items():
            if (name == "uneven" and precision == "int8") or not only.search(f"ours {precision}, {name}"):
                continue
            out = folder / f"{name}-{precision}"
            exported(path, out, precision, link=True)
            rows.append(Contender(f"ours {precision}, {name}", "onnx", out))
    for precision in ("fp32", "int4"):
        if only.search(f"ours {precision} last logits, pruned"):
            out = folder / f"pruned-{precision}-last"
            exported(models["pruned"], out, precision, link=True, last_logits=True)
            rows.append(Contender(f"ours {precision} last logits, pruned", "onnx", out))
    if peers:
        _tokenizer(models["pruned"])
        for precision in ("fp32", "int4"):
            if not only.search(f"genai builder {precision}, pruned"):
                continue
            made = built(models["pruned"], folder / f"built-{precision}", precision)
            if made is not None:
                rows.append(Contender(f"genai builder {precision}, pruned", "onnx", made))
        for kind, name, python in (
            ("dynamo", "dense", sys.executable),
            ("dynamo", "pruned", sys.executable),
            ("optimum", "dense", OPTIMUM),
        ):
            if not only.search(f"{LABEL[kind]}, {name}"):
                continue
            cost = exported_by(kind, python, models[name], folder / f"{kind}-{name}")
            if cost is not None:
                costs[f"{kind}, {name}"] = cost
                rows.append(Contender(f"{LABEL[kind]}, {name}", "growing", folder / f"{kind}-{name}"))
    return rows, costs


LABEL = {"dynamo": "torch.onnx", "optimum": "optimum"}


def exported_by(kind: str, python: str | Path, model: Path, out: Path) -> list[float] | None:
    """[seconds, peak resident bytes] of a peer's export, None where it cannot make one."""
    if not Path(python).is_file():
        return None
    # -P: the folder of this script has an onnx.py.
    command = [str(python), "-P", "benchmarks/onnx_peers.py", kind, str(model), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        click.echo(f"{kind} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", err=True)
        return None
    g = Checkpoint(model).geometry
    (out / "heads.json").write_text(json.dumps([g.kv_heads, g.head_dim]))
    return json.loads(done.stdout.strip().splitlines()[-1])


def _tokenizer(model: Path) -> None:
    """The builder copies one."""
    from sspcompile.checkpoint import embedded_model

    for file in embedded_model().glob("tokenizer*"):
        shutil.copyfile(file, model / file.name)


def timed(contender: Contender, **request: object) -> dict[str, Any]:
    """What the worker prints; `request` are the arguments of its kind."""
    threads = request["threads"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads)}
    program = [sys.executable, "-m", "benchmarks.onnx_worker"]
    command = [*program, contender.kind, str(contender.folder), json.dumps({**request, "contexts": CONTEXTS})]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise click.ClickException(f"{contender.name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def weight_bytes(folder: Path) -> int:
    kinds = (".safetensors", ".data", ".onnx_data", ".onnx")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in kinds)


@click.command()
@click.option("--sizes", default="207M,1.2B", show_default=True, help="Of the shapes above.")
@click.option("--rounds", default=3, show_default=True, help="How often every contender runs.")
@click.option("--steps", default=16, show_default=True, help="Decoding steps per context and round.")
@click.option("--threads", default=2, show_default=True)
@click.option("--peers/--no-peers", default=True, help="Also build the graphs of onnxruntime-genai's builder.")
@click.option("--only", default="", help="Run the contenders whose name this pattern finds, and the first one.")
@click.option("--name", help="Of the file of results (the size).")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the models are made (a temporary folder).")
def main(
    sizes: str, rounds: int, steps: int, threads: int, peers: bool, only: str, name: str | None, folder: Path | None
) -> None:
    """Measure everything."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for size in sizes.split(","):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            rows, costs = contenders(Path(place), SHAPES[size], peers=peers, only=re.compile(only))
            bytes_of = {row.name: weight_bytes(row.folder) for row in rows}
            export = export_rounds(Path(place) / "dense", Path(place), rounds)
            result: dict[str, Any] = {
                "size": size,
                "threads": threads,
                "bytes": bytes_of,
                "export": export,
                "peers": costs,
                "rounds": [],
            }
            folders = {row.name: row.folder for row in rows}
            result["pairs"] = {
                f"{base} | {row}": timed(
                    Contender(row, "pair", folders[base]),
                    threads=threads,
                    steps=PAIR_STEPS,
                    visits=PAIR_VISITS,
                    other=str(folders[row]),
                )
                for base, row in PAIRS
                if {base, row} <= folders.keys()
            }
            for number in range(rounds):
                order = rows if number % 2 == 0 else rows[::-1]
                once = {row.name: timed(row, threads=threads, prompt=PROMPT, steps=steps) for row in order}
                result["rounds"].append(once)
                (RESULTS / f"{name or size}.json").write_text(json.dumps(result, indent=1) + "\n")
        show(result)


def ratios(result: Mapping[str, Any], what: str, row: str, base: str = BASE) -> np.ndarray:
    """Per round: how many times faster than `base`."""
    return np.array([np.median(one[base][what]) / np.median(one[row][what]) for one in result["rounds"]])


def show(result: Mapping[str, Any]) -> None:
    """Print what README and docs quote."""
    console = Console(width=120)
    export = result["export"]
    cp = np.median(export["cp"])
    console.print(
        f"{result['size']}: export fp32 {np.median(export['export, copied']):.2f} s = "
        f"{np.median(np.array(export['export, copied']) / np.array(export['cp'])):.2f} x cp ({cp:.2f} s), linked "
        f"{np.median(export['export, linked']):.2f} s; peak {export['peak_bytes'] / 1e6:.0f} MB, "
        f"{export['imported_bytes'] / 1e6:.0f} MB of it imports"
    )
    for name, (took, peak) in result["peers"].items():
        console.print(f"export by {name}: {took:.1f} s, peak {peak / 1e6:.0f} MB")
    table = Table("contender", "MB", "prefill", *(f"decode at {c}" for c in CONTEXTS), "peak MB", title=f"times {BASE}")
    for row in result["bytes"]:
        cells = []
        for what in ("prefill", *(f"step {c}" for c in CONTEXTS)):
            found = ratios(result, what, row)
            cells.append(f"{np.median(found):.2f} ({found.min():.2f}-{found.max():.2f})")
        peak = max(one[row]["peak_bytes"] for one in result["rounds"])
        table.add_row(row, f"{result['bytes'][row] / 1e6:.0f}", *cells, f"{peak / 1e6:.0f}")
    console.print(table)
    for names, found in result["pairs"].items():
        base, row = names.split(" | ")
        predicted = result["bytes"][base] / result["bytes"][row]
        for context in CONTEXTS:
            ratio, interval = ratio_interval(*found[f"step {context}"])
            between = "too few pairs" if interval is None else f"{interval.low:.3f} to {interval.high:.3f}, 99 %"
            console.print(
                f"{row} against {base}, decode at {context}: {ratio:.3f} times as fast ({between}); the bytes of their "
                f"weights predict {predicted:.3f}"
            )


if __name__ == "__main__":
    main()
