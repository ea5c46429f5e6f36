"""A hub of one repository on this machine, as far as `snapshot_download` asks one: what it lists, and its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

REVISION = "0123456789abcdef0123456789abcdef01234567"


def commit_of(revision: str) -> str:
    """The commit that a branch or tag of the hub points to."""
    return REVISION if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()


def ask(monkeypatch: pytest.MonkeyPatch, address: str | None, cache: Path) -> None:
    """From here on the hub is at `address`, or out of reach for None, and its cache in `cache`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", address is None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if address is None else "")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", address or "http://127.0.0.1:9")
    resolved = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + resolved)


@contextmanager
def hub(name: str, folder: Path, *, kind: str = "models", **others: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as the repository `name`; yields the address, and the paths of the files that were fetched.

    `kind`: `models` or `datasets`. `others`: branch or tag -> what the repository holds there.
    """
    commits = {
        commit_of(revision): {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()}
        for revision, place in {"main": folder, **others}.items()
    }
    known = {revision: commit_of(revision) for revision in ("main", *others)} | {commit: commit for commit in commits}
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            inside = path.removeprefix("api/").removeprefix(f"{kind}/").removeprefix(name)
            asked, _, rest = inside.strip("/").partition("/")
            revision, _, file = rest.partition("/")
            commit = known.get(revision or "main", "")
            files = commits.get(commit, {})
            if not files and name in path:
                self.send(b"{}", body=body, status=404, **{"X-Error-Code": "RevisionNotFound"})
            elif asked == "tree":
                listed = [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files.items()]
                self.send(json.dumps(listed).encode(), body=body)
            elif asked in ("", "revision") and path.startswith(f"api/{kind}/{name}"):
                siblings = [{"rfilename": file} for file in files]
                self.send(json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), body=body)
            elif asked == "resolve" and file in files:
                if body:
                    fetched.append(file)
                self.send(files[file], body=body, **{"X-Repo-Commit": commit})
            else:
                self.send_error(404)

        def send(self, content: bytes, *, body: bool, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: what was fetched is in the list."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
