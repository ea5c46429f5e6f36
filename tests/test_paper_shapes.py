"""The four models of the paper: plans from their configurations, builds with random weights of that shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Shape, make_checkpoint

from sspcompile.checkpoint import Checkpoint
from sspcompile.slicing.plan import plan_counts

# Facts of the published configurations: layers, hidden, intermediate, heads, kv heads, vocabulary, parameters.
PAPER = {
    "Llama-2-13b-chat": ("llama", 40, 5120, 13824, 40, 40, 32000, 13_015_864_320),
    "Qwen2.5-14B-Instruct": ("qwen2", 48, 5120, 13824, 40, 8, 152064, 14_770_033_664),
    "Qwen2.5-7B-Instruct": ("qwen2", 28, 3584, 18944, 28, 4, 152064, 7_615_616_512),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128256, 8_030_261_248),
}


def configuration(name: str) -> dict:
    family, layers, hidden, intermediate, heads, kv_heads, vocab, _ = PAPER[name]
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_plan_from_the_configuration_alone(name, layout, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(configuration(name)))
    checkpoint = Checkpoint(tmp_path)
    plan = plan_counts(checkpoint, 0.5, layout)
    _, layers, hidden, _, heads, kv_heads, _, parameters = PAPER[name]
    assert plan.dense.parameters == parameters
    assert plan.dense.weight_bytes == 2 * parameters
    assert plan.dense.kv_bytes_per_token == 2 * layers * kv_heads * 128 * 2
    kept = sum(q for q, _ in plan.counts)
    assert kept <= layers * heads // 2
    removed_q = layers * heads - kept
    removed_kv = sum(kv_heads - kv for _, kv in plan.counts)
    bias = 128 if checkpoint.geometry.qkv_bias else 0
    by_hand = removed_q * (2 * 128 * hidden + bias) + removed_kv * 2 * (128 * hidden + bias)
    assert plan.dense.parameters - plan.sliced.parameters == by_hand


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_whole_build_with_the_attention_shape_of_the_paper(name, tmp_path):
    family, _, _, _, heads, kv_heads, _, _ = PAPER[name]
    # The attention is that of the paper's model; fewer layers and a narrower residual stream make it small.
    shape = Shape(
        family=family, layers=3, hidden=8 * heads, kv_heads=kv_heads, group_size=heads // kv_heads, head_dim=128
    )
    make_checkpoint(tmp_path / name, shape)
    command = [
        sys.executable,
        "-m",
        "sspcompile.cli.main",
        "build",
        "--scenario",
        "math-tutor",
        "--model",
        str(tmp_path / name),
        "--keep",
        "0.6",
        "--max-tokens",
        "16",
        "--continuation-tokens",
        "2",
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parity"]["max_difference"] <= report["parity"]["tolerance"] * report["parity"]["logit_scale"]
    assert report["budget"]["keep_achieved"] <= 0.6
    artifact = next(path for path in (tmp_path / "artifacts").iterdir() if (path / "mask.json").exists())
    done = subprocess.run(
        [sys.executable, "-m", "sspcompile.cli.main", "verify", str(artifact)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(artifact / "model" / "model.safetensors").stat().st_size > 0
