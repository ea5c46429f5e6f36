"""`sspcompile`: the group of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

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
from sspcompile.cli.trim import trim
from sspcompile.cli.verify import verify
from sspcompile.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    RunError,
    SspError,
    memory_ran_out,
)
from sspcompile.startup import let_threads_sleep, send_nothing_home, spare_the_collector

LESS_MEMORY = "Bound what a model takes with --memory, or give a smaller --max-tokens or a narrower --dtype."


@dataclass
class Run:
    """What is known of one run of the command line: the signals that arrived, and whether tracebacks are wanted."""

    arrived: list[int] = field(default_factory=list)
    debug: bool = False


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 failure, 2 bad input, 3 a gate failed (parity, budget), 130 SIGINT, 143 SIGTERM.",
)
@click.version_option(sspcompile.__version__, prog_name="sspcompile")
@click.option("--debug", is_flag=True, help="Show where an error came from: `sspcompile --debug build ...`.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Cut the attention heads and MLP channels that a deployment does not need out of a decoder LLM.

    Takes a scenario and a frozen model, finds the heads and channels that the scenario needs, slices the
    others out of its matrices, proves that the written model equals the masked one, and reports what was gained
    and lost.

    \b
    Try it on the model that ships with the package:
      sspcompile build --scenario "A helpdesk for questions about chemistry"
      sspcompile bench
    """
    context.ensure_object(Run).debug = debug


for command in (build, trim, plan, prepare, inspect, verify, export, run, bench, compare, evaluate, recipe, criteria):
    cli.add_command(command)
cli.add_command(doctor)
cli.add_command(slice_command, "slice")


def main(argv: list[str] | None = None) -> None:
    """Entry point: runs the command line and exits with the codes of the errors' classes."""
    run = Run()
    send_nothing_home()
    let_threads_sleep()
    if argv is None:
        spare_the_collector()
        sys.excepthook = partial(_unexpected, run)
    try:
        with _interruptible(run.arrived), _told():
            code = cli.main(args=argv, prog_name="sspcompile", standalone_mode=False, obj=run)
    except SspError as error:
        _fail(run, error, str(error), error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(EXIT_BAD_INPUT)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _exit_interrupted(signal.SIGTERM in run.arrived, in_process=argv is not None)
    except (MemoryError, OSError, RuntimeError) as error:
        if memory_ran_out(error):
            _fail(run, error, str(RunError("Memory ran out.", hint=LESS_MEMORY)), EXIT_FAILURE)
        if not isinstance(error, OSError):
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(run, error, str(RunError(f"{error.strerror or error}{where}.")), EXIT_FAILURE)
    else:
        # Without standalone mode click returns the code of ctx.exit() instead of raising.
        sys.exit(code if isinstance(code, int) else 0)


class _Stderr(logging.Handler):
    """What the library notes for its users, a line each, and each once: a file may be read several times in a run."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.said:
            self.said.add(text)
            click.echo(text, err=True)


@contextmanager
def _told() -> Iterator[None]:
    """Show what the library notes, and leave none of its temporary folders behind, whatever ends the run."""
    log, handler = logging.getLogger("sspcompile"), _Stderr()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        publish = sys.modules.get("sspcompile.checkpoint.publish")  # without it, there is none
        if publish is not None:
            publish.remove_temporary()


@contextmanager
def _interruptible(arrived: list[int]) -> Iterator[None]:
    """Let SIGINT and SIGTERM, which go into `arrived`, and every failure after them leave as KeyboardInterrupt.

    So both take the way on which the scratch folders are removed. An interrupt inside a library need not come out as
    one: Python 3.11 wraps what `__set_name__` raises, extension modules turn it into an ImportError, and the error
    message would then blame the checkpoint.
    """

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        signal.default_int_handler(number, frame)

    # What whoever started us ignores, or handles, stays so.
    usual: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = [number for number, handler in usual.items() if signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, note)
    try:
        yield
    except Exception as error:
        if arrived:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number in ours:
            signal.signal(number, usual[number])


def _exit_interrupted(terminated: bool, *, in_process: bool) -> None:
    """Say so and leave with 130, or with 143 after SIGTERM. Everything was cleaned up on the way here.

    Once transformers has loaded a model, something in the process answers the interpreter's ordinary end with SIGINT
    again, and the shell would see a signal instead of the code; so the program itself ends without that stage.
    """
    click.echo(
        "Error: Interrupted; nothing unfinished was published. A build, prepare or bench goes on where it was.",
        err=True,
    )
    code = EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    if in_process:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(run: Run, error: BaseException, message: str, code: int) -> None:
    if run.debug:
        traceback.print_exception(error)
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def _unexpected(run: Run, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What no class of errors stands for is a defect of ours; it ends the interpreter with exit code 1."""
    if run.debug:
        sys.__excepthook__(kind, error, trace)
        return
    last = traceback.extract_tb(trace)[-1] if trace is not None else None
    where = f" at {Path(last.filename).name}:{last.lineno}" if last is not None else ""
    said = RunError(
        f"Unexpected {kind.__name__}{where}: {error}.",
        hint="This is a defect; please report what `sspcompile --debug ...` prints for the same command.",
    )
    click.echo(f"Error: {said}", err=True)


if __name__ == "__main__":
    main()
