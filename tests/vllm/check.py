"""Load a cut in vLLM, offline, and compare its greedy tokens: `python tests/vllm/check.py CASE`, in vLLM's environment.

Ends with 1 and the two texts where they differ, and where the cache does not hold as many tokens as the bytes of the
cut's keys and values say. A per-layer cut goes through the Transformers backend, which its class is made for; a uniform
one as vLLM chooses.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# Of the room that vLLM is given, what whole blocks may leave.
LEFT_OVER = 0.02


def main(folder: Path) -> int:
    from vllm import LLM, SamplingParams

    case = json.loads((folder / "case.json").read_text())
    custom = {"model_impl": "transformers", "trust_remote_code": True} if case["custom_code"] else {}
    llm = LLM(
        model=str(folder / "cut"), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, **custom
    )
    asked = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    greedy = SamplingParams(temperature=0, max_tokens=len(case["answers"][0]), ignore_eos=True, detokenize=False)
    found = [list(answer.outputs[0].token_ids) for answer in llm.generate(asked, greedy, use_tqdm=False)]
    for mine, theirs in zip(found, case["answers"], strict=True):
        if mine != theirs:
            print(f"{folder.name}: vLLM wrote {mine}, transformers {theirs}", file=sys.stderr)
            return 1
    told = llm.llm_engine.vllm_config.cache_config
    tokens, room = told.num_gpu_blocks * told.block_size, int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * 2**30
    fits = room / case["cache_bytes"]
    if abs(tokens / fits - 1) > LEFT_OVER:
        print(f"{folder.name}: the cache holds {tokens} tokens, by their bytes {fits:.0f}", file=sys.stderr)
        return 1
    print(
        f"{folder.name}: {len(found)} texts are the same; heads per layer {case['counts']}; "
        f"the cache holds {tokens} tokens, by their bytes {fits:.0f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
