"""From a folder to a decoder in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sspcompile.checkpoint.settings import read_generation, read_json
from sspcompile.checkpoint.source import loading_keys
from sspcompile.errors import CheckpointError
from sspcompile.families import family_of, geometry_of, stand_in
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.decoder import LoadedModel, TextModel
from sspcompile.model.placement import loading_options

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What transformers raises for a configuration or tokenizer that it cannot make sense of; AssertionError is torch's, for
# a padding id outside the table.
LOADING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError, AssertionError)

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@contextmanager
def readable(source: Path | str) -> Iterator[None]:
    """Every way into transformers: what it cannot make sense of in `source` leaves as CheckpointError, in one line.

    transformers 5 checks the types and sizes of a configuration by errors of huggingface_hub that have no base in
    common with those of the language.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:
        lines = _lines(error)
        # "Validation error for field ...", then the type of an error, what is wrong, and once more for every type.
        reason = lines[-1].partition(": ")[2].partition(" Errors: ")[0] or lines[0]
        raise _unreadable(source, reason, "Correct its config.json.") from error
    except LOADING_ERRORS as error:
        raise _refusal(Path(source), error) from error


def _refusal(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, AssertionError):
        config = read_json(path / "config.json")
        pad, vocab = config.get("pad_token_id"), config.get("vocab_size")
        if isinstance(pad, int) and isinstance(vocab, int):
            return CheckpointError(
                f"transformers cannot load {path}: its pad_token_id {pad} lies outside the table of {vocab} tokens.",
                hint="Set pad_token_id in config.json to an id below that, or to null.",
            )
    return _unreadable(path, _lines(error)[0], "Check its files.")


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]


def _unreadable(source: Path | str, reason: str, hint: str) -> CheckpointError:
    return CheckpointError(f"transformers cannot load {source}: {reason.rstrip('.')}.", hint=hint)


def open_config(path: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration that loads a model folder: its own, or that of a class which holds what its own refuses.

    Raises what transformers raises; see `readable`.
    """
    from transformers import AutoConfig

    other = stand_in(read_json(path / "config.json"))
    if other is None:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    config = AutoConfig.for_model(other.pop("model_type"), **other)
    config.name_or_path = str(path)
    return config


def open_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises what transformers raises; see `readable`."""
    from transformers import AutoConfig, AutoTokenizer

    settings, options = read_json(path / "config.json"), {}
    if stand_in(settings) is not None:
        # The class of a tokenizer follows the model's own type, of which the sizes do not matter here.
        named = {"tokenizer_class": settings["tokenizer_class"]} if "tokenizer_class" in settings else {}
        options["config"] = AutoConfig.for_model(settings["model_type"], **named)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)


def open_model(path: Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """A model folder in memory. `options` are those of from_pretrained; `key_mapping` is worked out where it is left.

    Raises what transformers raises.
    """
    from transformers import AutoModelForCausalLM

    if "key_mapping" not in options:
        options["key_mapping"] = loading_keys(path) or None
    config = open_config(path, trust_remote_code=trust_remote_code)
    with _without_bars():
        return AutoModelForCausalLM.from_pretrained(path, config=config, trust_remote_code=trust_remote_code, **options)


@contextmanager
def _without_bars() -> Iterator[None]:
    """A library shows nothing of itself; the bars of transformers would run through those of the command line."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
    attention = family_of(read_json(path / "config.json")).attention
    read_generation(path)
    demand_json(path / "tokenizer.json")
    with readable(path):
        tokenizer = open_tokenizer(path)
        model = open_model(
            path, attn_implementation=attention, trust_remote_code=trust_remote_code, **computing_in(dtype)
        )
    nn.Module.to(_settled(model, dtype), device)  # transformers hides the types of its own
    return TextModel(model, tokenizer, rendering=rendering)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder alone. Raises CheckpointError when transformers cannot load it."""
    with readable(path):
        return open_tokenizer(path)


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
    geometry = geometry_of(read_json(path / "config.json"))
    read_generation(path)
    demand_tokenizer(path)
    spread = loading_options(device_map)
    with readable(path):
        tokenizer = open_tokenizer(path, trust_remote_code=trust_remote_code)
        model = open_model(
            path,
            attn_implementation=geometry.family.attention,
            trust_remote_code=trust_remote_code,
            **computing_in(dtype),
            **spread,
        )
    _check_loaded(model, path)
    _settled(model, dtype)
    if not spread:
        nn.Module.to(model, device)
    return LoadedModel(
        model=model, tokenizer=tokenizer, geometry=geometry, path=path, fingerprint=fingerprint, rendering=rendering
    )


def _check_loaded(model: PreTrainedModel, path: Path) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise CheckpointError(f"{path} has infinite or undefined numbers in {name}.", hint="Download it again.")
