"""Stand-ins for the Hub on this machine: one that gives a dataset, and one that takes a model."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


@contextlib.contextmanager
def hub_with_dataset(name: str, files: dict[str, bytes]) -> Iterator[str]:
    """Serve a dataset's files; gives the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            path, _, query = self.path.partition("?")
            if path.startswith(f"/api/datasets/{name}/tree/{COMMIT}"):
                folder = path.removeprefix(f"/api/datasets/{name}/tree/{COMMIT}").strip("/")
                inside = _tree(files, f"{folder}/" if folder else "", "recursive=true" in query.lower())
                self._answer(json.dumps(inside or {}).encode(), 200 if inside else 404)
            elif path.startswith(f"/api/datasets/{name}"):
                siblings = [{"rfilename": file} for file in files]
                self._answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
            else:
                file = path.removeprefix(f"/datasets/{name}/resolve/").partition("/")[2]
                self._answer(files.get(file, b"{}"), 200 if file in files else 404)

        do_HEAD = do_GET

        def _answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    inside = [file for file in files if file.startswith(folder)]
    here = [file for file in inside if recursive or "/" not in file.removeprefix(folder)]
    folders = {folder + file.removeprefix(folder).split("/")[0] for file in set(inside) - set(here)}
    return [
        *({"type": "file", "path": file, "size": len(files[file]), "oid": COMMIT} for file in here),
        *({"type": "directory", "path": path, "size": 0, "oid": COMMIT} for path in sorted(folders)),
    ]


@contextlib.contextmanager
def hub_that_takes_a_model() -> Iterator[Any]:
    """A server for `me/emotions` with its `address`, the `requests` it got (path, authorization, content) and `files`.

    What stands in `files` is what its repository holds already.
    """
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _TakesAModel)
    server.address, server.requests, server.files = f"http://127.0.0.1:{server.server_port}", [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _TakesAModel(BaseHTTPRequestHandler):
    """As much of the Hub as creating a repository and committing to it takes; the server keeps what it is sent."""

    server: Any

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"])) if "Content-Length" in self.headers else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.requests.append((self.path, self.headers.get("Authorization"), content))
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.address}/me/emotions", "id": "me/emotions", "name": "me/emotions"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif self.path == "/api/models/me/emotions/preupload/main":
            files = json.loads(content)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif self.path == "/api/models/me/emotions/commit/main":
            answer = {"commitUrl": f"{self.server.address}/me/emotions/commit/abc", "commitOid": "abc"}
        else:
            self.send_error(404)
            return
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        there = self.path.removeprefix("/me/emotions/resolve/main/") in self.server.files
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", "abc")
        self.send_header("ETag", '"abc"')
        self.send_header("Content-Length", "1")
        if not there:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def log_message(self, *_):
        pass
