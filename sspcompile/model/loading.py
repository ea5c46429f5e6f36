"""From a folder to a decoder in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sspcompile.checkpoint.settings import read_generation, read_json
from sspcompile.errors import ArtifactError, CheckpointError
from sspcompile.families import family_of, geometry_of
from sspcompile.machine import give_memory_back
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.decoder import LoadedModel, TextModel
from sspcompile.model.opening import computing_in, open_model, open_tokenizer, readable
from sspcompile.model.placement import ON_CPU, Place, Placement, loading_options, resolve, use_threads
from sspcompile.model.streaming import layers_that_fit, open_streaming

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_cut(
    path: Path,
    *,
    placement: Placement = ON_CPU,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    rendering: Rendering = PLAIN,
) -> TextModel:
    """Load a finished model folder of any head counts as its users do. `dtype` overrules that of the placement.

    Raises InputError for a placement that this machine does not have, and CheckpointError when transformers cannot load
    it.
    """
    attention = family_of(read_json(path / "config.json")).attention
    read_generation(path)
    demand_json(path / "tokenizer.json")
    with readable(path):
        tokenizer = open_tokenizer(path)
    model = _placed(path, placement, dtype, attention, trust_remote_code=trust_remote_code)
    return TextModel(model, tokenizer, rendering=rendering)


def _placed(
    path: Path, placement: Placement, dtype: torch.dtype | None, attention: str, *, trust_remote_code: bool
) -> PreTrainedModel:
    """The model of a folder where it is to be computed, in evaluation mode; what does not fit there stays on disk."""
    place = resolve(placement, dtype)
    use_threads(placement)
    if place.limited:
        give_memory_back()
    resident = None if place.device_map is not None else layers_that_fit(path, place)
    if resident is not None:
        return open_streaming(path, place, resident, attention, trust_remote_code=trust_remote_code)
    with readable(path):
        model = open_model(
            path,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            **computing_in(place.dtype),
            **loading_options(place),
        )
    _settled(model, place)
    return model


def _settled(model: PreTrainedModel, place: Place) -> None:
    model.requires_grad_(False).eval()
    # Rotary frequencies are fp32 whatever is asked for, and stay so except where nothing may be.
    if place.dtype == torch.float64:
        model.double()
    if place.device_map is None:
        nn.Module.to(model, place.device)  # transformers hides the types of its own


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder alone. Raises CheckpointError when transformers cannot load it."""
    with readable(path):
        return open_tokenizer(path)


def tokenizer_of_export(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a finished export. Raises ArtifactError or CheckpointError for one that cannot be read."""
    demand_json(folder / "tokenizer.json")
    try:
        return load_tokenizer(folder)
    except CheckpointError as error:
        raise ArtifactError(f"{folder} lacks a tokenizer that can be read.", hint="Export it again.") from error


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
    placement: Placement = ON_CPU,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    rendering: Rendering = PLAIN,
) -> LoadedModel:
    """Load model and tokenizer from a folder. Everything is computed in the dtype of `placement`, or in `dtype`,
    whatever the checkpoint stores.

    Raises InputError for a placement that this machine does not have, CheckpointError when tokenizer, configuration or
    weights are unusable, and whatever `geometry_of` raises.
    """
    geometry = geometry_of(read_json(path / "config.json"))
    read_generation(path)
    demand_tokenizer(path)
    with readable(path):
        tokenizer = open_tokenizer(path, trust_remote_code=trust_remote_code)
    model = _placed(path, placement, dtype, geometry.family.attention, trust_remote_code=trust_remote_code)
    _check_loaded(model, path)
    return LoadedModel(
        model=model, tokenizer=tokenizer, geometry=geometry, path=path, fingerprint=fingerprint, rendering=rendering
    )


def _check_loaded(model: PreTrainedModel, path: Path) -> None:
    for name, parameter in model.named_parameters():
        # In pieces: the test makes tensors of its own.
        pieces = () if parameter.is_meta else parameter.detach().view(-1).split(1 << 22)
        if not all(torch.isfinite(piece).all() for piece in pieces):
            raise CheckpointError(f"{path} has infinite or undefined numbers in {name}.", hint="Download it again.")
