"""`sspcompile eval`: answers and divergence of an artifact against its dense model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from sspcompile.cli.options import (
    PLACE,
    build_option,
    json_option,
    placement_in,
    placement_options,
    quiet_option,
    refuse_given,
    scenario_option,
    workspace,
)
from sspcompile.request.rounding import Rounded

if TYPE_CHECKING:
    from sspcompile.evaluate.harness import HarnessRow
    from sspcompile.model.placement import Placement

# What says which texts are asked, and how. The harness counts its own by --items.
APART = ("scenario", "data", "max_new_tokens", "max_tokens", "chat_template", "raw")
OF_SUITES = (*APART, "items", "tasks")


@click.command(
    "eval",
    short_help="Check answers and divergence of an artifact against its dense model.",
    epilog="""\b
Examples:
  sspcompile eval
  sspcompile eval artifacts/chemistry-helpdesk --data questions.jsonl --max-new-tokens 64
  sspcompile eval exported/chemistry-helpdesk-hf --scenario chemistry-helpdesk --json
  sspcompile eval ./cut-model --against ./dense-model --data XDomainBench/scenarios
  sspcompile eval --lm-eval arc_easy,hellaswag --items 200
  sspcompile eval artifacts/support-desk --quantize int4
""",
)
@click.argument("artifact", required=False)
@click.option(
    "--data",
    multiple=True,
    type=PLACE,
    metavar="PATH",
    help="A .jsonl file of prompts with answers or of messages, XDomainBench .json files, or a folder of them; "
    "may be repeated.",
)
@scenario_option
@click.option(
    "--against", metavar="MODEL", help="The dense model, where it is not where the build found it, or never was built."
)
@click.option("--items", type=click.IntRange(1), metavar="N", help="At most N prompts per suite (100; all of --data).")
@click.option("--batch-size", type=click.IntRange(1), default=32, metavar="N", help="Sequences at once (32).")
@click.option("--max-new-tokens", type=click.IntRange(1), metavar="N", help="Tokens of an answer (32).")
@click.option(
    "--max-tokens",
    type=click.IntRange(8),
    metavar="N",
    help="Tokens read of a prompt (512, or what the models have positions for).",
)
@build_option("chat_template")
@build_option("raw")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, metavar="N", help="Seed of every random choice (0).")
@click.option("--lm-eval", "tasks", metavar="TASK[,TASK]", help="Run tasks of lm-evaluation-harness instead.")
@click.option(
    "--lm-eval-tasks-dir",
    "tasks_folder",
    type=PLACE,
    metavar="DIR",
    help="A folder with further task definitions for --lm-eval.",
)
@click.option(
    "--quantize",
    type=click.Choice(get_args(Rounded)),
    help="Weigh a build, rounded, against its dense model that is only rounded, byte by byte, on the texts that judged "
    "the build; its report gets it.",
)
@placement_options
@json_option
@quiet_option
def evaluate(
    artifact: str | None,
    data: tuple[Path, ...],
    scenario: str | None,
    against: str | None,
    items: int | None,
    batch_size: int,
    max_new_tokens: int | None,
    max_tokens: int | None,
    chat_template: str | None,
    raw: bool | None,
    seed: int,
    tasks: str | None,
    tasks_folder: Path | None,
    quantize: Rounded | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Ask an artifact and its dense model the same questions, and say what was lost.

    Suites: the scenario, the other domains, and each --data. Divergence from the dense model needs no answers; exact
    match and recall are given only where answers are known. ARTIFACT is an artifact, an export in any format, or with
    --against any model folder or GGUF file; without it, the last build.
    """
    placement = placement_in(given)
    if quantize is not None:
        return _weigh(artifact, against, quantize, placement, as_json, quiet)
    if tasks is not None:
        rows = _harness(artifact, against, tasks, tasks_folder, items, batch_size, seed, placement)
        _print_harness(rows, as_json)
        return
    from sspcompile.api.arguments import cut_model
    from sspcompile.api.evaluate import evaluate as run
    from sspcompile.cli.progress import stages
    from sspcompile.evaluate.asking import limits_for
    from sspcompile.model.chat import Rendering

    rendering = Rendering(chat_template, bool(raw)) if raw or chat_template is not None else None
    model = cut_model(artifact, against, workspace(), option="--against", rendering=rendering, placement=placement)
    limits = limits_for(model.positions, max_tokens, max_new_tokens, batch_size)
    if max_tokens is not None and limits.max_tokens < max_tokens:
        click.echo(
            f"Note: prompts are shortened to {limits.max_tokens} tokens: with {limits.new_tokens} of an answer, the "
            f"longest text of the models has {limits.positions}.",
            err=True,
        )
    with stages(quiet) as progress:
        results = run(model, workspace(), progress, scenario=scenario, data=data, items=items, limits=limits, seed=seed)
    if as_json:
        from sspcompile.evaluate.results import results_json

        facts = {"artifact": str(model.found.folder), "dense_model": model.dense.name, "seed": seed, **asdict(limits)}
        click.echo(json.dumps(results_json(results, facts), indent=1))
        return
    from rich.console import Console

    from sspcompile.report.evaluation import print_results

    print_results(results, Console())


def _weigh(
    artifact: str | None, against: str | None, precision: Rounded, placement: Placement, as_json: bool, quiet: bool
) -> None:
    from sspcompile.errors import InputError

    given = click.get_current_context().params
    if any(given[name] for name in OF_SUITES):
        raise InputError(
            "--quantize reads the texts that judged the build, as the build read them.",
            hint="Leave out what says which texts are asked, and how.",
        )
    from sspcompile.api.arguments import demand, named
    from sspcompile.api.rounding import weigh_build
    from sspcompile.cli.progress import stages
    from sspcompile.cli.tables import print_report
    from sspcompile.report.json import read_report
    from sspcompile.workspace import REPORT

    built = demand(named(artifact, workspace()), "build", command="eval --quantize")
    with stages(quiet) as progress:
        weigh_build(built, precision, model=against, option="--against", placement=placement, progress=progress)
    print_report(read_report(built.folder / REPORT), as_json=as_json, only=("rounding",))


def _harness(
    artifact: str | None,
    against: str | None,
    tasks: str,
    tasks_folder: Path | None,
    items: int | None,
    batch_size: int,
    seed: int,
    placement: Placement,
) -> Sequence[HarnessRow]:
    from sspcompile.evaluate.harness import require_harness, run_harness

    context = click.get_current_context()
    refuse_given(context, APART, "does not go with --lm-eval", "Leave it out: the harness asks what its tasks ask.")
    require_harness()
    from sspcompile.api.arguments import cut_model, demand_transformers

    model = cut_model(artifact, against, workspace(), option="--against")
    demand_transformers(model.found, "eval --lm-eval")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    models = ((model.dense.checkpoint.path, False), (model.found.model, model.found.custom_code))
    return run_harness(
        models, names, tasks_folder=tasks_folder, items=items, batch_size=batch_size, seed=seed, placement=placement
    )


def _print_harness(rows: Sequence[HarnessRow], as_json: bool) -> None:
    if as_json:
        from sspcompile.evaluate.harness import rows_json

        click.echo(json.dumps(rows_json(rows), indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "dense", "stderr", "sliced", "stderr")
    for row in rows:
        figures = (row.dense, row.dense_stderr, row.sliced, row.sliced_stderr)
        table.add_row(row.task, row.metric, *("-" if x is None else f"{x:.4f}" for x in figures))
    Console().print(table)
