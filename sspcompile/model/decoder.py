"""A decoder in memory, with its tokenizer: logits at given positions, and text that goes on from a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sspcompile.families import FAMILIES, Geometry, positions_of
from sspcompile.model.cache import cache_argument, cache_of
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.vocabulary import ends_of
from sspcompile.model.weights import computing_device, input_device, present, tensor_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Chooser = Callable[[Tensor], Tensor]
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# Of lm_head, that are widened at a time: 64 MiB in fp32 at a hidden size of 4096.
ROWS_AT_ONCE = 4096


class LanguageModel(Protocol):
    """What can be asked: a decoder in transformers, or an export in ONNX Runtime. `TextModel` describes the parts."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def rendering(self) -> Rendering: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def vocab(self) -> int: ...
    @property
    def positions(self) -> int | None: ...
    @property
    def ends(self) -> frozenset[int]: ...

    def scored_logits(self, input_ids: Tensor, attention_mask: Tensor, score_mask: Tensor) -> Tensor: ...

    def continuations(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        new_tokens: int,
        *,
        choose: Chooser | None = None,
        on_tokens: Callable[[list[int]], None] = ...,
    ) -> list[list[int]]: ...


@dataclass(frozen=True)
class TextModel:
    """Any decoder ready to run, dense or cut: evaluation mode, no gradients, with its tokenizer.

    `rendering` says how its prompts become text.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering = field(default=PLAIN, kw_only=True)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @property
    def vocab(self) -> int:
        """Width of the logits."""
        return self.model.config.vocab_size

    @property
    def positions(self) -> int | None:
        """The longest text that it was made for, in tokens; None where its configuration does not say."""
        return positions_of(self.model.config.to_dict())

    @property
    def ends(self) -> frozenset[int]:
        """Every token id that ends a sequence."""
        declared = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return ends_of(declared, self.tokenizer, self.vocab)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in fp32 of the decoder's normalised output [..., d].

        Granite divides them by a constant and Gemma 2 bends them towards a bound, both behind lm_head.
        """
        config = self.model.config
        family = FAMILIES[config.model_type]
        logits = _headed(self.model.lm_head, hidden)
        if family.scales_logits:
            logits = logits / config.logits_scaling
        # A class that does not know the key has it as an attribute nevertheless, where config.json has it.
        cap = config.final_logit_softcapping if family.caps_logits else None
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.inference_mode()
    def scored_logits(self, input_ids: Tensor, attention_mask: Tensor, score_mask: Tensor) -> Tensor:
        """Logits [S, V] in fp32 at the positions that `score_mask` (bool [B, T]) marks, row after row."""
        hidden = self.model.model(
            input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device), use_cache=False
        ).last_hidden_state
        return self.logits_of(hidden[score_mask.to(hidden.device)]).to(self.device)

    @torch.inference_mode()
    def continuations(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        new_tokens: int,
        *,
        choose: Chooser | None = None,
        on_tokens: Callable[[list[int]], None] = lambda _: None,
    ) -> list[list[int]]:
        """At most `new_tokens` tokens behind every row of [B, T], which is padded on the left; end tokens included.

        Decoded with a cache, by argmax or by `choose` (logits fp32 [B, V] -> tokens [B]); `on_tokens` hears every step.
        `generate` is avoided: it adopts the checkpoint's repetition penalty.
        """
        ids, mask = input_ids.to(self.device), attention_mask.to(self.device)
        positions, cache, cache_name = (mask.cumsum(-1) - 1).clamp(min=0), None, cache_argument(self.model)
        rows = Rows(len(ids), self.ends)
        for _ in range(new_tokens):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{cache_name: cache},
            )
            cache, scores = cache_of(output), output.logits[:, -1]
            tokens = scores.argmax(-1) if choose is None else choose(scores.float().cpu()).to(self.device)
            on_tokens(tokens.tolist())
            if rows.ended(tokens.tolist()):
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return rows.tails


class Rows:
    """What is written behind every row of a batch, until each has had one of `ends`."""

    def __init__(self, count: int, ends: frozenset[int]) -> None:
        self.tails: list[list[int]] = [[] for _ in range(count)]
        self._ends = ends
        self._running = [True] * count

    def ended(self, tokens: Sequence[int]) -> bool:
        """Take one token per row; whether no row is running any more."""
        for row, token in enumerate(tokens):
            if self._running[row]:
                self.tails[row].append(token)
                self._running[row] = token not in self._ends
        return not any(self._running)


@dataclass(frozen=True)
class LoadedModel(TextModel):
    """A dense decoder ready to run, with what is known of it."""

    geometry: Geometry
    path: Path
    fingerprint: str

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.model.model.layers

    @property
    def vocab(self) -> int:
        return self.geometry.vocab


def _headed(head: nn.Linear, hidden: Tensor) -> Tensor:
    """What lm_head makes of `hidden`, [..., V] in fp32.

    Of a model in 16 bits the module itself would round them: bf16 numbers from 8 to 16 lie .0625 apart, so that tokens
    that were merely close tie, and the first in the vocabulary wins. Where a gradient is asked for that is put up with,
    because the products would hold the whole weight in fp32.
    """
    if head.weight.dtype not in SIXTEEN_BITS or hidden.requires_grad:
        return head(hidden).float()
    device, bias = computing_device(head), tensor_of(head, "bias")
    wide = hidden.to(device, torch.float32)
    with present(head) as weight:
        logits = wide.new_empty(*hidden.shape[:-1], len(weight))
        for start in range(0, len(weight), ROWS_AT_ONCE):
            rows = weight[start : start + ROWS_AT_ONCE].to(device, torch.float32)
            logits[..., start : start + len(rows)] = linear(wide, rows)
    return logits if bias is None else logits + bias.to(device)
