"""Importance of every head, measured on given prompts. The scores themselves are in `sspcompile.criteria`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sspcompile.criteria import measuring
from sspcompile.criteria.table import criterion
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.text import CONTINUATION_TOKENS, MAX_TOKENS, continued
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Steps, no_steps
from sspcompile.request.options import Granularity


def importance_of(
    loaded: LoadedModel,
    name: str,
    prompts: Sequence[str],
    *,
    toolkit: Toolkit | None = None,
    mixture: np.ndarray | None = None,
    seed: int = 0,
    granularity: Granularity = "head",
    max_tokens: int = MAX_TOKENS,
    continuation_tokens: int = CONTINUATION_TOKENS,
    progress: Steps = no_steps,
) -> np.ndarray:
    """Importance of every head measured directly on these prompts, [L, H] float64: all of them are used.

    The `subspace` criteria need `toolkit` for its probe directions; their per-domain values are combined with
    `mixture` [K] (equal parts without one). Raises InputError for an unknown name or a missing toolkit.
    """
    criterion(name)  # before the continuations are written
    directions = None if toolkit is None else toolkit.directions
    scores = measuring.measure(
        loaded,
        name,
        continued(loaded, prompts, continuation_tokens, max_tokens),
        directions=directions,
        seed=seed,
        granularity=granularity,
        every_prompt=True,
        progress=progress,
    )
    values = scores.values.mean(0)
    if values.ndim == 2:
        return values
    parts = np.full(values.shape[-1], 1.0 / values.shape[-1]) if mixture is None else np.asarray(mixture)
    return values @ parts
