"""Write what vLLM will load: `python tests/vllm/write.py FOLDER`.

For each case a cut checkpoint of random weights (head size 64, which vLLM takes on a CPU), with the greedy tokens of
the masked dense model beside it, computed by the transformers of this environment.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import family_config, save_random
from test_slicing_exact import mask_for, without

from sspcompile.checkpoint import Checkpoint
from sspcompile.model.loading import load
from sspcompile.proof.reload import respond
from sspcompile.repair.repair import masked
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

PROMPTS = ([5, 17, 40, 99, 120, 7], [200, 3, 8, 61, 44, 12, 90, 31], [77, 76, 75, 74, 73])
NEW_TOKENS = 24
# Family, layout, layers that are removed whole, the others staying as they are (`--units layers`).
CASES = (
    ("llama", "uniform", ()),
    ("llama", "per-layer", ()),
    ("qwen2", "per-layer", ()),
    ("qwen3", "per-layer", ()),
    ("llama", "uniform", (0, 2)),
)


def write(folder: Path, family: str, layout: str, removed: tuple[int, ...]) -> None:
    config = family_config(family, layers=4, hidden=256, kv_heads=2, group_size=2, head_dim=64)
    source = save_random(folder / "dense", config)
    checkpoint = Checkpoint(source)
    if removed:
        mask = without(mask_for(checkpoint, 1.0, layout, 1), *removed)
    else:
        mask = mask_for(checkpoint, 0.75 if layout == "per-layer" else 0.5, layout, 1, width=0.6)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, folder / "cut")
    loaded = load(source, fingerprint="")
    answers = []
    with torch.inference_mode(), masked(loaded, mask.units):
        for ids in PROMPTS:
            answers.append([int(logits[0, -1].argmax()) for logits in respond(loaded.model, [ids], NEW_TOKENS)])
    counts = [plan.counts[layer] for layer in plan.staying]
    case = {"custom_code": plan.custom_code, "prompts": PROMPTS, "answers": answers, "counts": counts}
    (folder / "case.json").write_text(json.dumps(case))


def main(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for family, layout, removed in CASES:
        write(target / f"{family}-{layout}{'-fewer' if removed else ''}", family, layout, removed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
