"""Write what vLLM will load: `python tests/vllm/write.py FOLDER`.

For each case a cut checkpoint of random weights (head size 64, which vLLM takes on a CPU), with the greedy tokens of
the masked dense model beside it, computed by the transformers of this environment.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import family_config, save_random
from test_slicing_exact import mask_for, without

from sspcompile.checkpoint import Checkpoint
from sspcompile.model.loading import load
from sspcompile.proof.reload import respond
from sspcompile.repair.repair import masked
from sspcompile.slicing.mask import HeadMask
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

PROMPTS = ([5, 17, 40, 99, 120, 7], [200, 3, 8, 61, 44, 12, 90, 31], [77, 76, 75, 74, 73])
NEW_TOKENS = 24


def narrowed(mask: HeadMask) -> HeadMask:
    """The mask with one key/value group in every second layer: a cache that differs from layer to layer."""
    group = mask.heads // mask.kv_heads
    kept = tuple(row if layer % 2 == 0 else row[:group] for layer, row in enumerate(mask.kept))
    return replace(mask, kept=kept)


def per_layer(checkpoint: Checkpoint) -> HeadMask:
    return mask_for(checkpoint, 0.75, "per-layer", 1, width=0.6)


# Name -> family, and what stays of it.
CASES: Mapping[str, tuple[str, Callable[[Checkpoint], HeadMask]]] = {
    "llama-uniform": ("llama", lambda checkpoint: mask_for(checkpoint, 0.5, "uniform", 1, width=0.6)),
    "llama-per-layer": ("llama", per_layer),
    "qwen2-per-layer": ("qwen2", per_layer),
    "qwen3-per-layer": ("qwen3", per_layer),
    "llama-fewer-layers": ("llama", lambda checkpoint: without(mask_for(checkpoint, 1.0, "uniform", 1), 0, 2)),
    "llama-narrowed": ("llama", lambda checkpoint: narrowed(mask_for(checkpoint, 1.0, "per-layer", 1))),
}


def write(folder: Path, family: str, mask_of: Callable[[Checkpoint], HeadMask]) -> None:
    config = family_config(family, layers=4, hidden=256, kv_heads=2, group_size=2, head_dim=64)
    source = save_random(folder / "dense", config)
    checkpoint = Checkpoint(source)
    mask = mask_of(checkpoint)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, folder / "cut")
    loaded = load(source, fingerprint="")
    answers = []
    with torch.inference_mode(), masked(loaded, mask.units):
        for ids in PROMPTS:
            answers.append([int(logits[0, -1].argmax()) for logits in respond(loaded.model, [ids], NEW_TOKENS)])
    counts = [plan.counts[layer] for layer in plan.staying]
    case = {"custom_code": plan.custom_code, "prompts": PROMPTS, "answers": answers, "counts": counts}
    # Keys and values of a token in fp32, which these checkpoints are in.
    case["cache_bytes"] = plan.sliced.kv_bytes_per_token
    (folder / "case.json").write_text(json.dumps(case))


def main(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for name, (family, mask_of) in CASES.items():
        write(target / name, family, mask_of)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
