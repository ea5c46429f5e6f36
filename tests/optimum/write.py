"""Write what the optimum environment will load: `python tests/optimum/write.py FOLDER`.

For each case an ONNX export (Llama's with the logits of the last token alone), with the greedy text that transformers
writes behind a batch padded on the left.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import family_config, save_random
from test_slicing_exact import mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.export.onnx import PRECISIONS, Blocks, export_onnx
from sspcompile.model.loading import load_cut
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

ROWS = [[(7 * n + 1) % 250 for n in range(length)] for length in (5, 19, 11)]
NEW_TOKENS = 12
PAD = 258
CASES = [
    (family, layout)
    for family in ("llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "smollm3")
    for layout in ("uniform", "per-layer")
]


def write(folder: Path, family: str, layout: str) -> None:
    dense = save_random(folder / "dense", family_config(family))
    checkpoint = Checkpoint(dense)
    write_model(checkpoint, make_plan(checkpoint, mask_for(checkpoint, 0.6, layout, 5)), folder / "cut")
    export_onnx(
        folder / "cut",
        folder / "onnx",
        precision=PRECISIONS["fp32"],
        blocks=Blocks(),
        probes=ROWS,
        origin={},
        card=lambda *_: "card\n",
        trust_remote_code=True,
        last_logits=family == "llama",
    )
    width = max(map(len, ROWS))
    ids = [[PAD] * (width - len(row)) + row for row in ROWS]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ROWS]
    model = load_cut(folder / "cut", trust_remote_code=layout == "per-layer")
    tails = model.continuations(torch.tensor(ids), torch.tensor(mask), NEW_TOKENS)
    (folder / "case.json").write_text(json.dumps({"ids": ids, "mask": mask, "tails": tails, "pad": PAD}))
    for name in ("dense", "cut"):
        shutil.rmtree(folder / name)


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for family, layout in CASES:
        (folder / f"{family}-{layout}").mkdir(parents=True)
        write(folder / f"{family}-{layout}", family, layout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
