"""Head scores of a scenario: from the domains' cached importance, from its own prompts, or from both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sspcompile.criteria import of_key
from sspcompile.errors import ScenarioError
from sspcompile.model.decoder import LoadedModel
from sspcompile.prepare.direct import importance_per_prompt
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.progress import Progress, silent, stage_of
from sspcompile.request.request import Request
from sspcompile.request.splits import own_fit_part
from sspcompile.select.mixture import Mixture, head_scores
from sspcompile.select.shrinkage import shrink

# A score of all prompts together says nothing about its own spread over prompts. This one's stands in for it: it is in
# every toolkit, and looks at the same texts.
SPREAD_OF = "fisher"

Source = Literal["domains", "prompts", "both"]


@dataclass(frozen=True)
class HeadScores:
    """`values` [L, H] in the criterion's unit. `prompts` of the scenario's own were looked at, and had `prompt_weight`
    (mean over heads, in [0, 1]) against the domains' cached scores."""

    values: np.ndarray
    source: Source
    prompts: int
    prompt_weight: float

    def as_mapping(self) -> dict[str, object]:
        return {"source": self.source, "prompts": self.prompts, "prompt_weight": round(self.prompt_weight, 6)}


def demand_prompts(request: Request) -> None:
    """Raise ScenarioError when scores are to come from prompts and the scenario has none."""
    if request.options.importance_from == "prompts" and not request.scenario.prompts:
        raise ScenarioError(
            f"--importance-from prompts needs prompts, and {request.scenario.name} has none of its own.",
            hint="Give a file of prompts, or --importance-from domains.",
        )


def score_heads(
    request: Request, used: Mixture, toolkit: Toolkit, loaded: LoadedModel, name: str, progress: Progress = silent
) -> HeadScores:
    """Score the heads for a scenario by the criterion `name`, which the toolkit holds.

    Only prompts that may choose are looked at (`own_fit_part`). Raises ScenarioError like `demand_prompts`.
    """
    demand_prompts(request)
    scenario, options = request.scenario, request.options
    cached = head_scores(toolkit, name, used)
    prompts = own_fit_part(scenario.prompts)
    if options.importance_from == "domains" or "scenario" in options.without or not prompts:
        return HeadScores(cached, "domains", 0, 0.0)
    values = importance_per_prompt(
        loaded,
        toolkit,
        name,
        prompts,
        used.parts,
        seed=options.seed,
        max_tokens=options.max_tokens,
        continuation_tokens=options.continuation_tokens,
        progress=stage_of(progress, f"{name} on the scenario's prompts"),
    )
    criterion, _ = of_key(name)
    read = min(len(prompts), criterion.max_prompts or len(prompts))
    if options.importance_from == "prompts":
        return HeadScores(values.mean(0), "prompts", read, 1.0)
    importance = toolkit.importance[name].astype(np.float64)
    spread = toolkit.spread[SPREAD_OF if criterion.per == "set" else name].astype(np.float64)
    shrunk = shrink(importance, spread, used.parts, values, prompts=read)
    return HeadScores(shrunk.scores, "both", read, float(shrunk.weight.mean()))
