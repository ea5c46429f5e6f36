"""Running what was exported, before it is published: against transformers, alone and in a padded batch.

Two right computations of a model differ by rounding, and how much that is belongs to the model: 4e-6 of the scale of
the logits for SmolLM2-135M in fp32, thousandths for one that is noisier. A token may change with it where the model
scores two alike. So an export that is further from transformers than most is compared in another way: with the model
in float64, from which transformers in the graph's own precision has its distance, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sspcompile.errors import ParityError
from sspcompile.export.agreement import Agreement, Gate
from sspcompile.model.cache import cache_argument, cache_of
from sspcompile.model.decoder import TextModel
from sspcompile.model.divergence import divergence
from sspcompile.model.exact import in_float64
from sspcompile.model.loading import load_cut
from sspcompile.model.onnx_session import OnnxModel
from sspcompile.model.placement import Placement, release
from sspcompile.model.vocabulary import padding_id
from sspcompile.progress import Progress

NEW_TOKENS = 32
PROBE_TOKENS = 128
PROBES = 6
# ONNX Runtime was 0.5 to 1.8 times as far from float64 as transformers, in 34 pairs of random models of every family
# and SmolLM2-135M, fp32 and fp16, quiet and noisy.
ROUNDING_FACTOR = 4
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16}


@dataclass(frozen=True)
class _Run:
    """One batch through both: token ids and mask [B, S], the continuation `tokens` [B, N] that both were given.

    `real` [B, K] marks what is not padding among the last K positions, those that the graph has logits of; `expected`
    and `found` are the logits of transformers in fp32 and of the graph there, [positions, V].
    """

    ids: np.ndarray
    mask: np.ndarray
    tokens: np.ndarray
    real: np.ndarray
    expected: np.ndarray
    found: np.ndarray
    same_text: bool


def check_runs(
    folder: Path,
    model: Path,
    probes: Sequence[Sequence[int]],
    *,
    gate: Gate | None,
    positions: int,
    dtype: str,
    trust_remote_code: bool,
    placement: Placement,
    progress: Progress,
    size: float | None = None,
) -> Agreement:
    """Run token ids `probes` through both: each alone, and the shortest with the longest in one batch. Of a nested
    model and its export, that `size`.

    `positions`, at least 2, is the longest text of the graph: a probe and its continuation are shortened to fit.
    `dtype` is that of the graph's activations. Raises ParityError where the gate is not passed; without one only for
    logits that are not finite.
    """
    new_tokens = min(NEW_TOKENS, positions // 2)
    batches = _batches([list(ids[: min(PROBE_TOKENS, positions - new_tokens)]) for ids in probes[:PROBES]])
    load = partial(_loaded, model, size, trust_remote_code=trust_remote_code)
    reference = load(placement=placement.half())
    padding = padding_id(reference.tokenizer, reference.vocab)
    session = OnnxModel.open(folder, size=size, threads=placement.threads)
    runs = []
    for number, batch in enumerate(batches):
        progress("running", number, len(batches))
        runs.append(_run(reference, session, *padded(batch, padding), new_tokens))
    progress("running", len(batches), len(batches))
    agreement = _agreement(runs)
    if gate is None or agreement.meets(gate):
        return agreement
    del reference, session  # the model in float64 takes their place in memory
    progress("measuring rounding", 0, 1)
    rounding = _demand_rounding(load, runs, agreement, dtype, placement)
    progress("measuring rounding", 1, 1)
    return replace(agreement, rounding=rounding)


def _loaded(model: Path, size: float | None, **options: Any) -> TextModel:
    found: TextModel = load_cut(model, **options)
    switched: Any = found.model  # of a nested model: the one that travels in its folder
    if size is not None:
        switched.set_size(size)
    return found


def _batches(rows: list[list[int]]) -> list[list[list[int]]]:
    """Every row alone, and two of different lengths together."""
    shortest, longest = min(rows, key=len), max(rows, key=len)
    if len(shortest) == len(longest):
        shortest = longest[: (len(longest) + 1) // 2]
    pair = [[shortest, longest]] if len(shortest) < len(longest) else []
    return [[row] for row in rows] + pair


def _run(reference: TextModel, session: OnnxModel, ids: np.ndarray, mask: np.ndarray, new_tokens: int) -> _Run:
    wanted, tokens = _transformers(reference, ids, mask, new_tokens)
    got, found_tokens = _onnx(session, ids, mask, tokens)
    real = np.concatenate([mask, np.ones_like(tokens)], axis=1)[:, :-1].astype(bool)
    # A graph that computes the logits of the last token alone has none of the tokens before.
    wanted, real = wanted[:, -got.shape[1] :], real[:, -got.shape[1] :]
    return _Run(ids, mask, tokens, real, wanted[real], got[real], bool((found_tokens == tokens).all()))


def _agreement(runs: Sequence[_Run]) -> Agreement:
    expected, found = (np.concatenate([getattr(run, name) for run in runs]) for name in ("expected", "found"))
    if not np.isfinite(expected).all() or not np.isfinite(found).all():
        who = "The exported graph" if np.isfinite(expected).all() else "The model"
        raise ParityError(f"{who} computes infinite or undefined logits.", hint="Use --precision fp32.")
    prompts = np.concatenate([np.full(len(run.found), number) for number, run in enumerate(runs)])
    distance = divergence(expected, found, prompts)
    return Agreement(
        max_difference=float(np.abs(expected - found).max()),
        logit_scale=float(np.abs(expected).max()),
        same_text=all(run.same_text for run in runs),
        texts=sum(len(run.ids) for run in runs),
        padded=sum(len(run.ids) > 1 for run in runs),
        new_tokens=runs[0].tokens.shape[1],
        mean_kl=distance.mean_kl.value,
        top1_agreement=distance.top1_agreement.value,
    )


def _demand_rounding(
    load: Callable[..., TextModel], runs: Sequence[_Run], agreement: Agreement, dtype: str, placement: Placement
) -> float:
    """How far transformers in `dtype` is from float64, in shares of the scale of logits.

    Raises ParityError unless the graph is at most ROUNDING_FACTOR times as far, which leaves its tokens to differ only
    where the model scores two as closely, or when rounding is so large that nothing could be told.
    """
    exact = _forced(load, runs, torch.float64, placement)
    rounded = [run.expected for run in runs]
    if TORCH_DTYPES[dtype] != torch.float32:
        rounded = _forced(load, runs, TORCH_DTYPES[dtype], placement)
    scale = max(np.abs(logits).max() for logits in exact)
    own = max(float(np.abs(one - other).max() / scale) for one, other in zip(rounded, exact, strict=True))
    graph = max(float(np.abs(run.found - other).max() / scale) for run, other in zip(runs, exact, strict=True))
    name = dtype.replace("F", "fp")
    if not ROUNDING_FACTOR * own < 1:  # not a number included
        raise ParityError(
            f"In {name} this model's logits are {own:.0%} of their scale away from float64, so it cannot be told "
            "whether the exported graph is right. Nothing was published.",
            hint="Use --precision fp32, or another model.",
        )
    if graph > ROUNDING_FACTOR * own:
        raise ParityError(
            f"The exported graph differs from the model by {agreement.relative:.2e} of the logit scale, and from the "
            f"model in float64 by {graph:.2e}; transformers in {name} does by {own:.2e}, and {ROUNDING_FACTOR} times "
            "that is allowed. Nothing was published.",
            hint="Use --precision fp32, or report this with the model's config.json.",
        )
    return own


def _forced(
    load: Callable[..., TextModel], runs: Sequence[_Run], dtype: torch.dtype, placement: Placement
) -> list[np.ndarray]:
    """Logits of transformers in `dtype` at the positions of `expected`, which read the same tokens."""
    release()  # the model before
    other = load(placement=placement, dtype=dtype)
    with in_float64() if dtype == torch.float64 else contextlib.nullcontext():
        found = [_transformers(other, run.ids, run.mask, run.tokens.shape[1], run.tokens)[0] for run in runs]
    return [logits[:, -run.real.shape[1] :][run.real] for logits, run in zip(found, runs, strict=True)]


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [B, S], padded on the left."""
    length = max(map(len, rows))
    ids = np.array([[pad] * (length - len(row)) + list(row) for row in rows], dtype=np.int64)
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
    return ids, mask


@torch.inference_mode()
def _transformers(
    reference: TextModel, ids: np.ndarray, mask: np.ndarray, new_tokens: int, forced: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, S + N - 1, V] of the text and its continuation, greedy or `forced`, and the greedy tokens [B, N].

    In fp32, or in float64 inside `in_float64`.
    """
    seen = torch.from_numpy(mask)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    output = reference.model(
        input_ids=torch.from_numpy(ids), attention_mask=seen, position_ids=positions, use_cache=True
    )
    logits, tokens = [output.logits.float().numpy()], []
    for step in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(token.numpy())
        if step + 1 == new_tokens:
            break
        if forced is not None:
            token = torch.from_numpy(forced[:, step : step + 1])
        seen = torch.cat([seen, torch.ones_like(token)], dim=1)
        output = reference.model(
            input_ids=token,
            attention_mask=seen,
            position_ids=seen.sum(-1, keepdim=True) - 1,
            use_cache=True,
            **{cache_argument(reference.model): cache_of(output)},
        )
        logits.append(output.logits.float().numpy())
    return np.concatenate(logits, axis=1), np.concatenate(tokens, axis=1)


def _onnx(session: OnnxModel, ids: np.ndarray, mask: np.ndarray, forced: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same from ONNX Runtime. It reads the tokens `forced` [B, N], whatever it would have written itself.

    The texts are the same where it would have written the same at every step. What follows a difference can still be
    compared.
    """
    new_tokens = forced.shape[1]
    logits, cache = session.prefill(ids, mask, capacity=ids.shape[1] + new_tokens)
    found, tokens = [logits], [logits[:, -1].argmax(-1)]
    for step in range(new_tokens - 1):
        scores = session.step(forced[:, step], cache)
        found.append(scores[:, None])
        tokens.append(scores.argmax(-1))
    return np.concatenate(found, axis=1), np.stack(tokens, axis=1)
