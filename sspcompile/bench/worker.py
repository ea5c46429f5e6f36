"""One contender in processes of its own: `python -m sspcompile.bench.worker RUNTIME`, JSON lines on stdin and stdout.

`{"do": "session"}` starts a fresh process, which answers until `{"do": "end"}`: `{"do": "load", ...}` first, then
`{"do": "trial", ...}` as often as wanted, `{"do": "memory"}` and `{"do": "bandwidth"}`. Each gets one line in reply.
The process that was started only imports the libraries, once, and forks: a fresh copy costs milliseconds instead of
seconds. Where the system cannot fork safely (anywhere but Linux) the process is that of its first session and ends with
it; whoever started it starts another for the next. Computing happens between a request and its reply only, so that two
live workers never compete. An exception ends the process; its traceback is on stderr, or its message alone and its exit
code for an error of sspcompile's own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from sspcompile.bench.memory import peak_resident_bytes
from sspcompile.errors import SspError
from sspcompile.startup import spare_the_collector

FORKS = sys.platform == "linux"


class Runner(Protocol):
    """A loaded contender."""

    def facts(self) -> dict[str, Any]: ...

    def trial(self, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]: ...

    def device_bytes(self) -> int | None: ...


def import_libraries(runtime: str) -> None:
    """What the sessions of a runtime need and takes long to import: they start with it in memory.

    Not onnxruntime: its import starts threads, and a fork without them waits for them forever.
    """
    if runtime == "hf":
        import torch  # noqa: F401

        # The package itself is lazy; what takes long comes with these two.
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401
    elif runtime == "gguf":
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    else:
        import onnx  # noqa: F401


def load(runtime: str, request: Mapping[str, Any]) -> Runner:
    """The contender at `request["path"]`, ready to run."""
    if runtime == "hf":
        from sspcompile.bench.torch_runner import TorchRunner

        return TorchRunner(request)
    if runtime == "gguf":
        from sspcompile.bench.llama_runner import LlamaRunner

        return LlamaRunner(request)
    from sspcompile.bench.onnx_runner import OnnxRunner

    return OnnxRunner(request)


def serve(runtime: str, requests: TextIO, replies: TextIO) -> None:
    """Answer requests until the end of the input: the parent has gone, or wants no more. Without forks until the end of
    one session."""
    import_libraries(runtime)
    _reply(replies, {"ready": True, "forks": FORKS})
    for line in requests:
        if json.loads(line)["do"] != "session":
            raise RuntimeError("a request was made outside of a session")
        if not FORKS:
            _session(runtime, requests, replies)
            return
        # The parent waits for each reply, so nothing lies read ahead in `requests` when the child takes it over.
        child = os.fork()
        if child == 0:
            _session(runtime, requests, replies)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            _die_like(status)


def _session(runtime: str, requests: TextIO, replies: TextIO) -> None:
    _reply(replies, {"started": True})
    runner: Runner | None = None
    for line in requests:
        request = json.loads(line)
        what = request.pop("do")
        if what == "end":
            _reply(replies, {"ended": True})
            return
        if what == "bandwidth":
            from sspcompile.bench.bandwidth import read_bandwidth

            _reply(replies, {"bytes_per_second": read_bandwidth(**request)})
        elif what == "load":
            runner = load(runtime, request)
            _reply(replies, runner.facts())
        elif runner is None:
            raise RuntimeError("a trial was asked for before a load")
        elif what == "trial":
            _reply(replies, runner.trial(**request))
        elif what == "memory":
            _reply(replies, {"peak_resident_bytes": peak_resident_bytes(), "peak_device_bytes": runner.device_bytes()})


def _die_like(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    raise SystemExit(code)


def _reply(replies: TextIO, value: Mapping[str, Any]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


def main() -> None:
    # Libraries print to stdout; the protocol gets a descriptor of its own and theirs goes to stderr.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    spare_the_collector()
    try:
        serve(sys.argv[1], sys.stdin, replies)
    except SspError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
