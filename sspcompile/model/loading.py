"""From a folder to a decoder in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sspcompile.checkpoint.source import loading_keys
from sspcompile.errors import CheckpointError
from sspcompile.families import Geometry, family_of, geometry_of
from sspcompile.model.decoder import LoadedModel, TextModel
from sspcompile.model.placement import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What transformers raises for a configuration or tokenizer that it cannot make sense of.
LOADING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError)

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_cut(path: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> TextModel:
    """Load a finished model folder of any head counts as its users do, in fp32.

    Raises CheckpointError when transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    attention = family_of(json.loads((path / "config.json").read_text("utf-8"))).attention
    keys = loading_keys(path) or None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            key_mapping=keys,
        )
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load {path}: {reason}", hint="Check its files.") from error
    model.requires_grad_(False).eval().to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextModel(model, tokenizer)


def demand_tokenizer(path: Path) -> None:
    """Raise CheckpointError for a folder without a tokenizer that every version of transformers opens alike.

    Of Mistral's tekken.json alone 4.57 makes other token ids than 5, and neither knows where a text ends.
    """
    if not any((path / name).exists() for name in TOKENIZERS):
        if (tekken := path / "tekken.json").exists():
            raise CheckpointError(
                f"{path} has a tokenizer for mistral-common alone, tekken.json.",
                hint='Make it one for transformers: python -c "from transformers.integrations.mistral import '
                f'convert_tekken_tokenizer as c; c({str(tekken)!r}).save_pretrained({str(path)!r})".',
            )
        raise CheckpointError(f"{path} has no tokenizer.", hint="Copy tokenizer.json beside config.json.")
    demand_json(path / "tokenizer.json")


def demand_json(path: Path) -> None:
    """Raise CheckpointError for a file that is no JSON: the tokenizers library throws a bare Exception at it."""
    try:
        if path.exists():
            json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON.", hint="Download it again.") from error


def load(
    path: Path, *, fingerprint: str, device: str = "cpu", device_map: str | None = None, trust_remote_code: bool = False
) -> LoadedModel:
    """Load model and tokenizer from a folder. Everything is computed in fp32, whatever the checkpoint stores.

    `device_map` spreads the model instead of putting it on `device` (see placement). Raises InputError for one that
    cannot be used, CheckpointError when tokenizer, configuration or weights are unusable, and whatever `geometry_of`
    raises.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    geometry = geometry_of(json.loads((path / "config.json").read_text("utf-8")))
    demand_tokenizer(path)
    keys, spread = loading_keys(path) or None, loading_options(device_map)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=geometry.family.attention,
            trust_remote_code=trust_remote_code,
            key_mapping=keys,
            **spread,
        )
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load {path}: {reason}", hint="Check its files.") from error
    _check_loaded(model, tokenizer, geometry, path)
    model.requires_grad_(False).eval()
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
