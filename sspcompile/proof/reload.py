"""Load a written model in a process of its own, and say how far it is from the masked model.

`python -m sspcompile.proof.reload` reads what `whole.py` asks from standard input, and answers on standard output: no
file of the exchange can stay behind. On standard error it says how far it is, in lines that begin with STEP.

Only files and transformers' own loading take part: nothing that the building process patched or cached can help. One
model is in memory at a time, the written one first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sspcompile.checkpoint.source import Checkpoint
from sspcompile.errors import CheckpointError, RunError, SspError
from sspcompile.model.cache import cache_argument, cache_of
from sspcompile.model.exact import in_float64
from sspcompile.model.loading import load, load_cut
from sspcompile.model.opening import open_config, readable
from sspcompile.model.placement import Placement, release
from sspcompile.proof.claim import Claim, written_repair
from sspcompile.proof.parity import Distance, Parity
from sspcompile.repair.repair import masked
from sspcompile.slicing.mask import parse_mask
from sspcompile.startup import spare_the_collector

STEP = "sspcompile-step"
TOGETHER = 2


def main() -> None:
    """Print the fields of a Parity, or of an error of ours, as JSON."""
    spare_the_collector()
    # What libraries print goes to standard error, beside the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    try:
        mask = parse_mask(asked["mask"])
        claim = Claim(
            Checkpoint(Path(asked["dense"])),
            mask,
            Path(asked["written"]),
            asked["custom_code"],
            dict.fromkeys(asked["refitted"]),
        )
        found: dict[str, Any] = asdict(_compare(claim, asked["prompts"], asked["new_tokens"], asked["device"]))
    except SspError as error:
        found = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    with answer:
        json.dump(found, answer)


def _compare(claim: Claim, prompts: Sequence[Sequence[int]], new_tokens: int, device: str) -> Parity:
    placement = Placement(device=device, threads=torch.get_num_threads())
    with readable(claim.checkpoint.path):  # what is wrong with the user's own configuration is told of that
        open_config(claim.checkpoint.path)
    done = _Done(2 * len(prompts) + 2)
    answers = _answers(claim, prompts, new_tokens, placement, done)
    release()  # the written model
    dense = load(claim.checkpoint.path, fingerprint="", placement=placement, dtype=torch.float64)
    done.step()
    distance = Distance()
    with masked(dense, claim.mask.units, written_repair(claim)), in_float64():
        for alike, found in zip(_alike(prompts), answers, strict=True):
            read = [logits[:, -1].argmax(-1) for logits in found]
            for expected, logits in zip(respond(dense.model, alike, new_tokens, read=read), found, strict=True):
                for row in zip(expected, logits, strict=True):  # a difference is as large as what it is of
                    distance.add(*row)
            done.step(len(alike))
    return distance.parity(len(prompts), layerwise=False)


def _alike(prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Prompts of one length by twos: they decode as a batch without padding, which reads the weights once a step.

    Each more would take a tenth of a gigabyte of logits beside a vocabulary of 50,000.
    """
    lengths = dict.fromkeys(map(len, prompts))
    groups = [[ids for ids in prompts if len(ids) == length] for length in lengths]
    return [group[start : start + TOGETHER] for group in groups for start in range(0, len(group), TOGETHER)]


class _Done:
    """Says on standard error how many of `total` steps are done."""

    def __init__(self, total: int) -> None:
        self._done, self._total = -1, total
        self.step()

    def step(self, count: int = 1) -> None:
        self._done += count
        print(STEP, self._done, self._total, file=sys.stderr, flush=True)


def _answers(
    claim: Claim, prompts: Sequence[Sequence[int]], new_tokens: int, placement: Placement, done: _Done
) -> list[list[Tensor]]:
    try:
        cut = load_cut(claim.written, placement=placement, dtype=torch.float64, trust_remote_code=claim.custom_code)
    except CheckpointError as error:  # not the user's fault: the folder is ours
        raise RunError(f"The written model does not load in a fresh process: {error.message}") from error
    done.step()
    answers = []
    with in_float64():
        for alike in _alike(prompts):
            answers.append(list(respond(cut.model, alike, new_tokens)))
            done.step(len(alike))
    return answers


@torch.inference_mode()
def respond(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int, *, read: Sequence[Tensor] | None = None
) -> Iterator[Tensor]:
    """Logits [B, T, V] of prompts of one length, then [B, 1, V] at each token of their continuations but the last.

    These are decoded with a KV cache: greedily, or with the tokens [B] of each step given by `read`. End-of-sequence
    does not stop them: a short answer would prove little.
    """
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([list(ids) for ids in prompts], device=device), use_cache=True)
    yield output.logits
    for step in range(new_tokens - 1):
        tokens = output.logits[:, -1].argmax(-1) if read is None else read[step]
        output = model(input_ids=tokens[:, None], use_cache=True, **{cache_argument(model): cache_of(output)})
        yield output.logits


if __name__ == "__main__":
    main()
