"""One completion of an OpenAI-compatible server, asked for as a stream, and when its pieces came."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

import sspcompile
from sspcompile.errors import (
    BrokenStreamError,
    InputError,
    NoCompletionError,
    ServerError,
    UnreachableServerError,
    UnservedModelError,
)

CONNECT_SECONDS = 10.0
LAST_PORT = 65535
END = "[DONE]"
# What a message of the server may take of a line, and how much of a page that is none is read.
REASON_CHARACTERS = 300
PAGE_BYTES = 1 << 16
LISTED = 8
# Where the pieces of a chat's answer stand: models that reason aloud have a place of their own for it.
CHAT_TEXTS = ("content", "reasoning_content", "reasoning")
FEWEST_NEW_TOKENS = 2


@dataclass(frozen=True)
class Server:
    """`url` ends with the version, as http://localhost:8000/v1. `model` is None where the server is to say it, and
    `software` what it says it is, where it does.
    """

    name: str
    url: str
    model: str | None = None
    software: str | None = None


@dataclass(frozen=True)
class Manner:
    """How every server is asked: for completions of a text or for a `chat`; `stop_at_eos` lets it end a text early."""

    new_tokens: int
    chat: bool = False
    stop_at_eos: bool = False


@dataclass(frozen=True)
class Answer:
    """`first_seconds` and `last_seconds` are those of the first and the last piece of text, `seconds` of the end of the
    stream, all from the request on.

    `tokens` are the new ones: as the server counted them (`counted`), or else its pieces. `prompt_tokens` is None where
    the server does not count.
    """

    first_seconds: float
    last_seconds: float
    seconds: float
    tokens: int
    counted: bool
    prompt_tokens: int | None


def address(url: str) -> str:
    """The URL up to its version. Raises InputError for what is no http(s) address, or holds more than one."""
    try:
        parsed = httpx2.URL(url.strip())
    except httpx2.InvalidURL as error:
        raise InputError(f"--server {url!r} is not an address: {error}.", hint=_EXAMPLE) from error
    if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 1) > LAST_PORT:
        raise InputError(f"--server {url!r} is not an address.", hint=_EXAMPLE)
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InputError("--server holds more than an address.", hint=f"{_EXAMPLE} A key goes to --api-key.")
    path = parsed.path.rstrip("/")
    return str(parsed.copy_with(path=path if re.search(r"/v\d+$", path) else f"{path}/v1"))


_EXAMPLE = "Give one as http://localhost:8000, or NAME=http://localhost:8000."


def open_client(api_key: str | None) -> httpx2.AsyncClient:
    """What sends the requests: to the address that is named and nowhere else.

    Proxies, .netrc and other settings of the environment have no part: they would add time, and names and passwords.
    Raises InputError for a key that no header can hold.
    """
    headers = {"User-Agent": f"sspcompile/{sspcompile.__version__}"}
    if api_key:
        if not (api_key.isascii() and api_key.isprintable()):
            raise InputError("--api-key holds characters that no header can hold.", hint="Give it without line ends.")
        headers["Authorization"] = f"Bearer {api_key}"
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(
        headers=headers, trust_env=False, limits=limits, timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS)
    )


async def identified(client: httpx2.AsyncClient, server: Server) -> Server:
    """The server with its model, from what it lists at /models.

    Raises UnservedModelError where the model is not among them, or where there are several and none was named; others
    of ServerError where there is no such list.
    """
    async with _told(server):
        response = await client.get(f"{server.url}/models")
    if response.status_code != 200:
        raise _refusal(server, "/models", response.status_code, response.text)
    try:
        listed = {str(entry["id"]): entry for entry in response.json()["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise NoCompletionError(
            f"{server.name} answers at {server.url}/models with something else than a list of models.", hint=_WHICH
        ) from error
    names = ", ".join(list(listed)[:LISTED]) + (f" and {len(listed) - LISTED} more" if len(listed) > LISTED else "")
    if server.model is None and len(listed) != 1:
        several = f"{server.name} serves {names or 'no model'}."
        raise UnservedModelError(several, hint=f"Say which: --served-model {server.name}=MODEL.")
    model = server.model or next(iter(listed))
    if model not in listed:
        raise UnservedModelError(f"{server.name} does not serve {model!r}.", hint=f"It serves {names or 'no model'}.")
    owner = listed[model].get("owned_by")
    return Server(server.name, server.url, model, owner if isinstance(owner, str) else None)


_WHICH = "Give the address of an OpenAI-compatible server, up to its /v1."


async def ask(client: httpx2.AsyncClient, server: Server, manner: Manner, prompt: str) -> Answer:
    """One answer. Raises a ServerError that says what the server did instead."""
    path = "/chat/completions" if manner.chat else "/completions"
    reading = _Reading(server, manner)
    start = time.perf_counter()
    async with (
        _told(server, reading),
        client.stream("POST", f"{server.url}{path}", json=_body(server, manner, prompt)) as response,
    ):
        if response.status_code != 200:
            raise _refusal(server, path, response.status_code, await _page(response))
        kind = response.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "text/event-stream":
            raise NoCompletionError(
                f"{server.name} answers at {path} with {kind or 'what has no type'} where a stream was asked for.",
                hint=_WHICH,
            )
        # Read to the end, so that the connection stays open for the next request.
        async for event in httpx2.EventSource(response):
            reading.take(event.data, time.perf_counter() - start)
    return reading.answer()


def _body(server: Server, manner: Manner, prompt: str) -> dict[str, Any]:
    """The field `ignore_eos` is not OpenAI's: vLLM and llama-server take it, others overlook it."""
    text = {"messages": [{"role": "user", "content": prompt}]} if manner.chat else {"prompt": prompt}
    return {
        "model": server.model,
        **text,
        "max_tokens": manner.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({} if manner.stop_at_eos else {"ignore_eos": True}),
    }


class _Reading:
    """What of a stream has come so far."""

    def __init__(self, server: Server, manner: Manner) -> None:
        self.server = server
        self._chat = manner.chat
        self._ended: float | None = None
        self._pieces: list[float] = []
        # A token may come in several pieces, as bytes of a sign do; a stream without end may not.
        self._most = 4 * manner.new_tokens + 16
        self._usage: Mapping[str, Any] = {}

    @property
    def begun(self) -> bool:
        return bool(self._pieces)

    def take(self, data: str, seconds: float) -> None:
        """One event of the stream, as it came after so many seconds."""
        if data.strip() == END:
            self._ended = seconds
            return
        try:
            event = json.loads(data)
            if "error" in event:
                raise BrokenStreamError(
                    f"{self.server.name} stopped {self._so_far}: {_reason(data)}.", hint="Look into its log."
                )
            choices = event["choices"]
            text = self._text(choices[0]) if choices else ""
            if choices and choices[0].get("finish_reason") is not None:
                self._ended = seconds
            usage = event.get("usage") or self._usage
            self._usage = {name: usage.get(name) for name in ("completion_tokens", "prompt_tokens")}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise NoCompletionError(
                f"{self.server.name} streams something else than a completion: {data[:REASON_CHARACTERS]}", hint=_WHICH
            ) from error
        if text:
            self._pieces.append(seconds)
        if len(self._pieces) > self._most:
            raise NoCompletionError(
                f"{self.server.name} goes on after the number of tokens that it was asked for.",
                hint="It does not mind max_tokens, and cannot be measured.",
            )

    def answer(self) -> Answer:
        """Raises BrokenStreamError for a stream without an end, NoCompletionError for what is no stream of tokens."""
        if self._ended is None:
            raise BrokenStreamError(f"{self.server.name} stopped {self._so_far}.", hint="Look into its log.")
        tokens, counted = self._usage.get("completion_tokens"), True
        if not isinstance(tokens, int):
            tokens, counted = len(self._pieces), False
        if tokens < FEWEST_NEW_TOKENS:
            raise NoCompletionError(
                f"{self.server.name} wrote {tokens} of the tokens that it was asked for; intervals need two.",
                hint="It ends its texts itself: try --chat, or another server.",
            )
        if len(self._pieces) < FEWEST_NEW_TOKENS:
            raise NoCompletionError(
                f"{self.server.name} sent its {tokens} tokens in {len(self._pieces)} piece: it does not stream.",
                hint="Switch streaming on there, or ask for more with --new-tokens.",
            )
        asked = self._usage.get("prompt_tokens")
        return Answer(
            self._pieces[0], self._pieces[-1], self._ended, tokens, counted, asked if isinstance(asked, int) else None
        )

    @property
    def _so_far(self) -> str:
        return f"after {len(self._pieces)} pieces of its answer" if self._pieces else "before its answer"

    def _text(self, choice: Mapping[str, Any]) -> str:
        if not self._chat:
            return choice["text"] or ""
        delta = choice.get("delta") or {}
        return "".join(delta.get(name) or "" for name in CHAT_TEXTS)


@contextlib.asynccontextmanager
async def _told(server: Server, reading: _Reading | None = None) -> AsyncIterator[None]:
    """What fails on the way, in the words of whoever asked."""
    try:
        yield
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise UnreachableServerError(
            f"Nothing answers at {server.url}: {error or type(error).__name__}.",
            hint="Start the server, or mend --server.",
        ) from error
    except (httpx2.TransportError, httpx2.DecodingError) as error:
        what = str(error) or type(error).__name__
        if reading is not None and reading.begun:
            raise BrokenStreamError(
                f"{server.name} stopped in the middle of an answer: {what}.", hint="Look into its log."
            ) from error
        raise NoCompletionError(f"{server.name} does not answer at {server.url}: {what}.", hint=_WHICH) from error


async def _page(response: httpx2.Response) -> str:
    """The beginning of a page, as text."""
    found = b""
    async for part in response.aiter_bytes():
        found += part
        if len(found) > PAGE_BYTES:
            break
    return found.decode("utf-8", "replace")


def _refusal(server: Server, path: str, status: int, page: str) -> ServerError:
    reason = _reason(page)
    told = f"{server.name} answers {status} at {server.url}{path}" + (f": {reason}" if reason else "") + "."
    if status in (401, 403):
        return NoCompletionError(told, hint="Give its --api-key.")
    if status == 404 and server.model and server.model in reason:
        return UnservedModelError(told, hint=f"Name another: --served-model {server.name}=MODEL.")
    if status == 404:
        return NoCompletionError(told, hint=_WHICH)
    if status in (400, 422) and "ignore_eos" in reason:
        return NoCompletionError(
            told, hint="Give --stop-at-eos: it does not know how to go on after the end of a text."
        )
    if status < 500:
        return NoCompletionError(told, hint="Ask otherwise: --prompt-tokens, --new-tokens, --chat or --served-model.")
    return NoCompletionError(told, hint="Look into its log.")


def _reason(page: str) -> str:
    """The message in an error of the OpenAI form, or its like; of other pages nothing."""
    try:
        found = json.loads(page)
    except ValueError:
        return ""
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return str(found)[:REASON_CHARACTERS].rstrip(".")
