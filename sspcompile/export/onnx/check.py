"""Running what was exported, before it is published: against transformers, alone and in a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sspcompile.errors import ParityError
from sspcompile.export.onnx.agreement import Agreement, Gate
from sspcompile.model.cache import cache_argument, cache_of
from sspcompile.model.decoder import TextModel
from sspcompile.model.divergence import divergence
from sspcompile.model.loading import load_cut
from sspcompile.model.onnx_session import OnnxModel
from sspcompile.progress import Progress

NEW_TOKENS = 32
PROBE_TOKENS = 128
PROBES = 6


def check_runs(
    folder: Path,
    model: Path,
    probes: Sequence[Sequence[int]],
    *,
    gate: Gate | None,
    trust_remote_code: bool,
    progress: Progress,
) -> Agreement:
    """Run token ids `probes` through both: each alone, and the first with the longest in one batch.

    Raises ParityError where the gate is not passed; without one only for logits that are not finite.
    """
    rows = [list(ids[:PROBE_TOKENS]) for ids in probes[:PROBES]]
    batches = [[row] for row in rows]
    if len(rows) > 1:
        batches.append([min(rows, key=len), max(rows, key=len)])
    reference = load_cut(model, trust_remote_code=trust_remote_code)
    session = OnnxModel.open(folder, spin=False)
    expected, found, prompts = [], [], []
    same = True
    for number, batch in enumerate(batches):
        progress("running", number, len(batches))
        ids, mask = padded(batch, reference.tokenizer.pad_token_id or 0)
        wanted, wanted_tokens = _transformers(reference, ids, mask)
        got, tokens = _onnx(session, ids, mask, wanted_tokens)
        same &= bool((tokens == wanted_tokens).all())
        real = np.concatenate([mask, np.ones_like(wanted_tokens)], axis=1)[:, :-1].astype(bool)
        # A graph that computes the logits of the last token alone has none of the tokens before.
        wanted, real = wanted[:, -got.shape[1] :], real[:, -got.shape[1] :]
        expected.append(wanted[real])
        found.append(got[real])
        prompts.append(np.full(int(real.sum()), number))
    progress("running", len(batches), len(batches))
    return _judged(np.concatenate(expected), np.concatenate(found), np.concatenate(prompts), same, batches, gate)


def _judged(
    expected: np.ndarray,
    found: np.ndarray,
    prompts: np.ndarray,
    same: bool,
    batches: list[list[list[int]]],
    gate: Gate | None,
) -> Agreement:
    if not np.isfinite(expected).all() or not np.isfinite(found).all():
        who = "The exported graph" if np.isfinite(expected).all() else "The model"
        raise ParityError(f"{who} computes infinite or undefined logits.", hint="Use --precision fp32.")
    distance = divergence(expected, found, prompts)
    agreement = Agreement(
        float(np.abs(expected - found).max()),
        float(np.abs(expected).max()),
        same,
        sum(map(len, batches)),
        NEW_TOKENS,
        distance.mean_kl,
        distance.top1_agreement,
    )
    if gate is not None and (agreement.relative > gate.bound or (gate.same_text and not same)):
        text, wanted = "the same text" if same else "another text", " and the same text" if gate.same_text else ""
        raise ParityError(
            f"The exported graph differs from the model by {agreement.relative:.2e} of the logit scale and generates "
            f"{text}; at most {gate.bound:g}{wanted} are allowed. Nothing was published.",
            hint="Use --precision fp32, or report this with the model's config.json.",
        )
    return agreement


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [B, S], padded on the left."""
    length = max(map(len, rows))
    ids = np.array([[pad] * (length - len(row)) + list(row) for row in rows], dtype=np.int64)
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
    return ids, mask


@torch.inference_mode()
def _transformers(reference: TextModel, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits fp32 [B, S + N - 1, V] of the text and its greedy continuation, and that continuation [B, N]."""
    seen = torch.from_numpy(mask)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)
    output = reference.model(
        input_ids=torch.from_numpy(ids), attention_mask=seen, position_ids=positions, use_cache=True
    )
    logits, tokens = [output.logits.float().numpy()], []
    for step in range(NEW_TOKENS):
        token = output.logits[:, -1:].argmax(-1)
        tokens.append(token.numpy())
        if step + 1 == NEW_TOKENS:
            break
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
    """The same from ONNX Runtime, which reads the tokens `forced` [B, N].

    Where it would have written the same at every step, the texts are the same; where not, what follows can still be
    compared.
    """
    logits, cache = session.prefill(ids, mask, capacity=ids.shape[1] + NEW_TOKENS)
    found, tokens = [logits], [logits[:, -1].argmax(-1)]
    for step in range(NEW_TOKENS - 1):
        scores = session.step(forced[:, step], cache)
        found.append(scores[:, None])
        tokens.append(scores.argmax(-1))
    return np.concatenate(found, axis=1), np.stack(tokens, axis=1)
