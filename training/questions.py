"""Writes the questions that ship with the embedded model: `python -m training.questions [--out FILE]`.

They are held-out items of every domain, the outside ones too (a build may take those for domains of its own), with
their answers: what `sspcompile eval` asks of the embedded model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sspcompile.embedded.questions import QUESTIONS_FILE
from training.corpus import DOMAIN_DATA, items

QUESTION_SEED = 5000
"""Seed of the shipped questions; pools, training and the benchmarks draw with others."""
QUESTIONS_PER_DOMAIN = 400
"""Whole turns of the ten tasks, so that each is asked equally often; of some there are hardly more."""


def questions_text() -> str:
    """The content of the file: a JSON object per line."""
    drawn = (item for domain in DOMAIN_DATA for item in items(domain, "heldout", QUESTION_SEED, QUESTIONS_PER_DOMAIN))
    lines = (json.dumps({"domain": item.domain, "prompt": item.prompt, "answer": item.answer}) for item in drawn)
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the questions that ship with the embedded model.")
    parser.add_argument("--out", type=Path, default=QUESTIONS_FILE)
    parser.parse_args().out.write_text(questions_text(), "utf-8")


if __name__ == "__main__":
    main()
