"""The options of a build as keyword arguments. Written by `make generated`; edit options.py instead."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict


class Keywords(TypedDict, total=False):
    """Every option of a build; `docs/options.md` says what each one does."""

    revision: str | None
    size: float | None
    keep: float | None
    strength: float | None
    max_loss: float | None
    max_perplexity: float | None
    protect: Mapping[str, float] | None
    max_params: int | str | None
    max_memory: int | str | None
    max_latency: int | str | None
    latency_runtime: Literal["torch"] | None
    context: int | None
    batch: int | None
    nested: str | Sequence[float] | None
    units: Literal["all", "heads", "layers", "attention"] | None
    layout: Literal["auto", "uniform", "per-layer"] | None
    host: str | None
    pools: str | os.PathLike[str] | None
    axes: int | None
    criterion: str | None
    granularity: Literal["head", "group"] | None
    importance_from: Literal["domains", "prompts", "auto"] | None
    repair: Literal["least-squares", "least-squares-mlp", "flap-bias", "none"] | None
    quantize: Literal["int8", "int4", "q8_0", "q4_0"] | None
    baselines: Literal["few", "all", "none"] | None
    without: Sequence[Literal["axes", "whitelist", "mixing", "scenario", "calibration"]]
    chat_template: str | None
    raw: bool | None
    max_tokens: int | None
    continuation_tokens: int | None
    seed: int | None
