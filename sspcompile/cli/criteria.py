"""`sspcompile criteria`: the head scores that `--criterion` takes."""

from __future__ import annotations

import json
from typing import Any

import click

from sspcompile.cli.options import json_option
from sspcompile.criteria import CRITERIA, Criterion

# The attention of a model of about 7 B parameters, 32 layers of 32 heads.
EXAMPLE_HEADS = 1024


@click.command(
    short_help="List the head scores that --criterion takes.", epilog="\b\nExample:\n  sspcompile criteria --json"
)
@json_option
def criteria(as_json: bool) -> None:
    """List the head scores that --criterion takes: what they are, where they come from, what they cost.

    Costs are passes through the model over the prompts of a domain. Without --criterion a build measures obs, on texts
    like the scenario's, and channels of the MLPs in the same pass; by a score that is named heads are cut alone.
    """
    if as_json:
        click.echo(json.dumps([facts(entry) for entry in CRITERIA.values()], indent=1))
        return
    from sspcompile.cli.tables import print_criteria

    print_criteria(CRITERIA.values())


def facts(entry: Criterion) -> dict[str, Any]:
    """One entry as JSON; `passes_per_prompt` is an example, for a model of EXAMPLE_HEADS heads in all."""
    passes = entry.passes(EXAMPLE_HEADS, 1)
    return {
        "name": entry.name,
        "summary": entry.summary,
        "source": entry.source,
        "adaptation": entry.adaptation,
        "needs": entry.needs,
        "cost": entry.cost,
        "per": entry.per,
        "max_prompts": entry.max_prompts,
        "passes_per_prompt": {"heads": EXAMPLE_HEADS, "forward": passes.forward, "backward": passes.backward},
    }
