"""`sspcompile doctor`: what this installation has, and what stands in its way."""

from __future__ import annotations

import json
import platform
from importlib import metadata

import click

from sspcompile.cli.options import json_option

LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "gguf")
# What the extras bring.
EXTRAS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "llama-cpp-python", "peft", "pyarrow", "lm_eval")


@click.command(epilog="\b\nExample:\n  sspcompile doctor --json")
@json_option
def doctor(as_json: bool) -> None:
    """Print versions, devices and known conflicts. Exits with 1 when something must be mended."""
    import torch

    from sspcompile.checkpoint import embedded_model
    from sspcompile.errors import RunError

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in (*LIBRARIES, *EXTRAS):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    problems = []
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        problems.append("onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, install one")
    if not (embedded_model() / "model.safetensors").is_file():
        problems.append("the embedded model is missing: install the package again")
    devices = ["cpu"] + [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    facts = {"versions": versions, "devices": devices, "threads": torch.get_num_threads(), "problems": problems}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        for name, version in versions.items():
            click.echo(f"{name:18} {version or 'not installed'}")
        click.echo(f"{'devices':18} {', '.join(devices)}")
    if problems:
        raise RunError("; ".join(problems) + ".")
