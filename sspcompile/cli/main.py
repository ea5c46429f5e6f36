"""`sspcompile`: the group of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

import sspcompile
from sspcompile.cli.bench import bench
from sspcompile.cli.build import build
from sspcompile.cli.compare import compare
from sspcompile.cli.criteria import criteria
from sspcompile.cli.doctor import doctor
from sspcompile.cli.eval import evaluate
from sspcompile.cli.export import export
from sspcompile.cli.inspect import inspect
from sspcompile.cli.plan import plan
from sspcompile.cli.prepare import prepare
from sspcompile.cli.recipe import recipe
from sspcompile.cli.run import run
from sspcompile.cli.slice import slice_command
from sspcompile.cli.verify import verify
from sspcompile.errors import EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED, RunError, SspError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 failure, 2 bad input, 3 a gate failed (parity, budget), 130 interrupted.",
)
@click.version_option(sspcompile.__version__, prog_name="sspcompile")
def cli() -> None:
    """Cut the attention heads that a deployment does not need out of a decoder LLM.

    Takes a scenario and a frozen model, finds the heads that the scenario needs, slices the others out of
    q/k/v/o, proves that the written model equals the masked one, and reports what was gained and lost.

    \b
    Try it on the model that ships with the package:
      sspcompile build --scenario "A helpdesk for questions about chemistry"
      sspcompile bench
    """


for command in (
    build, plan, prepare, inspect, verify, export, run, bench, compare, evaluate, recipe, criteria, doctor,
):  # fmt: skip
    cli.add_command(command)
cli.add_command(slice_command, "slice")


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs the command line and exits with the codes of the errors' classes."""
    try:
        with _interruptible():
            code = cli.main(args=argv, prog_name="sspcompile", standalone_mode=False)
    except SspError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(EXIT_BAD_INPUT)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _exit_interrupted(in_process=argv is not None)
    except MemoryError:
        _fail("Out of memory.", EXIT_FAILURE)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(str(RunError(f"{error.strerror or error}{where}.")), EXIT_FAILURE)
    else:
        # Without standalone mode click returns the code of ctx.exit() instead of raising.
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let every failure after a SIGINT leave as KeyboardInterrupt.

    An interrupt inside a library need not come out as one: Python 3.11 wraps what `__set_name__` raises, extension
    modules turn it into an ImportError, and the error message would then blame the checkpoint.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored by whoever started us, or somebody else's
        yield
        return
    arrived = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if arrived:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _exit_interrupted(*, in_process: bool) -> None:
    """Say so and leave with 130. Everything was cleaned up on the way here.

    Once transformers has loaded a model, something in the process answers the interpreter's ordinary end with SIGINT
    again, and the shell would see a signal instead of the code; so the program itself ends without that stage.
    """
    click.echo("Error: Interrupted; nothing was published.", err=True)
    if in_process:
        sys.exit(EXIT_INTERRUPTED)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
