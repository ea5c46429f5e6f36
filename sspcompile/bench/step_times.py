"""The time of one decoding step of transformers models that take turns, each with a cache that is full already."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sspcompile.model.cache import cache_argument, cache_of
from sspcompile.model.opening import open_model, readable
from sspcompile.model.placement import Place
from sspcompile.progress import Progress, silent
from sspcompile.slicing.measures import Serving

# Rounds that count, behind one that warms up. In each, a model decodes a token that does not count and STEPS that do.
ROUNDS, STEPS = 7, 3


def step_rounds(
    models: Sequence[Any], serving: Serving, device: torch.device, progress: Progress = silent, stage: str = "timing"
) -> list[tuple[float, ...]]:
    """Seconds of a step, [models][ROUNDS]: in every round each model once, in an order that is turned."""
    found: list[list[float]] = [[] for _ in models]
    total = (1 + ROUNDS) * len(models)
    for number in range(1 + ROUNDS):
        order = [*range(len(models))]
        for index in reversed(order) if number % 2 else order:
            progress(stage, sum(map(len, found)), total)
            found[index].append(step_seconds(models[index], serving, device))
    progress(stage, total, total)
    return [tuple(rounds[1:]) for rounds in found]


@torch.inference_mode()
def step_seconds(model: Any, serving: Serving, device: torch.device) -> float:
    """Seconds in which a model decodes a token for each of `serving.batch` sequences, `serving.context` tokens of each
    in its cache; the median of STEPS.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (serving.batch, 2 + STEPS), generator=generator).to(device)
    cache = cache_of(model(input_ids=ids[:, :1], use_cache=True))
    for number, layer in enumerate(cache.layers):
        if not layer.is_initialized:  # there are as many places as layers, and some may have no attention
            continue
        # What is cached changes no time. Written by the model it would take a pass over the whole context.
        batch, groups, _, size = layer.keys.shape
        rest = layer.keys.new_zeros(batch, groups, serving.context - 1, size)
        cache.update(rest, rest, number)
    kept = {cache_argument(model): cache, "use_cache": True}
    steps = []
    for at in range(1 + STEPS):
        start = time.perf_counter()
        out = model(input_ids=ids[:, 1 + at : 2 + at], **kept)
        out.logits[:, -1].argmax(-1).tolist()  # waits for the device
        steps.append(time.perf_counter() - start)
    return median(steps[1:])


def folder_rounds(
    folders: Sequence[tuple[Path, bool]], place: Place, serving: Serving, progress: Progress = silent, stage: str = ""
) -> list[tuple[float, ...]]:
    """`step_rounds` of model folders, all of them in memory at once; each with whether it may run the code that it
    ships. Raises CheckpointError for one that transformers cannot load.
    """
    models = []
    for path, trust in folders:
        with readable(path):
            model: Any = open_model(path, dtype=place.dtype, trust_remote_code=trust, local_files_only=True)
        models.append(model.requires_grad_(False).eval().to(place.device))
    return step_rounds(models, serving, place.device, progress, stage)
