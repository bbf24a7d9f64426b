"""A Hub on this machine: what huggingface_hub and datasets ask to read a dataset, answered from memory."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
