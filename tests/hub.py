"""A Hugging Face Hub for tests: the endpoints that `datasets` needs to stream files, with optional faults."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "f" * 40


class Hub(BaseHTTPRequestHandler):
    """Serve the files of one folder as `data/FILE` of any dataset name, and its README.md, which may name the files.

    Every `error_every`-th request for a file gets a 503, and every `drop_every`-th body is cut in half (0: never).
    """

    protocol_version = "HTTP/1.1"
    folder: Path
    error_every = drop_every = requests = bodies = 0

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/data/([^/]+)", path):
            self.send_file(self.folder / found[1])
        elif re.fullmatch(r"/datasets/[^/]+/[^/]+/resolve/[^/]+/README\.md", path) and self.readme().is_file():
            self.send_file(self.readme())
        elif re.fullmatch(r"/api/datasets/[^/]+/[^/]+(/revision/[^/]+)?", path):
            siblings = [{"rfilename": file["path"]} for file in self.listing()]
            self.send_json({"_id": "0" * 24, "id": "some/texts", "sha": REVISION, "siblings": siblings})
        elif re.fullmatch(r"/api/datasets/[^/]+/[^/]+/tree/[^/]+/data", path):
            self.send_json(self.listing())
        elif re.fullmatch(r"/api/datasets/[^/]+/[^/]+/(tree|paths-info)/[^/]+", path):
            self.send_json([{"type": "directory", "path": "data", "oid": REVISION, "size": 0}])
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_POST = do_GET

    def readme(self) -> Path:
        return self.folder / "README.md"

    def listing(self) -> list[dict]:
        files = sorted(self.folder.iterdir())
        return [{"type": "file", "path": f"data/{f.name}", "size": f.stat().st_size, "oid": REVISION} for f in files]

    def send_file(self, file: Path) -> None:
        cls = type(self)
        cls.requests += 1
        if cls.error_every and cls.requests % cls.error_every == 0:
            return self.send(503, b"")
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        data, headers, status = file.read_bytes(), {"ETag": f'"{REVISION}"', "X-Repo-Commit": REVISION}, 200
        if requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(requested[1]), min(int(requested[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            data, status = data[begin : end + 1], 206
        cls.bodies += self.command == "GET"
        drop = cls.drop_every and self.command == "GET" and cls.bodies % cls.drop_every == 0
        self.send(status, data, headers, sent=len(data) // 2 if drop else None)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": REVISION})

    def send(self, status: int, body: bytes, headers: dict | None = None, sent: int | None = None) -> None:
        """Send a response; `sent` closes the connection after this many bytes of the body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        self.close_connection = sent is not None

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path, error_every: int = 0, drop_every: int = 0) -> Iterator[str]:
    """Serve a folder while the context lasts; yields the address."""
    faults = {"folder": folder, "error_every": error_every, "drop_every": drop_every}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("FaultyHub", (Hub,), faults))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
