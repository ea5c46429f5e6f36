"""Write what every runtime will load: `python tests/runtimes/write.py FOLDER`.

A case per family and layout: a tiny random model, dense or cut (`model`), its ONNX export (`onnx`) where there is a
graph for it, and in `case.json` prompts with what the masked dense model writes behind them in the transformers of
this environment, and with what options vLLM is said to load it. Heads have a size of 64, which vLLM takes on a CPU;
the tokenizer is one that llama.cpp takes.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import FAMILY_SETTINGS
from gguf_models import config_for, dense
from test_slicing_exact import mask_for, without, without_attention

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import UnsupportedModelError
from sspcompile.export.onnx import PRECISIONS, Blocks, export_onnx
from sspcompile.model.loading import load
from sspcompile.proof.reload import respond
from sspcompile.repair.repair import masked
from sspcompile.slicing.plan import SlicePlan, make_plan
from sspcompile.slicing.runtimes import Verdict
from sspcompile.slicing.write import write_model

PROMPTS = ([5, 17, 40, 99, 120, 7], [200, 3, 8, 61, 44, 12, 90, 31], [77, 76, 75, 74, 73])
NEW_TOKENS = 16
END = 1
DENSE = "dense"
SILENT = "a layer without attention"
# Name -> layout, share of the heads, share of the channels, layers that are removed whole. A half of the heads divides
# hidden_size, which some want.
LAYOUTS = {
    DENSE: ("uniform", 1.0, 1.0, ()),
    "uniform heads": ("uniform", 0.5, 1.0, ()),
    "uniform heads and channels": ("uniform", 0.5, 0.6, ()),
    "per-layer heads": ("per-layer", 0.75, 1.0, ()),
    "per-layer heads and channels": ("per-layer", 0.75, 0.6, ()),
    "fewer layers": ("uniform", 1.0, 1.0, (0,)),
    SILENT: ("per-layer", 1.0, 1.0, ()),
}
# Real ones leave every fourth layer without positions, the only pattern that llama.cpp has.
SETTINGS = {"smollm3": {"no_rope_layers": [1, 1, 1, 0]}}


def write(folder: Path, family: str, name: str) -> None:
    """One case. What cannot be written is `refused`, by the writer of cuts or by that of ONNX graphs."""
    layout, keep, width, removed = LAYOUTS[name]
    case: dict[str, object] = {"family": family, "layout": name, "end": END, "refused": {}}
    source = dense(folder / "source", config_for(family, **SETTINGS.get(family, {})))
    checkpoint = Checkpoint(source)
    mask = without(mask_for(checkpoint, keep, layout, 1, width), *removed)
    if name == SILENT:
        mask = without_attention(mask, 1)
    if width < 1 and mask.channels is None:
        refuse(folder, case, {"model": "some of its layers have experts and some one MLP: no channels are cut"})
        return
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, folder / "model")
    loaded = load(source, fingerprint="")
    answers = []
    with torch.inference_mode(), masked(loaded, mask.units):
        for ids in PROMPTS:
            answers.append([int(logits[0, -1].argmax()) for logits in respond(loaded.model, [ids], NEW_TOKENS)])
    case |= {"custom_code": plan.custom_code, "attention": checkpoint.geometry.family.attention}
    case |= {"prompts": PROMPTS, "answers": answers, "vllm": {} if name == DENSE else vllm_options(plan)}
    refuse(folder, case, _to_onnx(folder, custom_code=plan.custom_code) | _for_vllm(plan))
    shutil.rmtree(source)


def vllm_options(plan: SlicePlan) -> dict[str, object]:
    """What `plan` tells users to put behind `vllm serve`, as keywords of `LLM`."""
    said = _verdict(plan).reason
    found: dict[str, object] = {"model_impl": "transformers"} if "--model-impl transformers" in said else {}
    return found | ({"trust_remote_code": True} if "--trust-remote-code" in said else {})


def _for_vllm(plan: SlicePlan) -> dict[str, str]:
    """Gives why not, where `plan` says that vLLM does not load it."""
    verdict = _verdict(plan)
    return {} if verdict.loads else {"vllm-cpu": verdict.reason}


def _verdict(plan: SlicePlan) -> Verdict:
    return next(one for one in plan.runtimes if one.runtime == "vLLM")


def _to_onnx(folder: Path, *, custom_code: bool) -> dict[str, str]:
    """Gives why not, where there is no graph."""
    try:
        export_onnx(
            folder / "model",
            folder / "onnx",
            precision=PRECISIONS["fp32"],
            blocks=Blocks(),
            probes=[list(ids) for ids in PROMPTS],
            origin={},
            card=lambda *_: "card\n",
            trust_remote_code=custom_code,
        )
    except UnsupportedModelError as error:
        return {"onnx": error.message.rstrip(".")}
    return {}


def refuse(folder: Path, case: dict[str, object], refused: dict[str, str]) -> None:
    """The case with what was refused of it."""
    (folder / "case.json").write_text(json.dumps(case | {"refused": refused}))


def main(target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for family in FAMILY_SETTINGS:
        for name in LAYOUTS:
            folder = target / f"{family}-{name.replace(' ', '-')}"
            folder.mkdir(parents=True)
            write(folder, family, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
