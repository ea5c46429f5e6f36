"""`run`: any finished model writes text, token by token."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from sspcompile.api.arguments import Named
from sspcompile.api.drafts import load_nested
from sspcompile.errors import InputError
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.decoder import Chooser, LanguageModel
from sspcompile.model.llama_text import load_gguf
from sspcompile.model.loading import load_cut
from sspcompile.model.onnx_text import load_onnx
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.model.text import sentences
from sspcompile.model.vocabulary import demand_rows
from sspcompile.nested.index import read_nested

# Where `Named.dense` tells its user to name the dense model.
NAMED_ITSELF = "`sspcompile run MODEL`"


@dataclass(frozen=True)
class Written:
    """One text. `first_token_s`: from the prompt to the first token; `tokens_per_s` of those after it, None for one.

    `full_context`: the longest text of the model in tokens, where that ended this one; None otherwise.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float | None
    full_context: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at temperature 0, else a draw from those that make up `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def chooser(self) -> Chooser | None:
        """None for argmax. A draw is the same for the same seed and logits."""
        if self.temperature == 0:
            return None
        generator = torch.Generator().manual_seed(self.seed)

        def choose(scores: Tensor) -> Tensor:
            ordered, order = (scores / self.temperature).softmax(-1).sort(descending=True, dim=-1)
            # The likeliest tokens up to and with the one that reaches top_p (Holtzman et al. 2020, section 3.1).
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            return order.gather(-1, torch.multinomial(ordered, 1, generator=generator))[:, 0]

        return choose


def open_model(
    found: Named,
    *,
    dense: bool = False,
    size: float | None = None,
    placement: Placement = ANYWHERE,
    trust_remote_code: bool = False,
    rendering: Rendering = PLAIN,
) -> tuple[Path, LanguageModel]:
    """What an argument names, ready to write, and its folder; with `dense` the model that it was cut from, with `size`
    the largest member of at most that share, of a nested artifact or an ONNX export of all its sizes.

    Code in the folder runs only when it is ours, or trusted by the user. Raises ArtifactError or CheckpointError,
    BudgetError below the smallest member, and InputError for a placement that this machine does not have or a size of
    what has one. An export computes in its own precision.
    """
    if size is not None and (dense or not (found.onnx or found.kind == "nested")):
        raise InputError(f"{found.folder} holds one size.", hint="Leave --size out.")
    if dense:
        folder = found.dense(option=NAMED_ITSELF).checkpoint.path
        return folder, load_cut(folder, placement=placement, trust_remote_code=trust_remote_code, rendering=rendering)
    if found.onnx:
        return found.model, load_onnx(found.model, size=size, placement=placement, rendering=rendering)
    if found.gguf:
        return found.model, load_gguf(found.model, placement=placement, rendering=rendering)
    if size is not None:
        share = read_nested(found.folder).member(size).share
        model: Any = load_nested(found, placement=placement, rendering=rendering)
        model.model.set_size(share)
        return found.model, model
    trusted = found.custom_code or trust_remote_code
    return found.model, load_cut(found.model, placement=placement, trust_remote_code=trusted, rendering=rendering)


def prompt_tokens(model: LanguageModel, prompt: str) -> tuple[int, ...]:
    """What the model reads of a prompt.

    Raises InputError for an empty prompt, for one that leaves no room for a single new token, and what `sentences` and
    `demand_rows` raise.
    """
    tokenizer = model.tokenizer
    if not prompt.strip():
        raise InputError("The prompt is empty.", hint='Type --prompt "...".')
    ids = sentences(tokenizer, [prompt], sys.maxsize, model.rendering)[0].ids
    demand_rows(tokenizer, ids, model.vocab)
    if model.positions is not None and len(ids) >= model.positions:
        raise InputError(
            f"The prompt has {len(ids)} tokens; the model takes texts of at most {model.positions}, answer included.",
            hint=f"Shorten the prompt to at most {model.positions - 1} tokens.",
        )
    return ids


def write(
    model: LanguageModel,
    prompt: str,
    *,
    new_tokens: int,
    sampling: Sampling,
    on_text: Callable[[str], None] = lambda _: None,
) -> Written:
    """Write at most `new_tokens` tokens behind a prompt; `on_text` hears pieces of whole characters as they come.

    The text ends where the model has no more positions. Raises what `prompt_tokens` raises.
    """
    tokenizer, ids = model.tokenizer, prompt_tokens(model, prompt)
    room = new_tokens if model.positions is None else min(new_tokens, model.positions - len(ids))
    row = torch.tensor([ids])
    stream, times = _Pieces(tokenizer, on_text), []
    start = time.perf_counter()

    def came(tokens: list[int]) -> None:
        times.append(time.perf_counter())
        if tokens[0] not in model.ends:
            stream.put(torch.tensor(tokens))

    tail = model.continuations(row, torch.ones_like(row), room, choose=sampling.chooser(), on_tokens=came)[0]
    stream.end()
    shown = [token for token in tail if token not in model.ends]
    full = room < new_tokens and len(shown) == room
    return Written(
        prompt=prompt,
        text=str(tokenizer.decode(shown, skip_special_tokens=True)),
        tokens=tuple(tail),
        prompt_tokens=len(ids),
        first_token_s=times[0] - start,
        tokens_per_s=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        full_context=model.positions if full else None,
    )


class _Pieces(TextStreamer):
    """Text as soon as it is settled: no half character, no half word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
