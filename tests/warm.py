"""Processes that begin with torch and transformers in memory: to import them is most of what a small proof takes.

Every proof runs in a fresh process (`sspcompile/proof/whole.py`). Here that is a fork of a process which has imported
the libraries and done nothing else. What is started in its place, a Python that imports next to nothing, hands over its
three streams, and ends as the fork ends. Tests that start the program itself, and those with the fixture `cold`, have
processes that import everything.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

LARGEST = 1 << 20


def hand_over(address: str) -> int:
    """Let a fork work on the streams of this process; its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as served:
        served.connect(address)
        surroundings = {"folder": os.getcwd(), "environment": dict(os.environ)}  # noqa: PTH109 (pathlib takes longer)
        socket.send_fds(served, [json.dumps(surroundings).encode()], [0, 1, 2])
        return int(served.recv(16) or b"1")


def serve(listening: int) -> None:
    """Fork for whoever connects, one after the other, until standard input ends: whoever started this is gone."""
    import contextlib
    import gc
    import select
    import signal

    from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM  # noqa: F401

    from sspcompile.proof import reload

    gc.freeze()
    listener = socket.socket(fileno=listening)
    while select.select([listener, sys.stdin], [], [])[0] == [listener]:
        connection, _ = listener.accept()
        with connection:
            message, streams, *_ = socket.recv_fds(connection, LARGEST, 3)
            if not message:  # killed before it said anything
                continue
            child = os.fork()
            if child == 0:
                _run(reload.main, json.loads(message), streams)
            end = os.pidfd_open(child)
            # Whoever kills the process that the child stands for means the child.
            if connection in select.select([connection, end], [], [])[0]:
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            for descriptor in (end, *streams):
                os.close(descriptor)
            with contextlib.suppress(BrokenPipeError):
                connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(main: Callable[[], None], surroundings: dict[str, Any], streams: list[int]) -> NoReturn:
    """Run `main` in these surroundings, and end the process."""
    import traceback

    code = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(surroundings["folder"])
        os.environ.clear()
        os.environ.update(surroundings["environment"])
        main()
        code = 0
    except BaseException:  # noqa: BLE001 (a fork that went on would serve as well)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Warm:
    """The command of a process that is forked from a warm one, which the first use starts. `end` ends that one."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._server: Any = None

    def __iter__(self) -> Iterator[str]:
        if self._server is None:
            self._server = self._started()
        # Without the packages that are installed, Python starts in hundredths of a second.
        return iter((sys.executable, "-I", "-S", __file__, self._address))

    def _started(self) -> Any:
        import subprocess

        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self._address)
            listener.listen()
            command = [sys.executable, "-P", __file__, str(listener.fileno())]
            # In a session of its own: an interrupt of the terminal is for pytest, which ends it.
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True
            )

    def end(self) -> None:
        if self._server is not None:
            self._server.communicate()


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        serve(int(sys.argv[1]))
    else:
        sys.exit(hand_over(sys.argv[1]))
