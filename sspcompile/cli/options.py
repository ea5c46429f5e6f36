"""Options that several commands share. Those of a build are made from their definition in `request.options`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from sspcompile.request.kinds import kind_of
from sspcompile.request.options import NAMES, default_of, flag, shown_of

if TYPE_CHECKING:
    from sspcompile.model.placement import Placement
    from sspcompile.request.request import Request
    from sspcompile.select.mixture import Mixture
    from sspcompile.workspace import Workspace

Command = TypeVar("Command", bound=Callable[..., Any])


class Counts(click.ParamType):
    """Whole numbers from 1, separated by commas, as a tuple."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) >= 1 for part in parts):
            self.fail(f"{value!r} is not a list of whole numbers from 1, as 1,8.", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


COUNTS = Counts()


class Place(click.Path):
    """A path. The empty text is refused: as a path it would be the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            from sspcompile.errors import InputError

            named = param.opts[0] if isinstance(param, click.Option) else "A path"
            raise InputError(f"{named} is empty.", hint="Name a folder or a file.")
        return super().convert(value, param, ctx)


PLACE = Place()

NAMED = 8
GOING_ON = "Going on from an interrupted run: what it had measured is used."


def say_left_out(names: Sequence[str], *, quiet: bool) -> None:
    """One line on stderr about files of the source that the output lacks; the manifest names them all."""
    if names and not quiet:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        click.echo(f"Left out of what the model's folder holds: {', '.join(names[:NAMED])}{more}", err=True)


def build_option(name: str) -> Callable[[Command], Command]:
    """The Click option of one option of a build.

    Click checks numbers only; the request checks the rest, with everything else that is wrong.
    """
    shown, kind, default = shown_of(name), kind_of(name), default_of(name)
    choices = f"[{'|'.join(kind.choices)}]"
    if kind.switch:
        return click.option(flag(name), is_flag=True, default=None, help=shown.help)
    return click.option(
        flag(name),
        *([shown.short] if shown.short else []),
        type=kind.number,
        multiple=kind.multiple,
        metavar=shown.metavar or choices,
        help=shown.help if default in (None, ()) else f"{shown.help}  [default: {default}]",
    )


scenario_option = click.option(
    "--scenario",
    "-s",
    metavar="SCENARIO",
    help="A recipe (file or shipped name), a sentence, a file of prompts (.txt, .jsonl), or a data set of the hub "
    "(hub:OWNER/NAME, :SPLIT behind it).",
)
model_option = build_option("model")
revision_option = build_option("revision")
host_option = build_option("host")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print no progress.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")


PLACEMENT_OPTIONS = (
    click.option("--device", metavar="DEVICE", help="Compute on auto (the default), cpu, cuda, cuda:N or mps."),
    click.option(
        "--dtype",
        metavar="DTYPE",
        help="Compute in float32, bfloat16 or float16 (float32 on the CPU, 16 bits on a GPU).",
    ),
    click.option("--device-map", metavar="[auto]", help="Spread a model that no device holds over all of them."),
    click.option(
        "--memory",
        metavar="SIZE",
        help="Take at most this much memory, as 16GB (what is free): layers beyond it are read from disk.",
    ),
    click.option("--threads", metavar="N", help="Use N threads (the cores that this process may use)."),
)


def placement_options(command: Command) -> Command:
    """Where a model is computed: every command that runs one takes them."""
    for option in reversed(PLACEMENT_OPTIONS):
        command = option(command)
    return command


def placement_in(given: Mapping[str, Any]) -> Placement:
    """The Placement of a command's options, and of the environment. Raises InputError."""
    from sspcompile.model.placement import placement_of

    return placement_of(given, os.environ)


def build_options(command: Command) -> Command:
    """A scenario and all options of a build; `plan` takes the same."""
    for option in (*(build_option(name) for name in reversed(NAMES)), scenario_option):
        command = option(command)
    return command


def request_of(scenario: str | None, given: Mapping[str, Any]) -> Request:
    """What a build or plan works with. Raises ScenarioError or RecipeError."""
    from sspcompile.request.request import read_request

    return read_request(scenario, {name: given[name] for name in NAMES}, os.environ)


def refuse_given(context: click.Context, names: Collection[str | None], why: str, hint: str) -> None:
    """Raise InputError for the first of these parameters that was typed."""
    from sspcompile.errors import InputError

    for parameter in context.command.params:
        said = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if parameter.name in names and said:
            shown = parameter.opts[0] if isinstance(parameter, click.Option) else "An ARTIFACT"
            raise InputError(f"{shown} {why}.", hint=hint)


def warn(text: str) -> None:
    """One line on stderr."""
    click.echo(f"Warning: {text}", err=True)


def warn_unknown(mixture: Mixture) -> None:
    """Say on stderr that a scenario fits no domain well, and what was done about it."""
    if mixture.is_unknown:
        warn(
            f"{mixture.unknown:.0%} of this scenario fits no known domain ({', '.join(mixture.domains)}); "
            "for that share all domains count alike."
        )


def workspace() -> Workspace:
    """Default places, under SSPCOMPILE_HOME or the current folder."""
    from sspcompile.workspace import Workspace

    return Workspace(Path(os.environ.get("SSPCOMPILE_HOME") or "."))
