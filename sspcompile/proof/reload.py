"""Load a written model in a process of its own and say what it computes.

`python -m sspcompile.proof.reload FOLDER ANSWER`, the request on stdin; ANSWER is the number of an open file.

Only files and transformers' own loading take part: nothing that the building process patched or cached can help.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import torch

from sspcompile.errors import SspError
from sspcompile.model.loading import readable
from sspcompile.startup import spare_the_collector


def main(folder: str, answer: str) -> None:
    """Read {"prompts": [[token ids]], "new_tokens", "custom_code", "threads", "attention"}.

    Writes logits and greedy tokens of every prompt. Raises CheckpointError when transformers cannot load the folder;
    as a process it then ends with that error's exit code, its message last on stderr.
    """
    spare_the_collector()
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with readable(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=asked["attention"], trust_remote_code=asked["custom_code"]
        ).eval()
        AutoTokenizer.from_pretrained(folder)
    arrays = {}
    for number, ids in enumerate(asked["prompts"]):
        logits, tokens = respond(model, ids, asked["new_tokens"])
        arrays[f"logits.{number}"], arrays[f"tokens.{number}"] = logits, tokens
    with os.fdopen(int(answer), "wb") as stream:
        np.savez(stream, **arrays)


@torch.inference_mode()
def respond(model: torch.nn.Module, ids: list[int], new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits [T, V] of one prompt in fp32, and its greedy continuation [new_tokens] decoded with a KV cache.

    End-of-sequence does not stop it: a short answer would prove little.
    """
    prompt = torch.tensor([ids], device=model.device)
    output = model(input_ids=prompt, use_cache=True)
    logits, tokens = output.logits[0].float().cpu().numpy(), []
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return logits, np.array(tokens)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SspError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
