"""The proof that what was written equals the masked model, from a fresh load of the written files."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sspcompile.checkpoint.source import Checkpoint, read_header
from sspcompile.errors import EXIT_BAD_INPUT, CheckpointError, ParityError, RunError
from sspcompile.families import layer_prefix
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import head_gates
from sspcompile.proof.reload import respond
from sspcompile.repair.repair import Repair, repaired
from sspcompile.slicing.mask import HeadMask
from sspcompile.slicing.plan import SlicePlan

# fp32 sums in another order; measured differences are 0 to 1e-6 of the scale.
TOLERANCE = 1e-5
NEW_TOKENS = 24
PROBE_PROMPTS = 6
PROBE_TOKENS = 128


@dataclass(frozen=True)
class Parity:
    """`max_difference` over `logit_scale` (largest absolute logit of the oracle) is what TOLERANCE bounds."""

    max_difference: float
    logit_scale: float
    same_text: bool
    prompts: int

    @property
    def relative(self) -> float:
        return self.max_difference / self.logit_scale if self.logit_scale else self.max_difference

    @property
    def holds(self) -> bool:
        return self.relative <= TOLERANCE and self.same_text


def compare(
    loaded: LoadedModel,
    mask: HeadMask,
    repair: Repair | None,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    custom_code: bool,
) -> Parity:
    """Compare the model in `folder`, loaded in a fresh process, with the masked dense model on token ids `prompts`.

    Raises CheckpointError when transformers cannot load the folder, RunError when the fresh process dies of something
    else.
    """
    prompts = [list(ids[:PROBE_TOKENS]) for ids in prompts[:PROBE_PROMPTS]]
    answers = _fresh(folder, prompts, custom_code, loaded.geometry.family.attention)
    gates = torch.from_numpy(mask.as_array()).float().to(loaded.device)
    difference = scale = 0.0
    same = True
    with head_gates(loaded, gates), repaired(loaded, repair):
        for ids, (logits, tokens) in zip(prompts, answers, strict=True):
            expected, expected_tokens = respond(loaded.model, ids, NEW_TOKENS)
            if not np.isfinite(expected).all() or not np.isfinite(logits).all():
                raise ParityError("The model computes infinite or undefined logits.", hint="Check its weights.")
            difference = max(difference, float(np.abs(expected - logits).max()))
            scale = max(scale, float(np.abs(expected).max()))
            same &= bool((tokens == expected_tokens).all())
    return Parity(difference, scale, same, len(prompts))


def demand(parity: Parity) -> None:
    """Raise ParityError unless the comparison holds."""
    if not parity.holds:
        text = "the same text" if parity.same_text else "another text"
        raise ParityError(
            f"The written model differs from the masked model by {parity.relative:.2e} of the logit scale and "
            f"generates {text}; at most {TOLERANCE:g} and the same text are allowed. Nothing was published.",
            hint="Please report this with the model's config.json.",
        )


def _fresh(
    folder: Path, prompts: list[list[int]], custom_code: bool, attention: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    asked = {
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "custom_code": custom_code,
        "threads": torch.get_num_threads(),
        "attention": attention,
    }
    # A file without a name: logits are too many for a pipe's buffer, and a killed run leaves nothing.
    with tempfile.TemporaryFile() as answer:
        command = [sys.executable, "-m", "sspcompile.proof.reload", str(folder), str(answer.fileno())]
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, check=False, pass_fds=(answer.fileno(),)
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if done.returncode == EXIT_BAD_INPUT:
                raise CheckpointError(reason)
            raise RunError(f"The written model does not load in a fresh process: {reason}")
        answer.seek(0)
        with np.load(answer) as arrays:
            return [(arrays[f"logits.{n}"], arrays[f"tokens.{n}"]) for n in range(len(prompts))]


def repair_of(folder: Path, plan: SlicePlan, mask: HeadMask) -> Repair:
    """The refitted o_proj columns of a finished artifact, back in the dense shape, for its oracle.

    What this cannot prove, that the columns are those which were fitted, the manifest's checksums do.
    """
    tensors = {name: info for file in folder.glob("*.safetensors") for name, info in read_header(file).items()}
    size = plan.geometry.head_dim
    weights = {}
    for layer, kept in enumerate(mask.kept):
        name = layer_prefix(layer) + "self_attn.o_proj.weight"
        columns = torch.cat([torch.arange(head * size, (head + 1) * size) for head in kept])
        full = torch.zeros(plan.geometry.hidden, plan.geometry.heads * size)
        full[:, columns] = _tensor(folder, name, tensors[name].dtype)
        weights[layer] = full
    return Repair(weights)


def _tensor(folder: Path, name: str, dtype: str) -> torch.Tensor:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if name in opened.keys():  # noqa: SIM118 (not a dictionary)
                return opened.get_tensor(name).float()
    raise ParityError(f"{folder} lacks {name} ({dtype}).", hint="Build it again.")


def unchanged_tensors(source: Checkpoint, written: Path) -> bool:
    """Whether every tensor of `written` has the bytes it has in `source`: the proof for a full mask."""
    tensors = {name: info for file in written.glob("*.safetensors") for name, info in read_header(file).items()}
    if set(tensors) != set(source.tensors):
        return False
    for name, info in tensors.items():
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            if any(stream.read(len(chunk)) != chunk for chunk in source.chunks(name)):
                return False
    return True
