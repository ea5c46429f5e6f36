"""Masks judged on held-out texts: each candidate as the masked model, plain and repaired, against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sspcompile.compile.layouts import Choice
from sspcompile.compile.mask import Layout
from sspcompile.loaded import LoadedModel, head_gates
from sspcompile.measure.quality import Difference, Divergence, DivergenceAccumulator, compare_divergences
from sspcompile.pipeline.evidence import Evidence
from sspcompile.prepare.text import Batch, with_continuations
from sspcompile.slicing.repair import MIN_PROMPTS, Repair, fit_repair, repaired

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Candidate:
    """One layout's mask: judged plain and, where a repair was fitted, repaired."""

    layout: Layout
    choice: Choice
    plain: Divergence
    repair: Repair | None
    mended: Divergence | None

    @property
    def keeps_repair(self) -> bool:
        """A repair stays only when it does not make the held-out texts worse."""
        return self.mended is not None and self.mended.mean_kl <= self.plain.mean_kl

    @property
    def final(self) -> Divergence:
        return self.mended if self.mended is not None and self.keeps_repair else self.plain

    @property
    def final_repair(self) -> Repair | None:
        return self.repair if self.keeps_repair else None


class Judge:
    """Holds the texts as batches and the dense model's logits at the scored held-out positions.

    `repair` asks for a least-squares repair of every candidate (with too few texts there is none); `dtype` is the one
    in which repaired weights will be written.
    """

    def __init__(
        self, loaded: LoadedModel, evidence: Evidence, *, max_tokens: int, new_tokens: int, seed: int, repair: bool,
        dtype: torch.dtype, progress: Progress,
    ) -> None:
        self.loaded = loaded
        self.evidence = evidence
        self.seed = seed
        self.repairs = repair and len(evidence.fit) >= MIN_PROMPTS
        self.dtype = dtype
        self.progress = progress
        self.fit = with_continuations(loaded, evidence.fit, new_tokens, max_tokens)
        self.held = with_continuations(loaded, evidence.held, new_tokens, max_tokens)
        self._dense = [_logits(loaded, batch) for batch in self.held]

    def divergence(self, kept: np.ndarray, repair: Repair | None = None) -> Divergence:
        """Of the masked model, `kept` bool [layers, heads], from the dense one on the held-out texts."""
        gates = torch.from_numpy(kept).float().to(self.loaded.device)
        collected = DivergenceAccumulator()
        with head_gates(self.loaded, gates), repaired(self.loaded, repair):
            for batch, dense in zip(self.held, self._dense, strict=True):
                owner = torch.tensor(batch.rows)[batch.score_mask.nonzero()[:, 0].cpu()]
                collected.add(dense, _logits(self.loaded, batch), owner)
        return collected.result(seed=self.seed)

    def candidate(self, layout: Layout, choice: Choice, *, name: str | None = None) -> Candidate:
        """Judge one choice, and once more with a repair when repairs are on and something was cut."""
        plain = self.divergence(choice.kept)
        if not self.repairs or choice.kept.all():
            return Candidate(layout, choice, plain, None, None)
        fitted = fit_repair(
            self.loaded, choice.kept, self.fit, dtype=self.dtype,
            progress=lambda done, total: self.progress(f"repair ({name or layout})", done, total),
        )
        return Candidate(layout, choice, plain, fitted, self.divergence(choice.kept, fitted))


@torch.inference_mode()
def _logits(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Logits at the scored positions, [S, V] fp32 on the CPU."""
    hidden = loaded.model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    return loaded.model.lm_head(hidden[batch.score_mask]).float().cpu()


@dataclass(frozen=True)
class Decision:
    """The chosen candidate, all candidates, and what the uniform layout costs (None when only one was asked for)."""

    chosen: Candidate
    candidates: Mapping[Layout, Candidate]
    uniform_cost: Difference | None


def decide(candidates: Mapping[Layout, Candidate]) -> Decision:
    """Uniform where it costs nothing measurable on the held-out texts, per-layer otherwise."""
    if len(candidates) == 1:
        return Decision(next(iter(candidates.values())), candidates, None)
    uniform, per_layer = candidates["uniform"], candidates["per-layer"]
    cost = compare_divergences(uniform.final, per_layer.final)
    dearer = cost.mean > 0 and (cost.measurable or cost.interval is None)
    return Decision(per_layer if dearer else uniform, candidates, cost)
