"""Servers measured from outside: requests sent at once, servers in turn, raw samples kept."""

from __future__ import annotations

import asyncio
import itertools
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import httpx2

import sspcompile
from sspcompile.bench.metrics import SERVER_METRICS
from sspcompile.bench.ratios import Ratio, compare_all
from sspcompile.bench.server import FEWEST_NEW_TOKENS, Answer, Manner, Server, ask, identified, open_client
from sspcompile.bench.words import prompt
from sspcompile.errors import InputError, RunError
from sspcompile.intervals import Summary, summarize
from sspcompile.progress import Progress, silent

SCHEMA_VERSION = 1
# Prompts of fewer words begin alike sooner or later.
FEWEST_WORDS = 4


@dataclass(frozen=True)
class ServerLoad:
    """`concurrency` requests sent at once, each with a prompt of so many words, about as many tokens, and `new_tokens`
    asked for.
    """

    concurrency: int
    prompt_tokens: int
    new_tokens: int

    @property
    def label(self) -> str:
        return f"{self.concurrency} at once, {self.prompt_tokens}+{self.new_tokens} tokens"


@dataclass(frozen=True)
class ServerSettings:
    """Equal for all servers. In each of `rounds` every server has every load once, after `warmup` rounds that are not
    counted; after `seconds` in all, no request is sent and none waited for. Prompts follow from the `seed`.
    """

    loads: tuple[ServerLoad, ...]
    rounds: int
    seconds: float
    seed: int
    chat: bool = False
    stop_at_eos: bool = False
    warmup: int = 1

    @property
    def requests(self) -> int:
        """At most so many are sent to each server."""
        return (self.warmup + self.rounds) * sum(load.concurrency for load in self.loads)

    def check(self) -> None:
        """Raises InputError for what cannot be measured."""
        if not self.loads or len(set(self.loads)) != len(self.loads):
            raise InputError("A benchmark needs at least one load, each once.")
        values = [("repeats", self.rounds, 1), ("max-seconds", self.seconds, 1)]
        for load in self.loads:
            values += [("concurrency", load.concurrency, 1), ("prompt-tokens", load.prompt_tokens, FEWEST_WORDS)]
            values += [("new-tokens", load.new_tokens, FEWEST_NEW_TOKENS)]
        for name, value, least in values:
            if value < least:
                raise InputError(f"--{name} is {value}.", hint=f"It must be at least {least}.")


@dataclass(frozen=True)
class ServerLoadResult:
    """Samples lie round after round. `warmup` holds the discarded ones.

    `new_tokens` and `prompt_tokens` are those of every counted request, the latter empty where the server does not
    say; `fewer` is how many of them ended before the tokens that were asked for, and `counted` whether the server
    itself counted.
    """

    load: ServerLoad
    metrics: Mapping[str, Summary]
    warmup: Mapping[str, tuple[float, ...]]
    new_tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    fewer: int
    counted: bool


@dataclass(frozen=True)
class ServerResult:
    """`software` is what the server says it is (the owner of its model), None where it says nothing."""

    name: str
    url: str
    model: str
    software: str | None
    loads: tuple[ServerLoadResult, ...]


@dataclass(frozen=True)
class ServersResult:
    """`ratios` compare the first server with each other one. `rounds` of those in the settings ended in time."""

    settings: ServerSettings
    servers: tuple[ServerResult, ...]
    ratios: tuple[Ratio, ...]
    rounds: int
    started: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values only; with the definition and unit of every metric."""
        definitions = {n: {"unit": m.unit, "definition": m.definition} for n, m in SERVER_METRICS.items()}
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(asdict(self))), "definitions": definitions}


@dataclass(frozen=True)
class _Burst:
    """Answers to requests that were sent at once, and the seconds until the last of them had ended."""

    answers: tuple[Answer, ...]
    seconds: float


# One round: server name, load label -> what came.
_Round = dict[tuple[str, str], _Burst]


def measure(
    servers: Sequence[Server], settings: ServerSettings, *, api_key: str | None = None, progress: Progress = silent
) -> ServersResult:
    """Measure the servers in turn, A B, B A; the first one is the reference of all others.

    `progress` hears bursts of requests done, of all. Raises InputError for settings that cannot be measured,
    ServerError for a server that cannot, and RunError where not one round ends in time.
    """
    if not servers or len({server.name for server in servers}) != len(servers):
        raise InputError("Each --server needs a name of its own.", hint="Give --server NAME=URL.")
    settings.check()
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    known, rounds = asyncio.run(_measured(servers, settings, api_key, progress))
    results = tuple(_result(server, rounds, settings) for server in known)
    ratios = tuple(itertools.chain.from_iterable(_ratios(results[0], other, rounds, settings) for other in results[1:]))
    names = {"sspcompile": sspcompile.__version__, "python": platform.python_version()}
    versions = names | {"httpx2": metadata.version("httpx2")}
    return ServersResult(settings, results, ratios, len(rounds) - settings.warmup, started, versions)


async def _measured(
    servers: Sequence[Server], settings: ServerSettings, api_key: str | None, progress: Progress
) -> tuple[list[Server], list[_Round]]:
    rounds: list[_Round] = []
    known: list[Server] = []
    total = (settings.warmup + settings.rounds) * len(settings.loads) * len(servers)
    ticks = itertools.count()
    numbers = itertools.count()
    try:
        async with asyncio.timeout(settings.seconds), open_client(api_key) as client:
            known = [await identified(client, server) for server in servers]
            for number in range(settings.warmup + settings.rounds):
                order = list(known) if number % 2 == 0 else known[::-1]
                found: _Round = {}
                for load, server in itertools.product(settings.loads, order):
                    progress("measuring", next(ticks), total)
                    manner = Manner(load.new_tokens, settings.chat, settings.stop_at_eos)
                    asked = [prompt(settings.seed, next(numbers), load.prompt_tokens) for _ in range(load.concurrency)]
                    found[server.name, load.label] = await _burst(client, server, manner, asked)
                rounds.append(found)
    except TimeoutError:
        if len(rounds) <= settings.warmup:
            raise RunError(
                f"No round of requests ended within {settings.seconds:g} s.",
                hint="Raise --max-seconds, or lower --concurrency, --prompt-tokens or --new-tokens.",
            ) from None
    progress("measuring", total, total)
    return known, rounds


async def _burst(client: httpx2.AsyncClient, server: Server, manner: Manner, asked: Sequence[str]) -> _Burst:
    start = time.perf_counter()
    tasks = [asyncio.ensure_future(ask(client, server, manner, prompt)) for prompt in asked]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        # A request that is let go of closes its connection, which must not outlive the loop.
        await asyncio.gather(*tasks, return_exceptions=True)
    return _Burst(tuple(answers), time.perf_counter() - start)


def _result(server: Server, rounds: Sequence[_Round], settings: ServerSettings) -> ServerResult:
    loads = tuple(
        _under(load, [found[server.name, load.label] for found in rounds], settings.warmup) for load in settings.loads
    )
    return ServerResult(server.name, server.url, server.model or "", server.software, loads)


def _under(load: ServerLoad, bursts: Sequence[_Burst], warmup: int) -> ServerLoadResult:
    discarded, counted = _samples(bursts[:warmup]), _samples(bursts[warmup:])
    answers = [answer for burst in bursts[warmup:] for answer in burst.answers]
    return ServerLoadResult(
        load,
        {name: summarize(values) for name, values in counted.items()},
        {name: tuple(values) for name, values in discarded.items()},
        tuple(answer.tokens for answer in answers),
        tuple(answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None),
        sum(answer.tokens < load.new_tokens for answer in answers),
        all(answer.counted for answer in answers),
    )


def _samples(bursts: Sequence[_Burst]) -> dict[str, list[float]]:
    answers = [answer for burst in bursts for answer in burst.answers]
    return {
        "first_token_seconds": [answer.first_seconds for answer in answers],
        "token_interval_seconds": [(a.last_seconds - a.first_seconds) / (a.tokens - 1) for a in answers],
        "output_tokens_per_second": [sum(a.tokens for a in burst.answers) / burst.seconds for burst in bursts],
    }


def _ratios(
    reference: ServerResult, other: ServerResult, rounds: Sequence[_Round], settings: ServerSettings
) -> Iterator[Ratio]:
    names, count = (reference.name, other.name), len(rounds) - settings.warmup
    for top, bottom in zip(reference.loads, other.loads, strict=True):
        yield from compare_all(
            top.metrics, bottom.metrics, sessions=count, names=names, load=top.load.label, metrics=SERVER_METRICS
        )
