"""`run`: any finished model writes text, token by token."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import TextStreamer

from sspcompile.api.verifying import dense_of
from sspcompile.checkpoint import check_manifest, locate
from sspcompile.checkpoint.locate import EMBEDDED
from sspcompile.errors import InputError
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.decoder import Chooser, TextModel
from sspcompile.model.loading import load_cut
from sspcompile.model.onnx_text import OnnxText, is_onnx, load_onnx
from sspcompile.model.text import sentences
from sspcompile.model.vocabulary import demand_rows
from sspcompile.slicing.configuration import MODELING_FILE, ships_code
from sspcompile.workspace import MASK, MODEL, Workspace

Model = TextModel | OnnxText


@dataclass(frozen=True)
class Written:
    """One text. `first_token_s`: from the prompt to the first token; `tokens_per_s` of those after it, None for one."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float | None


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


def find_model(given: str | None, workspace: Workspace, *, dense: bool) -> Path:
    """The model folder behind an artifact (by folder, by name, or the last one), an export or any model.

    With `dense`, of the model that an artifact or export was cut from. Raises ArtifactError or CheckpointError.
    """
    folder = Path(given) if given is not None else None
    if folder is not None and not (folder / MASK).is_file() and ((folder / "config.json").is_file() or is_onnx(folder)):
        return dense_of(folder, check_manifest(folder), None).checkpoint.path if dense else folder
    if given == EMBEDDED:
        return locate(None)
    artifact = workspace.find(given)
    return dense_of(artifact, check_manifest(artifact), None).checkpoint.path if dense else artifact / MODEL


def open_model(
    folder: Path, *, device: str = "cpu", trust_remote_code: bool = False, rendering: Rendering = PLAIN
) -> Model:
    """Open a model folder or an export. Code in the folder runs only when it is ours, or trusted by the user."""
    if is_onnx(folder):
        return load_onnx(folder, provider=device, rendering=rendering)
    ours = (folder / MODELING_FILE).is_file() and ships_code(folder)
    return load_cut(folder, device=device, trust_remote_code=ours or trust_remote_code, rendering=rendering)


def write(
    model: Model, prompt: str, *, new_tokens: int, sampling: Sampling, on_text: Callable[[str], None] = lambda _: None
) -> Written:
    """Write at most `new_tokens` tokens behind a prompt; `on_text` hears pieces of whole characters as they come.

    Raises InputError for an empty prompt, and what `sentences` and `demand_rows` raise.
    """
    tokenizer = model.tokenizer
    if not prompt.strip():
        raise InputError("The prompt is empty.", hint='Type --prompt "...".')
    ids = sentences(tokenizer, [prompt], sys.maxsize, model.rendering)[0].ids
    demand_rows(tokenizer, ids, model.vocab)
    row = torch.tensor([ids])
    stream, times = _Pieces(tokenizer, on_text), []
    start = time.perf_counter()

    def came(tokens: list[int]) -> None:
        times.append(time.perf_counter())
        if tokens[0] not in model.ends:
            stream.put(torch.tensor(tokens))

    tail = model.continuations(row, torch.ones_like(row), new_tokens, choose=sampling.chooser(), on_tokens=came)[0]
    stream.end()
    shown = [token for token in tail if token not in model.ends]
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
    return Written(
        prompt, tokenizer.decode(shown, skip_special_tokens=True), tuple(tail), len(ids), times[0] - start, rate
    )


class _Pieces(TextStreamer):
    """Text as soon as it is settled: no half character, no half word."""

    def __init__(self, tokenizer: object, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)
