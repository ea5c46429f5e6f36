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

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `folder` as the repository `name`; yields the address, and the paths of the files that were fetched."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            file = path.removeprefix(f"{name}/resolve/{REVISION}/")
            if path.startswith(f"api/models/{name}/tree/"):
                listed = [{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in files.items()]
                self.send(json.dumps(listed).encode(), body=body)
            elif path.startswith(f"api/models/{name}"):
                siblings = [{"rfilename": file} for file in files]
                self.send(json.dumps({"id": name, "sha": REVISION, "siblings": siblings}).encode(), body=body)
            elif file in files:
                if body:
                    fetched.append(file)
                self.send(files[file], body=body)
            else:
                self.send_error(404)

        def send(self, content: bytes, *, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", REVISION)
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
