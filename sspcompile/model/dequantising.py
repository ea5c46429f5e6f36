"""A GGUF file becomes a Hugging Face folder, read by transformers, once for each file.

What is cut is the model that the file holds, rounded as it is: that is what many people have.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sspcompile.checkpoint import Checkpoint, copy_companions, write_manifest
from sspcompile.checkpoint.companions import companions, of_tokenizer
from sspcompile.checkpoint.gguf import ORIGINAL, Gguf
from sspcompile.checkpoint.manifest import NAME as MANIFEST
from sspcompile.checkpoint.manifest import read_manifest
from sspcompile.checkpoint.publish import staged, temporary
from sspcompile.errors import CheckpointError, InputError, OutputExistsError, ParityError, UnsupportedModelError
from sspcompile.model.placement import release
from sspcompile.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger("sspcompile")

PLACE = "gguf"
CARD = "README.md"
# How far the folder may be from the file, as a part of the scale of the logits: the rounding to 16 bits, or nothing.
ALLOWED = {"float32": 0.0, "float16": 2e-2, "bfloat16": 2e-2}
LARGEST_HALF = 65504.0
PROBES, PROBE_TOKENS, SEED = 2, 16, 0
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What of a tokenizer beside the file makes another folder of it.
MARK_DIGITS = 12


@dataclass(frozen=True)
class Dequantised:
    """The folder of a GGUF file. `origin`: what a manifest says of where it came from."""

    checkpoint: Checkpoint
    origin: dict[str, Any]


def dequantised(gguf: Gguf) -> Dequantised:
    """The folder of the file below artifacts/gguf, which is made where there is none; a line of the log says so.

    A tokenizer that lies beside the file is taken in place of the file's own. Raises UnsupportedModelError for what
    transformers does not read, or reads otherwise, and ParityError where the folder would compute something else.
    """
    beside = _tokenizer_beside(gguf.path.parent)
    gguf.check(own_tokenizer=not beside)
    folder = _place(gguf, beside)
    if not (folder / MANIFEST).is_file():
        _demand_places(gguf)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{gguf.typed} becomes a folder in {folder.parent}, which cannot be written to: {error.strerror}.",
                hint="Set SSPCOMPILE_HOME to a folder that can be.",
            ) from error
        log.info(
            f"Reading {gguf.typed} ({gguf.fingerprint[:12]}), {_types(gguf)}, with transformers "
            f"{metadata.version('transformers')} into {folder}, as {gguf.dtype}"
        )
        try:
            with staged(folder) as inside:
                _write(inside, gguf, beside)
        except OutputExistsError:
            # Another run was quicker; it wrote the same.
            if not (folder / MANIFEST).is_file():
                raise
    if gguf.rounded:
        log.info(f"{gguf.typed} is rounded: what is cut, and compared with, is the rounded model.")
    return Dequantised(Checkpoint(folder), dict(read_manifest(folder).origin))


def sizes_of(gguf: Gguf) -> Checkpoint:
    """The configuration of a GGUF file without its weights, in a temporary folder that goes with the process."""
    gguf.check(own_tokenizer=False)
    config = _config(gguf)
    config.dtype = gguf.dtype
    folder = temporary("sspcompile-gguf")
    config.save_pretrained(folder)
    return Checkpoint(folder)


def _place(gguf: Gguf, beside: list[str]) -> Path:
    """Where its folder lies: by the sha256 of the file, and of a tokenizer beside it."""
    name = gguf.fingerprint
    if beside:
        digest = hashlib.sha256()
        for file in beside:
            digest.update(file.encode() + b"\0" + (gguf.path.parent / file).read_bytes())
        name = f"{name}-{digest.hexdigest()[:MARK_DIGITS]}"
    return Workspace(Path(os.environ.get("SSPCOMPILE_HOME") or ".")).artifacts / PLACE / name


def _tokenizer_beside(folder: Path) -> list[str]:
    """Files of a tokenizer in a folder, as paths in it; none where there is no whole tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZERS):
        return []
    return [name for name in companions(folder) if of_tokenizer(name)]


def _types(gguf: Gguf) -> str:
    return ", ".join(f"{count} tensors in {name}" for name, count in sorted(gguf.types.items()))


def _write(folder: Path, gguf: Gguf, beside: list[str]) -> None:
    import torch
    from transformers import AutoTokenizer

    model = _read(gguf)
    ids = torch.randint(0, model.config.vocab_size, (PROBES, PROBE_TOKENS), generator=_generator())
    wanted = _logits(model, ids)
    dtype = gguf.dtype
    if dtype == "float16" and any(float(tensor.abs().max()) > LARGEST_HALF for tensor in model.parameters()):
        dtype = "float32"
    with _hushed():
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    del model
    release()  # what was written takes as much memory again
    difference = _difference(folder, ids, wanted)
    if not difference <= ALLOWED[dtype]:
        raise ParityError(
            f"What was read from {gguf.typed} computes something else once it is written: its logits differ by "
            f"{difference:.1e} of their scale.",
            hint=ORIGINAL,
        )
    if beside:
        copy_companions(gguf.path.parent, folder, wanted=of_tokenizer)
    else:
        with _hushed():
            AutoTokenizer.from_pretrained(gguf.path.parent, gguf_file=gguf.path.name).save_pretrained(folder)
    licence = gguf.fields.get("general.license")
    if isinstance(licence, str) and re.fullmatch(r"[\w.-]+", licence):
        (folder / CARD).write_text(f"---\nlicense: {licence}\n---\n", "utf-8")
    said = {
        "file": gguf.path.name,
        "sha256": gguf.fingerprint,
        "types": dict(sorted(gguf.types.items())),
        "dtype": dtype,
        "difference": difference,
        "tokenizer": "beside the file" if beside else "in the file",
        "transformers": metadata.version("transformers"),
        "gguf": metadata.version("gguf"),
    }
    write_manifest(folder, {"gguf": said}, hash_weights=False)


def _config(gguf: Gguf) -> Any:
    """The configuration as transformers reads it. Raises UnsupportedModelError where it is not the file's."""
    from transformers import AutoConfig

    with _hushed(), _refused(gguf):
        config = AutoConfig.from_pretrained(gguf.path.parent, gguf_file=gguf.path.name)
    gguf.check_config(config.to_dict())
    return config


def _demand_places(gguf: Gguf) -> None:
    """Raise UnsupportedModelError where the class holds more or fewer numbers than the file: transformers drops tensors
    that it has no place for, as biases, without a word.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(gguf)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != gguf.elements:
        raise UnsupportedModelError(
            f"{gguf.typed} holds {gguf.elements:,} numbers, and {type(model).__name__} of these sizes has {count:,}.",
            hint=ORIGINAL,
        )


def _read(gguf: Gguf) -> PreTrainedModel:
    """The model in fp32. Raises UnsupportedModelError where a tensor of it is not in the file."""
    import torch
    from transformers import AutoModelForCausalLM

    with _hushed(), _refused(gguf):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.path.parent, gguf_file=gguf.path.name, dtype=torch.float32, output_loading_info=True
        )
    model, info = loaded
    # The numbers are plain now, but the model says that they are not, and would save something else.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    if absent := sorted(info["missing_keys"]):
        raise UnsupportedModelError(f"{gguf.typed} has no {absent[0]}.", hint=ORIGINAL)
    return model.requires_grad_(False).eval()


@contextlib.contextmanager
def _refused(gguf: Gguf) -> Iterator[None]:
    """What transformers cannot read, in one line."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{gguf.typed} cannot be read: {error!s:.120}.", hint="pip install gguf accelerate") from error
    except (ValueError, KeyError, IndexError, RuntimeError, TypeError, OSError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"transformers {metadata.version('transformers')} cannot read {gguf.typed}: {reason:.160}.", hint=ORIGINAL
        ) from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """transformers draws bars of its own here, which nothing else switches off."""
    from transformers.utils import logging as said

    before = said.get_verbosity()
    said.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        said.set_verbosity(before)


def _generator() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(SEED)


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids).logits


def _difference(folder: Path, ids: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of logits between the folder, computed in fp32, and what was `wanted`, of their scale."""
    import torch
    from transformers import AutoModelForCausalLM

    with _hushed():
        written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return float((_logits(written, ids) - wanted).abs().max() / wanted.abs().max())
