"""The proof with whole models, in a fresh process that loads both from their files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence

import torch

from sspcompile import errors
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.errors import RunError
from sspcompile.progress import Steps, no_steps
from sspcompile.proof.claim import Claim
from sspcompile.proof.parity import PROBE_PROMPTS, PROBE_TOKENS, Parity
from sspcompile.proof.reload import STEP
from sspcompile.slicing.mask import dump_mask
from sspcompile.startup import SLEEPING

NEW_TOKENS = 24
# Activations, the interpreter and what torch allocates beside the weights.
MEMORY_SLACK = 1.2
# What is started, and asked on its standard input.
RELOAD: Iterable[str] = (sys.executable, "-P", "-m", "sspcompile.proof.reload")


def compare_whole(
    claim: Claim, prompts: Sequence[Sequence[int]], progress: Steps = no_steps, *, device: str = "cpu"
) -> Parity:
    """Compare on token ids `prompts`, and on what the written model generates behind each, with a cache.

    Raises RunError when the written model does not load or the process ends early, ParityError for logits that are not
    numbers, and what `load` raises for the dense model.
    """
    asked = {
        "dense": str(claim.checkpoint.path.absolute()),
        "mask": dump_mask(claim.mask),
        "written": str(claim.written.absolute()),
        "custom_code": claim.custom_code,
        "refitted": sorted(claim.refitted),
        "prompts": [list(ids[:PROBE_TOKENS]) for ids in prompts[:PROBE_PROMPTS]],
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    code, answer, said = _ask([*RELOAD], json.dumps(asked), progress)
    if code:
        reason = said or f"exit code {code}"
        raise RunError(
            f"The process that compares the models failed: {reason}",
            hint="If memory ran out, `sspcompile verify --layerwise` needs less.",
        )
    found = json.loads(answer)
    if "error" in found:
        raise getattr(errors, found["error"])(found["message"], hint=found["hint"])
    return Parity(**found)


def _ask(command: Sequence[str], question: str, progress: Steps) -> tuple[int, str, str]:
    """Exit code, answer, and the last line on standard error of a process that says there how far it is."""
    pipe, said = subprocess.PIPE, ""
    asleep = {**SLEEPING, **os.environ}
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace", env=asleep
    ) as process:
        assert process.stdin and process.stdout and process.stderr  # noqa: S101 (pipes were asked for)
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it died: the reason comes below
                process.stdin.write(question)
            for line in process.stderr:  # the answer is shorter than what a pipe holds, and can wait
                if line.startswith(STEP):
                    done, total = map(int, line.split()[1:])
                    progress(done, total)
                else:
                    said = line.strip() or said
            answer = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    return process.returncode, answer, said


def whole_bytes(dense: Checkpoint) -> int:
    """Memory that the comparison takes: the dense model in float64, its files while they are read, logits of both."""
    weights = sum(8 * math.prod(info.shape) + info.nbytes for info in dense.tensors.values())
    logits = 2 * 8 * PROBE_PROMPTS * (PROBE_TOKENS + NEW_TOKENS) * dense.geometry.vocab
    return int(MEMORY_SLACK * (weights + logits))
