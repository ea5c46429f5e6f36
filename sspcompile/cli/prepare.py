"""`sspcompile prepare`: learn a model's toolkit ahead of its first build."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from sspcompile.cli.options import (
    GOING_ON,
    build_option,
    json_option,
    model_option,
    placement_in,
    placement_options,
    quiet_option,
    revision_option,
    workspace,
)


@click.command(
    short_help="Learn a model's toolkit ahead of its first build.",
    epilog="""\b
Examples:
  sspcompile prepare
  sspcompile prepare --model ./Qwen2.5-7B-Instruct --criterion fisher --criterion kl
  sspcompile prepare --pools ./my-domains --axes 5
  sspcompile prepare --model ./Llama-3.1-70B --device-map auto
  torchrun --nproc-per-node 4 -m sspcompile.cli.main prepare --model ./Qwen2.5-7B-Instruct
""",
)
@model_option
@revision_option
@build_option("pools")
@build_option("axes")
@click.option(
    "--criterion",
    "criteria",
    multiple=True,
    metavar="NAME",
    help="Score of the heads to prepare (fisher, obs, kl, ...; `sspcompile criteria` lists them), may be "
    "repeated.  [default: fisher]",
)
@build_option("chat_template")
@build_option("raw")
@build_option("max_tokens")
@build_option("continuation_tokens")
@build_option("seed")
@placement_options
@json_option
@quiet_option
def prepare(criteria: tuple[str, ...], as_json: bool, quiet: bool, **given: Any) -> None:
    """Learn to recognise domains, score every head per domain, find the whitelist.

    `build` does this by itself when it is missing; the toolkit is kept per model and reused. Under torchrun the
    processes share the texts, one process per GPU, and find what one alone would find.
    """
    from sspcompile.criteria import of_key
    from sspcompile.model import parallel
    from sspcompile.model.chat import rendering_of
    from sspcompile.model.dense import open_dense
    from sspcompile.model.journal import holds_work
    from sspcompile.prepare.stages import beside
    from sspcompile.prepare.toolkits import toolkit_folder, toolkit_for
    from sspcompile.request.options import NAMES
    from sspcompile.request.resolving import resolve
    from sspcompile.select.scoring import CACHED

    placement = placement_in(given)
    options = resolve({name: given[name] for name in NAMES if name in given}, environment=os.environ)
    from sspcompile.cli.progress import stages
    from sspcompile.request.pools import pools_of

    # Refused, if at all, before the model is loaded.
    pools_of(options)
    for name in criteria:
        of_key(name)
    dense = open_dense(options.source)
    with parallel.joined() as world, stages(quiet or not world.first) as progress:
        if world.first and not quiet and holds_work(beside(toolkit_folder(dense, options, workspace()))):
            click.echo(GOING_ON, err=True)
        loaded = dense.load(placement=placement, rendering=rendering_of(options))
        toolkit, fresh = toolkit_for(dense, loaded, options, workspace(), progress, criteria or (CACHED,))
    if not world.first:
        return
    folder = toolkit_folder(dense, options, workspace())
    facts = {
        "folder": str(folder),
        "fresh": fresh,
        "domains": list(toolkit.domains),
        "criteria": sorted(toolkit.importance),
        **toolkit.meta,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(f"Toolkit {'prepared' if fresh else 'found'} in {folder}")
    axes = toolkit.meta["axes"]
    click.echo(f"  domains    {', '.join(toolkit.domains)}")
    click.echo(
        f"  axes       {len(toolkit.domains)} of {len(axes['candidates'])} candidates, orthogonality "
        f"{axes['orthogonality']:.3f}, coverage {axes['coverage']:.3f}"
    )
    click.echo(f"  criteria   {', '.join(sorted(toolkit.importance))}")
    told = toolkit.meta["recognition"]
    click.echo(f"  named      {told['named_right_prompts']:.1%} of held-out prompts right")
    click.echo(f"  whitelist  {int(toolkit.whitelist.sum())} of {toolkit.whitelist.size} heads")
