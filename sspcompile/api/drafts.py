"""`bench` of a nested artifact: its smallest member as a draft for the whole model, over the same weights."""

from __future__ import annotations

import json
from typing import Any

import torch

from sspcompile.api.arguments import Named
from sspcompile.bench.drafting import PROPOSED, DraftResult, measure_drafts
from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import InputError
from sspcompile.model.chat import PLAIN, Rendering
from sspcompile.model.context import shortest_context
from sspcompile.model.decoder import TextModel
from sspcompile.model.loading import load_cut
from sspcompile.model.placement import ANYWHERE, Placement
from sspcompile.model.weights import input_device
from sspcompile.nested.files import demand_class
from sspcompile.nested.index import read_nested
from sspcompile.progress import Progress, silent, stage_of
from sspcompile.repair.repair import refitted_dtype
from sspcompile.workspace import PROBES

NEW_TOKENS, REPEATS = 64, 3
QUICK = 16, 1


def load_nested(
    found: Named, *, placement: Placement = ANYWHERE, dtype: torch.dtype | None = None, rendering: Rendering = PLAIN
) -> TextModel:
    """All sizes in memory, by the class that travels in the folder; `dtype` overrules that of the placement.

    Raises InputError for a placement that spreads a model, and ArtifactError for a class that is not ours.
    """
    if placement.device_map is not None or placement.memory is not None:
        raise InputError(
            "A nested model has to be in memory as a whole, so --device-map and --memory do not go with it.",
            hint="Leave them out, or cut a member out with `sspcompile slice --from`.",
        )
    demand_class(found.model)
    return load_cut(found.model, placement=placement, dtype=dtype, trust_remote_code=True, rendering=rendering)


def bench_drafts(
    found: Named,
    *,
    quick: bool = False,
    new_tokens: int | None = None,
    repeats: int | None = None,
    placement: Placement = ANYWHERE,
    progress: Progress = silent,
) -> DraftResult:
    """Decode behind the texts that prove the artifact (of the scenario, and they decided nothing), with the draft and
    without. Numbers are those that the model is stored in unless the placement says otherwise.

    Raises what `load_nested` raises, and InputError for more tokens than the model reads.
    """
    share = read_nested(found.folder).members[-1].share
    dtype = refitted_dtype(Checkpoint(found.model)) if placement.dtype == ANYWHERE.dtype else None
    model: Any = load_nested(found, placement=placement, dtype=dtype).model
    usual = QUICK if quick else (NEW_TOKENS, REPEATS)
    new_tokens, repeats = new_tokens or usual[0], repeats or usual[1]
    prompts = json.loads((found.folder / PROBES).read_text("utf-8"))["probes"]
    longest = shortest_context([found.model])
    if longest is not None:
        if new_tokens >= longest:
            raise InputError(f"The model reads {longest:,} tokens in all.", hint="Give fewer --new-tokens.")
        prompts = [prompt[-(longest - new_tokens) :] for prompt in prompts]
    texts = measure_drafts(
        model,
        model.at(share),
        prompts,
        new_tokens=new_tokens,
        repeats=repeats,
        device=input_device(model),
        progress=stage_of(progress, "drafting"),
    )
    device, kind = str(input_device(model)), str(model.dtype).removeprefix("torch.")
    return DraftResult(share, device, kind, torch.get_num_threads(), new_tokens, PROPOSED, texts)
