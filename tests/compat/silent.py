"""Load and run cut models as a user's program does: `python tests/compat/silent.py CASE ...`, folders of write.py.

Every warning is an error, and the libraries are as talkative as they are by default: what they have to say about a
model stands on standard error.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.path.append(str(Path(__file__).parents[2]))

from sspcompile.model.cache import cache_argument, cache_of

PROMPT = [(7 * n) % 250 for n in range(12)]
NEW_TOKENS = 4


def main(*cases: str) -> None:
    warnings.simplefilter("error")
    logging.disable_progress_bar()
    for case in map(Path, cases):
        consent = {"trust_remote_code": json.loads((case / "case.json").read_text())["custom_code"]}
        AutoTokenizer.from_pretrained(case / "cut", **consent)
        model = AutoModelForCausalLM.from_pretrained(case / "cut", **consent).eval()
        ids = torch.tensor([PROMPT])
        for cache in ({}, {"cache_implementation": "static"}):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **cache
            )
        # As our own commands hand the cache on. This environment has none of their other dependencies.
        output = model(input_ids=ids, use_cache=True)
        model(input_ids=ids[:, -1:], use_cache=True, **{cache_argument(model): cache_of(output)})


if __name__ == "__main__":
    main(*sys.argv[1:])
