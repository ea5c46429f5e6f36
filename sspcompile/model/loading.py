"""From a folder to a decoder in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sspcompile.errors import CheckpointError
from sspcompile.families import Geometry, family_of, geometry_of
from sspcompile.model.decoder import LoadedModel, TextModel
from sspcompile.model.placement import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What transformers raises for a configuration or tokenizer that it cannot make sense of.
LOADING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError)


def load_cut(
    path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> TextModel:
    """Load a finished model folder of any head counts as its users do.

    Raises CheckpointError when transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    attention = family_of(json.loads((path / "config.json").read_text("utf-8"))).attention
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=attention, trust_remote_code=trust_remote_code, **computing_in(dtype)
        )
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load {path}: {reason}", hint="Check its files.") from error
    _settled(model, dtype).to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextModel(model, tokenizer)


def computing_in(dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` and `from_config` are told of the numbers to compute with.

    The default way to run experts is one kernel, which has no float64.
    """
    return {"dtype": dtype, **({"experts_implementation": "eager"} if dtype == torch.float64 else {})}


def _settled(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model.requires_grad_(False).eval()
    # Rotary frequencies are fp32 whatever is asked for, and stay so except where nothing may be.
    return model.double() if dtype == torch.float64 else model


def demand_json(path: Path) -> None:
    """Raise CheckpointError for a file that is no JSON: the tokenizers library throws a bare Exception at it."""
    try:
        if path.exists():
            json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON.", hint="Download it again.") from error


def load(
    path: Path,
    *,
    fingerprint: str,
    device: str = "cpu",
    device_map: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load model and tokenizer from a folder. Everything is computed in `dtype`, whatever the checkpoint stores.

    `device_map` spreads the model instead of putting it on `device` (see placement). Raises InputError for one that
    cannot be used, CheckpointError when tokenizer, configuration or weights are unusable, and whatever `geometry_of`
    raises.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    geometry = geometry_of(json.loads((path / "config.json").read_text("utf-8")))
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise CheckpointError(f"{path} has no tokenizer.", hint="Copy tokenizer.json beside config.json.")
    spread = loading_options(device_map)
    demand_json(path / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation=geometry.family.attention,
            trust_remote_code=trust_remote_code,
            **computing_in(dtype),
            **spread,
        )
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load {path}: {reason}", hint="Check its files.") from error
    _check_loaded(model, tokenizer, geometry, path)
    _settled(model, dtype)
    if not spread:
        model.to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model=model, tokenizer=tokenizer, geometry=geometry, path=path, fingerprint=fingerprint)


def _check_loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, geometry: Geometry, path: Path) -> None:
    if len(tokenizer) > geometry.vocab:
        raise CheckpointError(
            f"{path} has a tokenizer of {len(tokenizer)} tokens for a model of {geometry.vocab}.",
            hint="Use the tokenizer that the model was trained with.",
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise CheckpointError(f"{path} has infinite or undefined numbers in {name}.", hint="Download it again.")
