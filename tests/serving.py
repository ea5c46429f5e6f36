"""A small OpenAI-compatible server on 127.0.0.1 that really runs the embedded model and streams what it writes.

Beside that it can do what servers do wrong: each `fault` is one of those.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from sspcompile.model.decoder import LoadedModel

WAIT_SECONDS = 60


class Served:
    """What a server has and has seen. `together`: so many requests have to be there before one of them is answered.

    `peak` is the largest number of answers that were being written at once.
    """

    def __init__(self, loaded: LoadedModel, *, models: tuple[str, ...], fault: str, together: int, usage: bool) -> None:
        self.loaded, self.models, self.fault, self.usage = loaded, models, fault, usage
        self.meeting = threading.Barrier(together)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.now = self.peak = 0
        self.url = ""

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self.now += 1
            self.peak = max(self.peak, self.now)
        try:
            yield
        finally:
            with self.lock:
                self.now -= 1

    def tokens(self, text: str, count: int, *, go_on: bool) -> Iterator[str]:
        """Greedy, by the model's own cache; the end of the text ends it, unless it is to go on."""
        ids = self.loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        cache = None
        with torch.inference_mode():
            for _ in range(count):
                out = self.loaded.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[0, -1]
                if go_on:
                    logits[self.loaded.tokenizer.all_special_ids] = -torch.inf
                ids = logits.argmax().reshape(1, 1)
                if int(ids) == self.loaded.tokenizer.eos_token_id:
                    return
                yield self.loaded.tokenizer.decode(ids[0]) or "?"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Served

    def log_message(self, *_: object) -> None:
        """Tests read what the command says."""

    def do_GET(self) -> None:
        entries = [{"id": name, "object": "model", "owned_by": "tests"} for name in self.served.models]
        page = {"object": "list", "data": entries}
        if self.served.fault == "no list":
            self.page(404, {"detail": "Not Found"})
        elif self.served.fault == "another page":
            self.send(200, b"<html>Welcome</html>", "text/html")
        else:
            self.page(200, page)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.served.lock:
            self.served.asked.append(asked | {"path": self.path})
            self.served.headers.append(dict(self.headers))
        fault = self.served.fault
        if fault == "500":
            self.page(500, {"error": {"message": "CUDA out of memory", "type": "server_error"}})
        elif fault == "404":
            self.page(404, {"error": {"message": f"The model `{asked['model']}` does not exist.", "code": 404}})
        elif fault == "no route":
            self.page(404, {"detail": "Not Found"})
        elif fault == "no key":
            self.page(401, {"error": {"message": "Incorrect API key provided"}})
        elif fault == "strict" and "ignore_eos" in asked:
            self.page(422, {"error": {"message": "Unsupported fields in the request: {'ignore_eos'}"}})
        elif fault == "no stream":
            self.page(200, {"object": "text_completion", "choices": [{"text": "whole"}]})
        elif fault == "silent":
            threading.Event().wait(WAIT_SECONDS)
        else:
            self.stream(asked)

    def stream(self, asked: dict[str, Any]) -> None:
        served, chat, fault = self.served, "messages" in asked, self.served.fault
        text = asked["messages"][0]["content"] if chat else asked["prompt"]
        count = asked["max_tokens"] // 2 if fault == "fewer" else asked["max_tokens"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with served.counted():
            served.meeting.wait(WAIT_SECONDS)
            if chat:
                self.event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
            written = 0
            for piece in served.tokens(text, count, go_on=bool(asked.get("ignore_eos"))):
                if fault == "cut off" and written == 3:
                    self.close_connection = True
                    return
                if fault == "error on the way" and written == 3:
                    self.event({"error": {"message": "The engine died", "code": 500}})
                    self.end()
                    return
                if fault == "other events":
                    self.event({"token": piece})
                    continue
                self.event({"choices": [{"delta": {"content": piece}} if chat else {"text": piece}]})
                written += 1
            if fault == "no end":
                self.end()
                return
            last = {"delta": {}} if chat else {"text": ""}
            self.event({"choices": [last | {"finish_reason": "length"}]})
            if served.usage and asked["stream_options"]["include_usage"]:
                prompt = len(served.loaded.tokenizer(text)["input_ids"])
                self.event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": written}})
            self.chunk(b"data: [DONE]\n\n")
            self.end()

    def event(self, value: dict[str, Any]) -> None:
        self.chunk(f"data: {json.dumps(value)}\n\n".encode())

    def chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def page(self, status: int, value: dict[str, Any]) -> None:
        self.send(status, json.dumps(value).encode(), "application/json")

    def send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving(
    loaded: LoadedModel,
    *,
    models: tuple[str, ...] = ("embedded",),
    fault: str = "",
    together: int = 1,
    usage: bool = True,
) -> Iterator[Served]:
    """A server that runs until the end of the block."""
    served = Served(loaded, models=models, fault=fault, together=together, usage=usage)
    handler = type("Handler", (_Handler,), {"served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
