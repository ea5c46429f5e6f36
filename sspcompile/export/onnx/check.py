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
from sspcompile.model.divergence import Divergence, divergence
from sspcompile.model.loading import load_cut
from sspcompile.model.onnx_session import OnnxModel
from sspcompile.model.vocabulary import padding_id
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
    positions: int,
    trust_remote_code: bool,
    progress: Progress,
) -> Agreement:
    """Run token ids `probes` through both: each alone, and the shortest with the longest in one batch.

    `positions`, at least 2, is the longest text of the graph: a probe and its continuation are shortened to fit. Raises
    ParityError where the gate is not passed; without one only for logits that are not finite.
    """
    new_tokens = min(NEW_TOKENS, positions // 2)
    batches = _batches([list(ids[: min(PROBE_TOKENS, positions - new_tokens)]) for ids in probes[:PROBES]])
    reference = load_cut(model, trust_remote_code=trust_remote_code)
    session = OnnxModel.open(folder, spin=False)
    expected, found, prompts = [], [], []
    same = True
    for number, batch in enumerate(batches):
        progress("running", number, len(batches))
        ids, mask = padded(batch, padding_id(reference.tokenizer, reference.vocab))
        wanted, wanted_tokens = _transformers(reference, ids, mask, new_tokens)
        got, tokens = _onnx(session, ids, mask, wanted_tokens)
        same &= bool((tokens == wanted_tokens).all())
        real = np.concatenate([mask, np.ones_like(wanted_tokens)], axis=1)[:, :-1].astype(bool)
        # A graph that computes the logits of the last token alone has none of the tokens before.
        wanted, real = wanted[:, -got.shape[1] :], real[:, -got.shape[1] :]
        expected.append(wanted[real])
        found.append(got[real])
        prompts.append(np.full(int(real.sum()), number))
    progress("running", len(batches), len(batches))
    logits = np.concatenate(expected), np.concatenate(found)
    distance = _divergence(*logits, np.concatenate(prompts))
    agreement = Agreement(
        max_difference=float(np.abs(logits[0] - logits[1]).max()),
        logit_scale=float(np.abs(logits[0]).max()),
        same_text=same,
        texts=sum(map(len, batches)),
        padded=sum(len(batch) > 1 for batch in batches),
        new_tokens=new_tokens,
        mean_kl=distance.mean_kl.value,
        top1_agreement=distance.top1_agreement.value,
    )
    if gate is not None:
        _demand(agreement, gate)
    return agreement


def _batches(rows: list[list[int]]) -> list[list[list[int]]]:
    """Every row alone, and two of different lengths together."""
    shortest, longest = min(rows, key=len), max(rows, key=len)
    if len(shortest) == len(longest):
        shortest = longest[: (len(longest) + 1) // 2]
    pair = [[shortest, longest]] if len(shortest) < len(longest) else []
    return [[row] for row in rows] + pair


def _divergence(expected: np.ndarray, found: np.ndarray, prompts: np.ndarray) -> Divergence:
    """Of logits [N, V] at the same places of the texts `prompts` [N]. Raises ParityError for infinite ones."""
    if not np.isfinite(expected).all() or not np.isfinite(found).all():
        who = "The exported graph" if np.isfinite(expected).all() else "The model"
        raise ParityError(f"{who} computes infinite or undefined logits.", hint="Use --precision fp32.")
    return divergence(expected, found, prompts)


def _demand(agreement: Agreement, gate: Gate) -> None:
    if agreement.relative > gate.bound or (gate.same_text and not agreement.same_text):
        text = "the same text" if agreement.same_text else "another text"
        wanted = " and the same text" if gate.same_text else ""
        raise ParityError(
            f"The exported graph differs from the model by {agreement.relative:.2e} of the logit scale and generates "
            f"{text}; at most {gate.bound:g}{wanted} are allowed. Nothing was published.",
            hint="Use --precision fp32, or report this with the model's config.json.",
        )


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [B, S], padded on the left."""
    length = max(map(len, rows))
    ids = np.array([[pad] * (length - len(row)) + list(row) for row in rows], dtype=np.int64)
    mask = np.array([[0] * (length - len(row)) + [1] * len(row) for row in rows], dtype=np.int64)
    return ids, mask


@torch.inference_mode()
def _transformers(
    reference: TextModel, ids: np.ndarray, mask: np.ndarray, new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits fp32 [B, S + N - 1, V] of the text and its greedy continuation, and that continuation [B, N]."""
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
