"""Every error that a user can meet: one line that says what is wrong, what is accepted, what to type next.

The hierarchy is closed: a class here fixes the exit code, and the command line prints `message` and `hint` and
nothing else. Anything that is not an `SspError` is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import errno

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_GATE = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class SspError(Exception):
    """Base of the hierarchy. `hint` is the next thing to type or to change, in the user's own terms."""

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """One printable line: names out of a file could hold line ends, escape sequences or lone surrogates."""
        text = f"{self.message} {self.hint}" if self.hint else self.message
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RunError(SspError):
    """Something failed that neither the input nor a gate explains (a full disk, a reload process that died)."""


class InputError(SspError):
    """The input cannot be used as it is; nothing was written."""

    exit_code = EXIT_BAD_INPUT


class RecipeError(InputError):
    """A recipe or the options of a build have errors; `problems` lists all of them, each with its place."""

    # So many are told in the one line; a file of prompts in a wrong form has as many as lines.
    TOLD = 16
    EXAMPLE = "Run `sspcompile recipe show NAME` for a complete example."

    def __init__(self, source: str, problems: list[str], *, hint: str = EXAMPLE) -> None:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        rest = len(problems) - self.TOLD
        told = [*problems[: self.TOLD], *([f"and {rest} more"] if rest > 0 else [])]
        super().__init__(f"{source} has {count}: {'; '.join(told)}.", hint=hint)
        self.problems = problems


class ScenarioError(InputError):
    """A scenario (sentence or prompt file) is empty, binary or otherwise unreadable."""


class CheckpointError(InputError):
    """A checkpoint folder is missing something, or its files contradict each other."""


class UnsupportedModelError(InputError):
    """The architecture cannot be cut exactly; the message gives the reason."""


class ToolkitError(InputError):
    """A toolkit is of another model, another schema version, or lacks what is asked of it."""


class ArtifactError(InputError):
    """No such artifact, or its files contradict its manifest."""


class OutputExistsError(InputError):
    """The output folder exists and `--overwrite` was not given."""


class ServerError(RunError):
    """A server that is to be measured cannot be; each class below is one reason."""


class UnreachableServerError(ServerError):
    """Nothing answers at its address."""


class NoCompletionError(ServerError):
    """It answers with something else than an OpenAI completion: another page, an error of its own, no stream."""


class UnservedModelError(ServerError):
    """It does not serve the model that is asked for, or serves several and none was named."""


class BrokenStreamError(ServerError):
    """It stopped in the middle of an answer."""


class GateError(SspError):
    """A promise was checked and does not hold. A command that writes has published nothing."""

    exit_code = EXIT_GATE


class ParityError(GateError):
    """What was written does not equal the masked model."""


class BudgetError(GateError):
    """The budget lies below the floors; the message names the nearest feasible keep ratio."""


# What torch says in errors without a class of their own: its allocator for the processor, CUDA's, and Apple's.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "alloc_failed")


def memory_ran_out(error: BaseException) -> bool:
    """Whether an error of Python or torch says that the machine or a device has no memory left; imports neither."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
