"""What a GGUF export costs against `cp`, and whether llama.cpp writes what transformers writes.

`python -m benchmarks.gguf FOLDER ... [--types f32,bf16,q8_0]`: model folders (of a cut: its `model`).

Cost: seconds of writing the file, in a fresh process that does only that, with and without what Python takes to import
the modules, and its peak memory, against `cp` of the weights, both followed by a sync of what they wrote, five times in
turn; of a random model of 2.2 GB, too. Text: 20 prompts, 24 greedy tokens each, in llama.cpp (cache in fp32) and in
transformers, which computes with the stored weights in fp32; one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

ROUNDS, NEW_TOKENS = 5, 24
PROMPTS = (
    "The capital of France is",
    "What is 3 plus 6?",
    "Water boils at",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "The largest planet of the solar system is",
    "To make an omelette, first",
    "Photosynthesis is the process by which",
    "A train leaves at 9:15 and arrives at 11:40. The journey takes",
    "The opposite of cold is",
    "List three fruits:\n1.",
    "In 1969, the first human",
    "Translate to French: Good morning ->",
    "The square root of 144 is",
    "My favourite season is autumn because",
    "Gold has the chemical symbol",
    "If all cats are animals and Tom is a cat, then",
    "The recipe needs 2 eggs, 200 g of flour and",
    "SELECT name FROM users WHERE",
    "The moon orbits the",
)


def write(folder: Path, target: Path, kind: str | None) -> dict[str, float]:
    """Seconds of importing, reading and writing, and peak memory in MB, of this process."""
    begun = time.perf_counter()
    from sspcompile.export.gguf.rounding import kind_of
    from sspcompile.export.gguf.source import read_source
    from sspcompile.export.gguf.vocabulary import read_vocabulary
    from sspcompile.export.gguf.write import write_gguf

    imported = time.perf_counter() - begun
    source = read_source(folder)
    vocabulary = read_vocabulary(folder, source.geometry.vocab, source.geometry.family)
    write_gguf(source, vocabulary, target, kind_of(kind, source.dtypes), name=folder.name, origin={})
    sync(target)
    return {"seconds": time.perf_counter() - begun, "imported": imported, "mb": peak_mb()}


def sync(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def peak_mb() -> float:
    """Peak resident memory of this process (Linux). That of getrusage starts with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def large(folder: Path, like: Path) -> Path:
    """A random Llama of 1.1 billion parameters in bf16 (2.2 GB), with the tokenizer of `like`."""
    hidden, width, layers = 2048, 5632, 22
    config = json.loads((like / "config.json").read_text())
    sizes = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    config |= {**sizes, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        shapes |= {
            f"{stem}self_attn.{name}_proj.weight": (rows, hidden)
            for name, rows in zip("qkv", (2048, 256, 256), strict=True)
        }
        shapes[f"{stem}self_attn.o_proj.weight"] = (hidden, 2048)
        shapes |= {f"{stem}mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
        shapes[f"{stem}mlp.down_proj.weight"] = (hidden, width)
        shapes |= {f"{stem}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    folder.mkdir()
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    told = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(told).to_bytes(8, "little") + told)
        for shape in shapes.values():
            stream.write(np.random.default_rng(0).integers(0, 1 << 14, shape, dtype=np.uint16).tobytes())
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(like / name, folder / name)
    return folder


def cost(folder: Path, scratch: Path) -> None:
    """Print the medians of ROUNDS of `cp` and writing, in turn."""
    copies, writes = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run(["cp", folder / "model.safetensors", scratch / "copy"], check=True)
        sync(scratch / "copy")
        copies.append(time.perf_counter() - start)
        (scratch / "copy").unlink()
        command = [sys.executable, "-m", "benchmarks.gguf", "--write", str(folder), str(scratch / "made.gguf")]
        writes.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        (scratch / "made.gguf").unlink()
    copied, wrote = median(copies), median(one["seconds"] for one in writes)
    imported = median(one["imported"] for one in writes)
    print(
        f"{folder}: cp {copied:.2f} s, export {wrote:.2f} s, {wrote / copied:.2f} times, "
        f"without {imported:.2f} s of importing {(wrote - imported) / copied:.2f} times; "
        f"peak {max(one['mb'] for one in writes):.0f} MB",
        flush=True,
    )


def texts(folder: Path, kinds: list[str], scratch: Path) -> None:
    """Print how many of the prompts are gone on with in the same way, per type."""
    import torch

    from sspcompile.export.gguf.rounding import TYPES
    from sspcompile.model.llama_session import LlamaModel, quantise
    from sspcompile.model.loading import load_cut

    model = load_cut(folder, dtype=torch.float32, trust_remote_code=True)
    prompts = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    wanted = []
    for ids in prompts:
        row = torch.tensor([ids])
        wanted.append(model.continuations(row, torch.ones_like(row), NEW_TOKENS)[0])
    exact = scratch / "f32.gguf"
    write(folder, exact, "f32")
    for kind in kinds:
        path = scratch / f"{kind}.gguf"
        if TYPES[kind].rounded:
            quantise(exact, path, TYPES[kind].file_type, threads=1)
        elif kind != "f32":
            write(folder, path, kind)
        llama = LlamaModel(path, threads=1, exact=True)
        same, alike, shown = 0, 0, ""
        for ids, tail in zip(prompts, wanted, strict=True):
            found, scores = [], llama.start(ids, len(ids) + NEW_TOKENS)
            for _ in tail:
                found.append(int(scores.argmax()))
                scores = llama.read(found[-1:])
            same += found == tail
            alike += next((n for n, pair in enumerate(zip(found, tail, strict=True)) if pair[0] != pair[1]), len(tail))
            shown = shown or str(model.tokenizer.decode(found))
        llama.close()
        size = path.stat().st_size / 2**20
        total = sum(map(len, wanted))
        print(
            f"  {kind}: {size:.0f} MiB, {same} of {len(PROMPTS)} texts the same, {alike}/{total} tokens until then",
            end="",
        )
        print(f"; {shown!r}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--types", default="f32,bf16")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.write:
        source, target = given.folders
        print(json.dumps(write(source, target, None)))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        for folder in given.folders:
            cost(folder, Path(scratch))
        cost(large(Path(scratch) / "large", given.folders[0]), Path(scratch))
        shutil.rmtree(Path(scratch) / "large")
        for folder in given.folders:
            print(folder)
            texts(folder, given.types.split(","), Path(scratch))


if __name__ == "__main__":
    main()
