"""Options that several commands share, and how they become a resolved recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sspcompile.criteria import CRITERIA

if TYPE_CHECKING:
    from sspcompile.model.dense import DenseModel
    from sspcompile.request.recipe import Recipe
    from sspcompile.request.scenario import Scenario
    from sspcompile.select.mixture import Mixture

Command = TypeVar("Command", bound=Callable[..., Any])
BUILD_OPTIONS = (
    "model",
    "keep",
    "strength",
    "layout",
    "host",
    "pools",
    "axes",
    "criterion",
    "granularity",
    "importance_from",
    "repair",
    "without",
    "max_tokens",
    "continuation_tokens",
    "seed",
)

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


class Counts(click.ParamType):
    """Whole numbers from 1, separated by commas, as a tuple."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) >= 1 for part in parts):
            self.fail(f"{value!r} is no list of whole numbers from 1, as 1,8.", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


COUNTS = Counts()

NAMED = 8


def say_left_out(names: Sequence[str], *, quiet: bool) -> None:
    """One line on stderr about files of the source that the output lacks; the manifest names them all."""
    if names and not quiet:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        click.echo(f"Left out of what the model's folder holds: {', '.join(names[:NAMED])}{more}", err=True)


def byte_size(text: str | None, option: str) -> int | None:
    """`5GB`, `200MiB` or `1000000` as bytes. Raises InputError."""
    from sspcompile.errors import InputError

    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise InputError(f"{option} {text!r} is no size.", hint="Type 5GB, 200MiB or a number of bytes.")
    return max(1, int(float(found[1]) * UNITS[(found[2] or "").upper()]))


CRITERIA_HELP = f"Or {', '.join(list(CRITERIA)[:5])}, ...; `sspcompile criteria` lists all {len(CRITERIA)}."

scenario_option = click.option(
    "--scenario",
    "-s",
    metavar="SCENARIO",
    help="A recipe (file or shipped name), a sentence, or a file of prompts (.txt, .jsonl).",
)
model_option = click.option(
    "--model", "-m", metavar="MODEL", help="A model folder or a hub name; the embedded model by default."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print no progress.")
pools_option = click.option(
    "--pools", metavar="DIR", help="A folder of domain pools of your own, beside the shipped ones."
)
axes_option = click.option(
    "--axes",
    type=int,
    metavar="N",
    help="Make N of all pools domains, chosen to be orthogonal and to cover the others.",
)
host_option = click.option(
    "--host",
    metavar="[auto|FAMILY]",
    help="Stock class of a uniform cut: the model's own (auto, the default), or mistral, seed_oss, granite where "
    "lossless.",
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")


def build_options(command: Command) -> Command:
    """The options of `build` that settle what is compiled; `plan` takes the same."""
    for option in reversed(
        (
            scenario_option,
            model_option,
            click.option(
                "--keep",
                type=float,
                metavar="RATIO",
                help="Keep at most this share of the heads, above 0 and up to 1; 0.5 by default.",
            ),
            click.option(
                "--strength",
                type=float,
                metavar="S",
                help="In [0, 1], instead of --keep: the budget follows from it and from the scenario's breadth.",
            ),
            # No click.Choice: the recipe room checks these, all at once with whatever else is wrong.
            click.option(
                "--layout",
                metavar="[auto|uniform|per-layer]",
                help="Head counts equal in every layer, or not; auto (default) measures both.",
            ),
            host_option,
            pools_option,
            axes_option,
            click.option(
                "--criterion",
                metavar="NAME",
                help="Score of the heads; auto (default) takes the best of some by measuring their masks, and "
                f"fisher-rounds where nothing is measured (plan). {CRITERIA_HELP}",
            ),
            click.option(
                "--granularity",
                metavar="[head|group]",
                help="Cut single heads, or whole key/value groups, which saves more of the KV cache (head).",
            ),
            click.option(
                "--importance-from",
                metavar="[domains|prompts|auto]",
                help="Score heads by the domains' cached importance, on the scenario's own prompts, or by both (auto).",
            ),
            click.option(
                "--repair",
                metavar="[least-squares|least-squares-mlp|flap-bias|none]",
                help="Refit o_proj to what is left (least-squares, the default), or down_proj as well "
                "(least-squares-mlp), or add FLAP's bias where o_proj has one.",
            ),
            click.option(
                "--without",
                multiple=True,
                metavar="[axes|whitelist|mixing|scenario|calibration]",
                help="Switch a part of the method off, to see what it is worth; may be repeated.",
            ),
            click.option("--max-tokens", type=int, metavar="N", help="Read at most N tokens of each text (512)."),
            click.option(
                "--continuation-tokens",
                type=int,
                metavar="N",
                help="Let the dense model continue each text by N tokens (16).",
            ),
            click.option("--seed", type=int, metavar="N", help="Seed of every random choice (0)."),
        )
    ):
        command = option(command)
    return command


def request(scenario: str | None, given: Mapping[str, Any]) -> tuple[Scenario, Recipe]:
    """The scenario and the resolved recipe of a build or plan. Raises ScenarioError or RecipeError."""
    from sspcompile.errors import ScenarioError
    from sspcompile.request.recipe import resolve
    from sspcompile.request.scenario import as_recipe, read_scenario

    if scenario is None:
        raise ScenarioError(
            "No scenario was given.",
            hint='Type --scenario "A helpdesk for questions about chemistry", or see `sspcompile recipe ls`.',
        )
    read, recipe = read_scenario(scenario)
    # click gives an empty tuple for a repeatable option that was not typed.
    command_line = {name: None if given[name] == () else given[name] for name in BUILD_OPTIONS}
    return read, resolve(recipe or as_recipe(read), command_line=command_line, environment=os.environ)


def refuse_hopeless(scenario: Scenario, subject: DenseModel, options: Recipe) -> None:
    """Refuse before any heavy work what would be refused after it. Raises InputError or BudgetError."""
    import numpy as np

    from sspcompile.criteria import of_key
    from sspcompile.repair.repair import demand_place, is_linear
    from sspcompile.request.pools import pools_of
    from sspcompile.select.compiling import score_key
    from sspcompile.select.scoring import demand_prompts
    from sspcompile.slicing.hosts import demand_host, named_host
    from sspcompile.slicing.layouts import choose

    of_key(score_key(options))
    demand_prompts(scenario, options)
    pools_of(options)
    geometry = subject.checkpoint.geometry
    demand_place(geometry, options.repair or "none")
    demand_host(geometry, options.layout or "auto", named_host(options.host))
    if options.repair == "least-squares" and not is_linear(geometry):
        click.echo(
            f"Warning: no repair for {geometry.family.architecture}: a norm stands between o_proj and the residual "
            "stream, so least squares does not apply.",
            err=True,
        )
    if options.keep is not None:
        g = subject.checkpoint.geometry
        # Whether a budget is feasible follows from the counts alone, whatever the scores are.
        groups_only = options.granularity == "group"
        choose(np.ones((g.layers, g.heads)), g.kv_heads, options.keep, "per-layer", groups_only=groups_only)


def warn_unknown(mixture: Mixture) -> None:
    """Say on stderr that a scenario fits no domain well, and what was done about it."""
    if mixture.is_unknown:
        click.echo(
            f"Warning: {mixture.unknown:.0%} of this scenario fits no known domain "
            f"({', '.join(mixture.domains)}); for that share heads are scored by the domain-free average.",
            err=True,
        )


def here() -> Path:
    """The folder that holds `artifacts` and `exported`: SSPCOMPILE_HOME, or the current folder."""
    return Path(os.environ.get("SSPCOMPILE_HOME") or ".")
