"""A small model that proposes and a large one that checks: how often it is right, and what that gains.

Greedy decoding of transformers with `assistant_model` (Leviathan et al. 2023, arXiv 2211.17192) against greedy decoding
alone, text by text, in alternation in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sspcompile.intervals import Estimate, bootstrap, ratio_interval
from sspcompile.progress import Steps, no_steps

# Tokens that are proposed at a time, always as many: transformers would change the number as it goes.
PROPOSED = 5


@dataclass(frozen=True)
class DraftText:
    """One text: tokens of the prompt, how many were proposed behind it, how many of those accepted, passes of the
    large model, and the seconds of every repeat without and with the draft.
    """

    prompt_tokens: int
    proposed: int
    accepted: int
    passes: int
    plain_seconds: tuple[float, ...]
    assisted_seconds: tuple[float, ...]
    same_text: bool


@dataclass(frozen=True)
class DraftResult:
    """What a draft does for the whole model. `draft`: its share of all parameters; `new_tokens`: of every text."""

    draft: float
    device: str
    dtype: str
    threads: int
    new_tokens: int
    proposed_at_once: int
    texts: tuple[DraftText, ...]

    @property
    def acceptance(self) -> Estimate:
        """Share of proposed tokens that the whole model accepts, with an interval over texts."""
        counts = np.array([(one.accepted, one.proposed) for one in self.texts if one.proposed]).reshape(-1, 2)
        if not len(counts):
            return Estimate(0.0)
        accepted, proposed = counts.T
        interval = bootstrap(lambda rows: accepted[rows].sum(1) / proposed[rows].sum(1), len(counts), seed=0)
        return Estimate.of(float(accepted.sum() / proposed.sum()), interval)

    @property
    def speedup(self) -> Estimate:
        """Seconds without the draft by seconds with it: the geometric mean over texts, with its 99 % interval."""
        value, interval = ratio_interval(*zip(*(_medians(one) for one in self.texts), strict=True))
        return Estimate.of(value, interval)

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Without the draft, and with it; prefill included."""
        tokens = self.new_tokens * len(self.texts)
        plain, assisted = (sum(seconds) for seconds in zip(*(_medians(one) for one in self.texts), strict=True))
        return tokens / plain, tokens / assisted

    @property
    def same_texts(self) -> int:
        return sum(one.same_text for one in self.texts)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with what follows from the samples; the keys are promised to users."""
        plain, assisted = self.tokens_per_second
        return {
            "schema_version": 1,
            **asdict(self),
            "acceptance": asdict(self.acceptance),
            "speedup": asdict(self.speedup),
            "plain_tokens_per_second": plain,
            "assisted_tokens_per_second": assisted,
            "same_texts": self.same_texts,
        }


def _medians(text: DraftText) -> tuple[float, float]:
    return statistics.median(text.plain_seconds), statistics.median(text.assisted_seconds)


def measure_draft(
    model: Any, draft: Any, prompt: Sequence[int], *, new_tokens: int, repeats: int, device: torch.device
) -> DraftText:
    """Write `new_tokens` behind token ids with and without `draft`, once before it counts; no token ends a text."""
    ids = torch.tensor([list(prompt)], device=device)
    for one in (model, draft):
        one.generation_config.eos_token_id = None
    draft.generation_config.update(
        num_assistant_tokens=PROPOSED, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    plain, _ = _timed(model, ids, new_tokens)
    passes: list[int] = []

    def count(_model: Any, _args: Any, options: dict[str, Any]) -> None:
        passes.append(options["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        assisted, _ = _timed(model, ids, new_tokens, assistant_model=draft)
    finally:
        hook.remove()
    seconds = [
        (_timed(model, ids, new_tokens)[1], _timed(model, ids, new_tokens, assistant_model=draft)[1])
        for _ in range(repeats)
    ]
    # A pass reads the last token that is settled (the first pass the prompt) and what was proposed behind it, and one
    # token more than it accepts is settled.
    return DraftText(
        prompt_tokens=len(prompt),
        proposed=sum(passes) - len(prompt) - (len(passes) - 1),
        accepted=new_tokens - len(passes),
        passes=len(passes),
        plain_seconds=tuple(one for one, _ in seconds),
        assisted_seconds=tuple(other for _, other in seconds),
        same_text=bool(torch.equal(plain, assisted)),
    )


def _timed(model: Any, ids: Tensor, new_tokens: int, **options: Any) -> tuple[Tensor, float]:
    """The text as ids on the CPU, and the seconds that it took."""
    padding = model.generation_config.pad_token_id
    begun = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0 if padding is None else padding,
            **options,
        ).cpu()
    return found, time.perf_counter() - begun


def measure_drafts(
    model: Any,
    draft: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    repeats: int,
    device: torch.device,
    progress: Steps = no_steps,
) -> tuple[DraftText, ...]:
    """All texts, one behind the other."""
    found = []
    for number, prompt in enumerate(prompts):
        found.append(measure_draft(model, draft, prompt, new_tokens=new_tokens, repeats=repeats, device=device))
        progress(number + 1, len(prompts))
    return tuple(found)
