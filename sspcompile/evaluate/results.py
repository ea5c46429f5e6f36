"""Outcomes of two models on the same turns, as means with paired intervals, and as the JSON of `eval`.

The unit of resampling is the conversation: turns of one conversation are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sspcompile.evaluate.asking import METRICS, Outcomes
from sspcompile.intervals import Estimate, bootstrap


@dataclass(frozen=True)
class SuiteResult:
    """One suite: metric -> mean of the dense model, of the sliced one, and of sliced - dense turn by turn.

    Intervals need five conversations. A metric that needs answers is None where no turn has any. `dropped` counts
    prompts that the artifact was fitted on.
    """

    name: str
    conversations: int
    prompts: int
    labelled: int
    dropped: int
    dense: Mapping[str, Estimate | None]
    sliced: Mapping[str, Estimate | None]
    difference: Mapping[str, Estimate | None]


def mean_over_turns(values: np.ndarray, owner: np.ndarray, *, seed: int) -> Estimate | None:
    """Mean of `values` [T] without NaN, its interval from whole conversations drawn again; None without values."""
    known = ~np.isnan(values)
    if not known.any():
        return None
    _, place = np.unique(owner[known], return_inverse=True)
    sums, counts = np.bincount(place, weights=values[known]), np.bincount(place)

    def redrawn(index: np.ndarray) -> np.ndarray:
        return sums[index].sum(1) / counts[index].sum(1)

    return Estimate.of(float(values[known].mean()), bootstrap(redrawn, len(sums), seed=seed))


def suite_result(name: str, dense: Outcomes, sliced: Outcomes, *, dropped: int, seed: int) -> SuiteResult:
    """Summarise one suite."""

    def means(values: Mapping[str, np.ndarray]) -> dict[str, Estimate | None]:
        return {metric: mean_over_turns(values[metric], dense.owner, seed=seed) for metric in METRICS}

    return SuiteResult(
        name=name,
        conversations=len(np.unique(dense.owner)),
        prompts=len(dense.owner),
        labelled=int((~np.isnan(dense.values["exact_match"])).sum()),
        dropped=dropped,
        dense=means(dense.values),
        sliced=means(sliced.values),
        difference=means({metric: sliced.values[metric] - dense.values[metric] for metric in METRICS}),
    )


def results_json(results: Sequence[SuiteResult], facts: Mapping[str, Any]) -> dict[str, Any]:
    """`suites` by name; the first of them once more at the top level."""
    suites = {
        result.name: {
            "conversations": result.conversations,
            "prompts": result.prompts,
            "labelled": result.labelled,
            "dropped": result.dropped,
            "dense": _figures(result.dense),
            "sliced": _figures(result.sliced),
            "difference": _figures(result.difference),
        }
        for result in results
    }
    first = suites[results[0].name]
    top = {key: first[key] for key in ("dense", "sliced", "difference")}
    return {**facts, "suite": results[0].name, **top, "suites": suites}


def _figures(means: Mapping[str, Estimate | None]) -> dict[str, Any]:
    """`exact_match` and `exact_match_interval` ([low, high]) and so on; null where nothing was measured."""
    found: dict[str, Any] = {}
    for metric, mean in means.items():
        found[metric] = None if mean is None else mean.value
        found[f"{metric}_interval"] = None if mean is None or mean.low is None else [mean.low, mean.high]
    return found
