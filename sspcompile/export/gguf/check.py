"""Running what was exported in llama.cpp, before it is published, against transformers in fp32.

16-bit and rounded weights are multiplied with activations that are rounded, too, so that nothing sharp could be asked
of them. What is compared sharply is the same model in fp32, written by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sspcompile.errors import ParityError
from sspcompile.export.agreement import Agreement, Gate
from sspcompile.model.decoder import TextModel
from sspcompile.model.divergence import divergence
from sspcompile.model.exact import in_float64
from sspcompile.model.llama_session import LlamaModel
from sspcompile.model.loading import load_cut
from sspcompile.model.placement import Placement, release
from sspcompile.progress import Progress

NEW_TOKENS = 32
PROBE_TOKENS = 128
PROBES = 6
# llama.cpp's distance from float64 may be this many times transformers'.
ROUNDING_FACTOR = 4
# Words, numbers, blanks, line ends, other scripts and signs: where tokenizers differ first.
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two blanks,   three, \ttab\n\nand lines \n \n  end  ",
    "I'll say it's 12345.678e-9, 3,141,592 or 50% of $20; we'd've known. WE'LL SEE",
    "def f(x_1: int = 0) -> None:\n    return {'a': [x_1 ** 2, None]}  # done\n",
    "naïve café, Ελληνικά, русский язык, 日本語の文章, 한국어, العربية, हिन्दी",
    "emoji 👍🏽 🏳️‍🌈, maths ∑∫≠, quotes «»“”, dashes —–",
    "\r\nHTTP/1.1 200 OK\r\nContent-Type: text/html;charset=utf-8\r\n",
)


@dataclass(frozen=True)
class Run:
    """One text and its greedy continuation in transformers: token ids `ids` and `tail`, logits [T, V] of all but the
    last token."""

    ids: tuple[int, ...]
    tail: tuple[int, ...]
    expected: np.ndarray

    @property
    def read(self) -> tuple[int, ...]:
        return (*self.ids, *self.tail)[:-1]


@dataclass(frozen=True)
class Reference:
    """What transformers computes in fp32."""

    model: Path
    runs: tuple[Run, ...]
    tokens: tuple[tuple[int, ...], ...]
    placement: Placement
    trust_remote_code: bool


def read_reference(
    model: Path,
    probes: Sequence[Sequence[int]],
    positions: int,
    *,
    placement: Placement,
    trust_remote_code: bool,
    progress: Progress,
) -> Reference:
    """Run token ids `probes` and their continuations through transformers; `positions` is the longest text."""
    reference = load_cut(model, placement=placement.half(), trust_remote_code=trust_remote_code)
    new_tokens = max(1, min(NEW_TOKENS, positions // 2))
    runs = []
    for number, probe in enumerate(probes[:PROBES]):
        progress("running transformers", number, len(probes[:PROBES]))
        ids = tuple(probe[: max(1, min(PROBE_TOKENS, positions - new_tokens))])
        tail = _greedy(reference, ids, new_tokens)
        runs.append(Run(ids, tail, _logits(reference, (*ids, *tail)[:-1])))
    tokens = tuple(tuple(reference.tokenizer(text)["input_ids"]) for text in TEXTS)
    return Reference(model, tuple(runs), tokens, placement, trust_remote_code)


def _greedy(reference: TextModel, ids: Sequence[int], new_tokens: int) -> tuple[int, ...]:
    row = torch.tensor([list(ids)])
    return tuple(reference.continuations(row, torch.ones_like(row), new_tokens)[0])


def _logits(reference: TextModel, ids: Sequence[int]) -> np.ndarray:
    row = torch.tensor([list(ids)])
    return reference.scored_logits(row, torch.ones_like(row), torch.ones_like(row, dtype=torch.bool)).numpy()


def demand_tokens(path: Path, reference: Reference) -> None:
    """Raise ParityError where llama.cpp reads other tokens than transformers in one of TEXTS."""
    model = LlamaModel(path, threads=reference.placement.threads)
    try:
        for text, wanted in zip(TEXTS, reference.tokens, strict=True):
            found = model.tokens(text)
            if found != list(wanted):
                at = next((n for n, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), 0)
                raise ParityError(
                    f"llama.cpp reads other tokens than transformers in {text[:40]!r}, from the {at + 1}th on. "
                    "Nothing was published.",
                    hint="Use --format onnx, and report this with the model's tokenizer.json.",
                )
    finally:
        model.close()


def compare(path: Path, reference: Reference, gate: Gate | None, progress: Progress) -> Agreement:
    """Run the texts of the reference in llama.cpp, with a cache in fp32.

    Raises ParityError where the gate is not passed; without one only for logits that are not finite.
    """
    model = LlamaModel(path, threads=reference.placement.threads, exact=True, scoring=True)
    found, same = [], True
    try:
        for number, run in enumerate(reference.runs):
            progress("running llama.cpp", number, len(reference.runs))
            scores = _scores(model, run)
            found.append(scores)
            same &= scores[len(run.ids) - 1 :].argmax(-1).tolist() == list(run.tail)
    finally:
        model.close()
    progress("running llama.cpp", len(reference.runs), len(reference.runs))
    agreement = _agreement(reference, found, same_text=same)
    if gate is None or agreement.meets(gate):
        return agreement
    return replace(agreement, rounding=_demand_rounding(reference, found, agreement))


def _scores(model: LlamaModel, run: Run) -> np.ndarray:
    """Logits [T, V]: the text at once, and its continuation token by token."""
    model.start(run.ids, len(run.read))
    for token in run.tail[:-1]:
        model.read([token])
    return model.scores()


def _agreement(reference: Reference, found: Sequence[np.ndarray], *, same_text: bool) -> Agreement:
    expected, got = np.concatenate([run.expected for run in reference.runs]), np.concatenate(found)
    if not np.isfinite(expected).all() or not np.isfinite(got).all():
        who = "The exported file" if np.isfinite(expected).all() else "The model"
        raise ParityError(f"{who} computes infinite or undefined logits.", hint="Use --type f32.")
    prompts = np.concatenate([np.full(len(one), number) for number, one in enumerate(found)])
    distance = divergence(expected, got, prompts)
    return Agreement(
        max_difference=float(np.abs(expected - got).max()),
        logit_scale=float(np.abs(expected).max()),
        same_text=same_text,
        texts=len(reference.runs),
        padded=0,
        new_tokens=max(len(run.tail) for run in reference.runs),
        mean_kl=distance.mean_kl.value,
        top1_agreement=distance.top1_agreement.value,
    )


def _demand_rounding(reference: Reference, found: Sequence[np.ndarray], agreement: Agreement) -> float:
    """How far transformers in fp32 is from float64, in shares of the scale of logits.

    Raises ParityError unless llama.cpp is at most ROUNDING_FACTOR times as far.
    """
    release()  # the model that the reference was read from
    other = load_cut(
        reference.model,
        placement=reference.placement,
        dtype=torch.float64,
        trust_remote_code=reference.trust_remote_code,
    )
    with in_float64():
        exact = [_logits(other, run.read) for run in reference.runs]
    scale = max(np.abs(logits).max() for logits in exact)
    pairs = list(zip(reference.runs, found, exact, strict=True))
    own = max(float(np.abs(run.expected - logits).max() / scale) for run, _, logits in pairs)
    theirs = max(float(np.abs(got - logits).max() / scale) for _, got, logits in pairs)
    if theirs > ROUNDING_FACTOR * own:
        raise ParityError(
            f"In llama.cpp the exported file differs from the model by {agreement.relative:.2e} of the logit scale, "
            f"and from the model in float64 by {theirs:.2e}; transformers does by {own:.2e}, and "
            f"{ROUNDING_FACTOR} times that is allowed. Nothing was published.",
            hint="Use --format onnx, and report this with the model's config.json.",
        )
    return own
