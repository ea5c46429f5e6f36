"""The corpus to begin with, where there is none: good inputs of every reader. python tests/fuzz/seeds.py"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from campaign import HERE, keep

from sspcompile.request.recipe import shipped_recipes

CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
MASK = {
    "schema_version": 1,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "kept": [[0, 1], [0, 2]],
    "layout": "per-layer",
    "keep_requested": 0.5,
    "keep_achieved": 0.5,
    "scores": [[1.0, 0.5, 0.2, 0.1]] * 2,
    "whitelist": [[0, 1]],
    "criterion": "kl",
    "scenario": {"name": "x", "mixture": {"math": 1.0}, "breadth": 0.0},
}
ENTRY = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}


def header(value: object, size: int) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def seeds() -> dict[str, list[bytes]]:
    families = ("llama", "mistral", "qwen3", "phi3", "gemma3_text", "granite", "smollm3", "starcoder2", "mixtral")
    manifest = {"schema_version": 1, "origin": {"source": "a"}, "files": {"x": {"size": 1, "sha256": "0"}}}
    return {
        "header": [header({"w": ENTRY}, 8), header({"__metadata__": {"format": "pt"}, "w": ENTRY}, 8), header({}, 0)],
        "config": [json.dumps(CONFIG | {"model_type": family}).encode() for family in ("qwen2", *families)],
        "index": [json.dumps({"weight_map": {"w": "a.safetensors"}}).encode(), b"{}"],
        "mask": [json.dumps(MASK).encode(), json.dumps(MASK | {"layout": "uniform"}).encode()],
        "manifest": [json.dumps(manifest).encode()],
        "prompts": [b'{"prompt": "What is gold?"}\n{"prompt": "And lead?", "answer": "Pb"}\n', b"\n"],
        "recipe": [path.read_bytes() for path in shipped_recipes()],
    }


if __name__ == "__main__":
    (HERE / "corpus").mkdir(exist_ok=True)
    for target, contents in seeds().items():
        with tempfile.TemporaryDirectory() as folder:
            for number, content in enumerate(contents):
                (Path(folder) / f"seed-{number}").write_bytes(content)
            keep(Path(folder), HERE / "corpus" / f"{target}.zip")
