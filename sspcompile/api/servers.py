"""`bench --server`: OpenAI-compatible servers, measured over HTTP."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sspcompile.bench.server import Server, address
from sspcompile.bench.serving import ServerLoad, ServerSettings, ServersResult, measure
from sspcompile.checkpoint.publish import write_atomically
from sspcompile.errors import InputError, OutputExistsError
from sspcompile.progress import Progress, silent

QUICK: Mapping[str, Any] = {"prompt_tokens": (64,), "new_tokens": 16, "concurrency": (1, 4)}
SEED_BITS = 32


@dataclass(frozen=True)
class ServerRequest:
    """What is asked of every server: prompts of about so many tokens, `repeats` rounds, `seconds` at most in all."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: int = 64
    repeats: int = 8
    seconds: float = 600.0
    chat: bool = False
    stop_at_eos: bool = False

    @classmethod
    def of(cls, *, quick: bool = False, **given: Any) -> ServerRequest:
        """What was `given` (None: nothing was said), the rest as usual, or as for a quick look."""
        said = {name: value for name, value in given.items() if value is not None}
        return cls(**{**(QUICK if quick else {}), **said})

    def settings(self) -> ServerSettings:
        """With a seed of its own: servers keep prompts that they know, and answer those at once."""
        loads = tuple(ServerLoad(c, p, self.new_tokens) for p in self.prompt_tokens for c in self.concurrency)
        seed = secrets.randbits(SEED_BITS)
        return ServerSettings(loads, self.repeats, self.seconds, seed, self.chat, self.stop_at_eos)


def servers_of(given: Sequence[str], models: Sequence[str]) -> tuple[Server, ...]:
    """From `[NAME=]URL` and `[NAME=]MODEL`; a server without a name is called by its host and port, a model without one
    is every server's. Raises InputError.
    """
    servers = [_server(one) for one in given]
    names = [server.name for server in servers]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"Two servers are called {name}.", hint="Give each a name: --server NAME=URL.")
    for one in models:
        name, found, model = one.partition("=")
        if not (found and name in names):
            name, model = "", one
        if not model:
            raise InputError(
                f"--served-model {one!r} names no model.", hint="Give NAME=MODEL, or MODEL for all servers."
            )
        servers = [replace(server, model=model) if name in ("", server.name) else server for server in servers]
    return tuple(servers)


def _server(given: str) -> Server:
    named = re.fullmatch(r"([^=/:]+)=(.+)", given)
    name, url = (named[1].strip(), named[2]) if named else ("", given)
    place = address(url)
    return Server(name or re.sub(r"^https?://|/v\d+$", "", place), place)


def bench_servers(
    servers: Sequence[Server],
    request: ServerRequest,
    *,
    api_key: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ServersResult:
    """Measure servers, the first of which the others are compared with, and write every sample to the file `out`.

    Nothing but the prompts, and the key as `Authorization: Bearer`, is sent, and to these addresses alone. Raises
    OutputExistsError before any request, and what `bench.serving.measure` raises.
    """
    if out is not None:
        _refuse(out, overwrite=overwrite)
    result = measure(servers, request.settings(), api_key=api_key, progress=progress)
    if out is not None:
        write_atomically(out, json.dumps(result.to_json(), indent=1) + "\n")
    return result


def _refuse(out: Path, *, overwrite: bool) -> None:
    if out.is_dir() or (out.exists() and not overwrite):
        kind, hint = (
            ("a folder", "Name a file.") if out.is_dir() else ("there already", "Give --overwrite, or another --out.")
        )
        raise OutputExistsError(f"{out} is {kind}.", hint=hint)
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out.parent} is not a folder.", hint="Make it first, or give another --out.")
