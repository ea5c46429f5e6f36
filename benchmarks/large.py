"""Builds of models that do not fit: peak memory, and whether the minutes are those that `plan --cost` foretold.

    python -m benchmarks.large --tokenizer SMOLLM2 --shape 1.2b --memory 6GB [--prompts 48]

The weights are random (bf16, written tensor by tensor), the shapes those of real models; the tokenizer is that of
another model, with a vocabulary no larger than the shape's. The scenario is a recipe of PROMPTS short questions with
answers that says what they are about (`--recognise` leaves that to the model, which reads the pools for it). What is
measured is the whole command, with all that it starts.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.build import build, foretell, write_prompts

PROMPTS = 48
# Standard deviation of the weights.
SPREAD = 0.02
DOMAIN = "math"


@dataclass(frozen=True)
class Large:
    """A decoder of the Qwen2 family (biases on q, k and v)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


SHAPES = {
    "0.3b": Large(12, 1024, 4096, 16, 4, 65536, True),
    "1.2b": Large(16, 2048, 8192, 32, 8, 128256, True),
    "7b": Large(28, 3584, 18944, 28, 4, 152064, False),
}


def write(shape: Large, folder: Path, tokenizer: Path, seed: int = 0) -> int:
    """A checkpoint with a file per layer; gives its bytes."""
    folder.mkdir(parents=True)
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, folder)
    head = shape.hidden // shape.heads
    q, kv, d, m = shape.heads * head, shape.kv_heads * head, shape.hidden, shape.intermediate
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": d,
        "intermediate_size": m,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    layer = {
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (m, d),
        "mlp.up_proj.weight": (m, d),
        "mlp.down_proj.weight": (d, m),
        "input_layernorm.weight": (d,),
        "post_attention_layernorm.weight": (d,),
    }
    outer = {"model.embed_tokens.weight": (shape.vocab, d), "model.norm.weight": (d,)}
    outer |= {} if shape.tied else {"lm_head.weight": (shape.vocab, d)}
    parts = [outer, *({f"model.layers.{n}.{name}": s for name, s in layer.items()} for n in range(shape.layers))]
    rng, places, total = np.random.default_rng(seed), {}, 0
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {}
        for name, size in names.items():
            tensors[name] = torch.ones(size, dtype=torch.bfloat16) if "norm" in name else _random(size, rng)
            places[name], total = file, total + tensors[name].nbytes
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return total


def _random(size: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """Uniform, in 256 steps: normal numbers would take longer than writing them."""
    steps = np.frombuffer(rng.bytes(math.prod(size)), dtype=np.int8)
    return (torch.from_numpy(steps.copy()).to(torch.bfloat16) * (SPREAD * 3**0.5 / 128)).view(size)


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="1.2b", show_default=True)
@click.option("--memory", default="6GB", show_default=True, help="Handed to `sspcompile build`.")
@click.option("--prompts", default=PROMPTS, show_default=True)
@click.option("--recognise", is_flag=True, help="Say nothing of the domain.")
@click.option("--keep", default=0.75, show_default=True)
@click.option("--option", "more", multiple=True, help="Handed to `sspcompile build`, as --option=--max-tokens=64.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write; a temporary folder by default.")
@click.option("--out", type=click.Path(path_type=Path), help="Results (default benchmarks/results/large-SHAPE.json).")
def main(
    tokenizer: Path,
    shape: str,
    memory: str,
    prompts: int,
    recognise: bool,
    keep: float,
    more: tuple[str, ...],
    folder: Path | None,
    out: Path | None,
) -> None:
    """Build a large model."""
    words = ["--keep", str(keep), "--memory", memory, *(word for option in more for word in option.split("=", 1))]
    with tempfile.TemporaryDirectory() as temporary:
        home = folder or Path(temporary)
        if not (home / "model").is_dir():
            home.mkdir(parents=True, exist_ok=True)
            write(SHAPES[shape], home / "model", tokenizer)
        size = sum(path.stat().st_size for path in (home / "model").glob("*.safetensors"))
        write_prompts(
            home / "boxes.jsonl",
            [
                (
                    f"A box holds {n} red and {2 * n + 1} blue balls. How many are there?",
                    f"There are {3 * n + 1} balls.",
                )
                for n in range(prompts)
            ],
        )
        stated = {} if recognise else {"domains": {DOMAIN: 1.0}}
        scenario = {"prompts_file": "boxes.jsonl", **stated}
        recipe = {"schema_version": 1, "name": "boxes", "description": "Short questions", "scenario": scenario}
        (home / "boxes.yaml").write_text(json.dumps(recipe), "utf-8")
        foretold = foretell(str(home / "model"), "boxes.yaml", home, words)
        click.echo(f"foretold: {foretold['seconds'] / 60:.0f} min, {foretold['peak_bytes'] / 1e9:.2f} GB", err=True)
        cost = build(str(home / "model"), "boxes.yaml", "built", home, words)
    found = {
        "shape": shape,
        "weight_bytes": size,
        "memory": memory,
        "prompts": prompts,
        "domain": None if recognise else DOMAIN,
        "threads": torch.get_num_threads(),
        "foretold_seconds": foretold["seconds"],
        "foretold_peak": foretold["peak_bytes"],
        **asdict(cost),
        "python": sys.version.split()[0],
    }
    times = cost.wall / foretold["seconds"]
    click.echo(
        f"{shape}: {size / 1e9:.1f} GB of weights, {cost.wall / 60:.1f} min ({times:.2f} times the foretold), "
        f"{cost.peak / 1e9:.2f} GB at the peak within {memory}"
    )
    place = out or Path(f"benchmarks/results/large-{shape}.json")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
