"""From a folder to a decoder in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sspcompile.errors import CheckpointError
from sspcompile.families import Geometry, family_of, geometry_of, stand_in
from sspcompile.model.decoder import LoadedModel, TextModel
from sspcompile.model.placement import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What transformers raises for a configuration or tokenizer that it cannot make sense of.
LOADING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError)


@contextmanager
def readable(source: Path | str) -> Iterator[None]:
    """Every way into transformers: what it cannot make sense of in `source` leaves as CheckpointError, in one line.

    transformers 5 checks the types and sizes of a configuration by errors of huggingface_hub that have no base in
    common with those of the language.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (*LOADING_ERRORS, StrictDataclassError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if isinstance(error, StrictDataclassError):
            # "Validation error for field ...", then the type of an error, what is wrong, and once more for every type.
            reason = lines[-1].partition(": ")[2].partition(" Errors: ")[0] or lines[0]
            hint = "Correct its config.json."
        else:
            reason, hint = lines[0], "Check its files."
        raise CheckpointError(f"transformers cannot load {source}: {reason.rstrip('.')}.", hint=hint) from error


def open_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration that loads a model folder: its own, or that of a class which holds what its own refuses.

    Raises what transformers raises; see `readable`.
    """
    from transformers import AutoConfig

    other = stand_in(_settings(path))
    if other is None:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    config = AutoConfig.for_model(other.pop("model_type"), **other)
    config.name_or_path = str(path)
    return config


def open_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises what transformers raises; see `readable`."""
    from transformers import AutoConfig, AutoTokenizer

    settings, options = _settings(path), {}
    if stand_in(settings) is not None:
        # The class of a tokenizer follows the model's own type, of which the sizes do not matter here.
        named = {"tokenizer_class": settings["tokenizer_class"]} if "tokenizer_class" in settings else {}
        options["config"] = AutoConfig.for_model(settings["model_type"], **named)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)


def _settings(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text("utf-8"))


def open_model(path: Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """A model folder in memory. `options` are those of from_pretrained. Raises what transformers raises."""
    from transformers import AutoModelForCausalLM

    config = open_config(path, trust_remote_code=trust_remote_code)
    return AutoModelForCausalLM.from_pretrained(path, config=config, trust_remote_code=trust_remote_code, **options)


def load_cut(path: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> TextModel:
    """Load a finished model folder of any head counts as its users do, in fp32.

    Raises CheckpointError when transformers cannot load it.
    """
    attention = family_of(_settings(path)).attention
    with readable(path):
        tokenizer = open_tokenizer(path)
        model = open_model(
            path, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.requires_grad_(False).eval().to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextModel(model, tokenizer)


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
    geometry = geometry_of(_settings(path))
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise CheckpointError(f"{path} has no tokenizer.", hint="Copy tokenizer.json beside config.json.")
    spread = loading_options(device_map)
    demand_json(path / "tokenizer.json")
    with readable(path):
        tokenizer = open_tokenizer(path, trust_remote_code=trust_remote_code)
        model = open_model(
            path,
            dtype=torch.float32,
            attn_implementation=geometry.family.attention,
            trust_remote_code=trust_remote_code,
            **spread,
        )
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
