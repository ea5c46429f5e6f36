"""Writes the domain pools of the embedded model: `python -m training.pools [--out sspcompile/embedded/domains]`.

A pool is a description, sentences in which a user might describe a deployment, and prompts without answers: a part from
the generator's training split, with the same tasks and forms in every domain, and a part written by hand.
"""

from __future__ import annotations

import argparse
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from sspcompile.embedded import POOLS_DIR
from training.corpus import DOMAINS, OUTSIDE_DOMAINS, items
from training.handwritten import HANDWRITTEN

SCHEMA_VERSION = 1
POOL_SEED = 1000
"""Seed of the generated prompts; the training stream and the evaluation draw with other ones."""
GENERATED_PROMPTS = 80
DEFAULT_FOLDER = POOLS_DIR
HEADER = "# Written by `python -m training.pools`; edit training/handwritten instead.\n"


def pool(domain: str) -> dict[str, object]:
    """The pool of one domain as it stands in its file."""
    written = HANDWRITTEN[domain]
    generated = [item.prompt for item in items(domain, "train", POOL_SEED, GENERATED_PROMPTS)]
    return {
        "schema_version": SCHEMA_VERSION,
        "name": domain,
        "description": written.description,
        "descriptions": list(written.descriptions),
        "prompts": [*written.prompts, *generated],
    }


def pool_text(domain: str) -> str:
    """The content of the pool's YAML file."""
    yaml = YAML()
    yaml.width = 1000
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = StringIO()
    yaml.dump(pool(domain), stream)
    return HEADER + stream.getvalue()


def pool_paths(folder: Path = DEFAULT_FOLDER) -> dict[str, Path]:
    """The file of each domain; the outside ones have a folder of their own."""
    inside = {domain: folder / f"{domain}.yaml" for domain in DOMAINS}
    return inside | {domain: folder / "outside" / f"{domain}.yaml" for domain in OUTSIDE_DOMAINS}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the domain pools.")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    for domain, path in pool_paths(parser.parse_args().out).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pool_text(domain))


if __name__ == "__main__":
    main()
