"""From a folder to a decoder in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sspcompile.checkpoint.settings import read_generation, read_json
from sspcompile.checkpoint.source import loading_keys
from sspcompile.errors import CheckpointError
from sspcompile.families import family_of, geometry_of
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.decoder import LoadedModel, TextModel
from sspcompile.model.placement import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What transformers raises for a configuration or tokenizer that it cannot make sense of; AssertionError is torch's, for
# a padding id outside the table.
LOADING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError, AssertionError)

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_cut(
    path: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    rendering: Rendering = PLAIN,
) -> TextModel:
    """Load a finished model folder of any head counts as its users do.

    Raises CheckpointError when transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    attention = family_of(read_json(path / "config.json")).attention
    read_generation(path)
    demand_json(path / "tokenizer.json")
    keys = loading_keys(path) or None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            key_mapping=keys,
            **computing_in(dtype),
        )
    except LOADING_ERRORS as error:
        raise _refusal(path, error) from error
    _settled(model, dtype).to(device)
    return TextModel(model, tokenizer, rendering=rendering)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder alone. Raises CheckpointError when transformers cannot load it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except LOADING_ERRORS as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    config = json.loads((path / "config.json").read_text("utf-8"))
    pad, vocab = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(error, AssertionError) and isinstance(pad, int) and isinstance(vocab, int):
        return CheckpointError(
            f"transformers cannot load {path}: its pad_token_id {pad} lies outside the table of {vocab} tokens.",
            hint="Set pad_token_id in config.json to an id below that, or to null.",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"transformers cannot load {path}: {reason}", hint="Check its files.")


def computing_in(dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` and `from_config` are told of the numbers to compute with.

    The default way to run experts is one kernel, which has no float64.
    """
    return {"dtype": dtype, **({"experts_implementation": "eager"} if dtype == torch.float64 else {})}


def _settled(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    model.requires_grad_(False).eval()
    # Rotary frequencies are fp32 whatever is asked for, and stay so except where nothing may be.
    return model.double() if dtype == torch.float64 else model


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
    """Raise CheckpointError for a file that is not valid JSON: the tokenizers library throws a bare Exception at it."""
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
    rendering: Rendering = PLAIN,
) -> LoadedModel:
    """Load model and tokenizer from a folder. Everything is computed in `dtype`, whatever the checkpoint stores.

    `device_map` spreads the model instead of putting it on `device` (see placement). Raises InputError for one that
    cannot be used, CheckpointError when tokenizer, configuration or weights are unusable, and whatever `geometry_of`
    raises.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    geometry = geometry_of(read_json(path / "config.json"))
    read_generation(path)
    demand_tokenizer(path)
    keys, spread = loading_keys(path) or None, loading_options(device_map)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            attn_implementation=geometry.family.attention,
            trust_remote_code=trust_remote_code,
            key_mapping=keys,
            **computing_in(dtype),
            **spread,
        )
    except LOADING_ERRORS as error:
        raise _refusal(path, error) from error
    _check_loaded(model, path)
    _settled(model, dtype)
    if not spread:
        model.to(device)
    return LoadedModel(
        model=model, tokenizer=tokenizer, geometry=geometry, path=path, fingerprint=fingerprint, rendering=rendering
    )


def _check_loaded(model: PreTrainedModel, path: Path) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise CheckpointError(f"{path} has infinite or undefined numbers in {name}.", hint="Download it again.")
