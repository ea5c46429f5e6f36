"""Coverage-guided fuzzing of the readers of other people's files: python tests/fuzz/run.py TARGET [libFuzzer options].

A reader may refuse what it is given with an error of the package's own hierarchy and nothing else: any other exception,
a crash or a hang is a finding, and the input that caused it is written beside the corpus. `make fuzz` runs all targets;
the corpus in `tests/fuzz/corpus` is what they have found worth keeping.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["sspcompile", "ruamel.yaml"]):
    from sspcompile.checkpoint.headers import read_header
    from sspcompile.checkpoint.manifest import read_manifest
    from sspcompile.checkpoint.source import Checkpoint, tensor_table
    from sspcompile.errors import SspError
    from sspcompile.request.recipe import load_recipe
    from sspcompile.request.scenario import read_scenario
    from sspcompile.slicing.mask import load_mask

PLACE = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
SHARD = "a.safetensors"


def _write(name: str, data: bytes) -> Path:
    path = PLACE / name
    path.write_bytes(data)
    return path


def recipe(data: bytes) -> None:
    load_recipe(_write("recipe.yaml", data))


def prompts(data: bytes) -> None:
    read_scenario(str(_write("prompts.jsonl", data)))


def config(data: bytes) -> None:
    _write("config.json", data)
    checkpoint = Checkpoint(PLACE)
    checkpoint.expected()


def header(data: bytes) -> None:
    read_header(_write("model.safetensors", data))


def index(data: bytes) -> None:
    _write("model.safetensors.index.json", data)
    tensor_table(PLACE)


def mask(data: bytes) -> None:
    load_mask(_write("mask.json", data))


def manifest(data: bytes) -> None:
    _write("manifest.json", data)
    read_manifest(PLACE)


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (recipe, prompts, config, header, index, mask, manifest)
}


def _one_shard() -> None:
    """What an index may rightly point to."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    text = json.dumps({"w": entry}).encode()
    _write(SHARD, len(text).to_bytes(8, "little") + text + bytes(4))


def main() -> None:
    name = sys.argv.pop(1)
    target = TARGETS[name]
    if name == "index":
        _one_shard()

    def once(data: bytes) -> None:
        try:
            target(data)
        except SspError as error:
            assert "\n" not in str(error), "an error is one line"

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
