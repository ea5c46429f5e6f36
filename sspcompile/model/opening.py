"""Every way into transformers: configuration, tokenizer and model of a folder, and the errors of unusable ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sspcompile.checkpoint.settings import read_json
from sspcompile.checkpoint.source import loading_keys
from sspcompile.errors import CheckpointError
from sspcompile.families import stand_in

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What transformers raises for a configuration or tokenizer that it cannot make sense of; AssertionError is torch's, for
# a padding id outside the table.
LOADING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError, AssertionError)


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


def computing_in(dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` and `from_config` are told of the numbers to compute with.

    The default way to run experts is one kernel, which has no float64.
    """
    return {"dtype": dtype, **({"experts_implementation": "eager"} if dtype == torch.float64 else {})}
