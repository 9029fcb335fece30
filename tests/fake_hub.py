"""A model hub on loopback: the calls of huggingface_hub that an upload makes, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Use it with `with`. repositories: name -> {"private": …, "files": {name: bytes}}.

    token: what is accepted. status: in place of every answer. large: names that go the way of large files.
    """

    def __init__(self, token: str, *, status: int | None = None, large: tuple[str, ...] = ()) -> None:
        self.token, self.status, self.large = token, status, large
        self.repositories: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            def do_POST(self) -> None:
                hub._answer(self)

            def do_PUT(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._handler = Handler

    def __enter__(self) -> FakeHub:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        content = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            content = _chunks(request.rfile)
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        stored = path.startswith("/objects/")
        if self.status is not None:
            status, answer = self.status, {"error": "so it is"}
        elif not stored and request.headers.get("Authorization") != f"Bearer {self.token}":
            status, answer = 401, {"error": "Invalid credentials"}
        else:
            status, answer = self._act(path, content)
        body = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def _act(self, path: str, content: bytes) -> tuple[int, Any]:
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/objects/"):
            self.objects[path.removeprefix("/objects/")] = content
            return 200, {}
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name] = {"private": private, "files": {}}
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path.endswith(".git/info/lfs/objects/batch"):
            found = [
                {**thing, "actions": {"upload": {"href": f"{self.url}/objects/{thing['oid']}"}}}
                for thing in json.loads(content)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": found}
        name, _, rest = path.removeprefix("/api/models/").partition("/preupload/")
        if rest:
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"] in self.large else "regular"}
                for file in json.loads(content)["files"]
            ]
            return 200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]}
        name, _, rest = path.removeprefix("/api/models/").partition("/commit/")
        if rest:
            return 200, self._commit(name, content)
        name = path.removeprefix("/api/models/").partition("/revision/")[0]
        if name in self.repositories:
            private = self.repositories[name]["private"]
            return 200, {"id": name, "private": private, "sha": "0" * 40, "siblings": [], "tags": []}
        return 404, {"error": "Repository not found"}

    def _commit(self, name: str, content: bytes) -> dict[str, Any]:
        files = self.repositories[name]["files"]
        for line in content.decode().splitlines():
            part = json.loads(line)
            if part["key"] == "file":
                files[part["value"]["path"]] = base64.b64decode(part["value"]["content"])
            elif part["key"] == "lfsFile":
                found = self.objects[part["value"]["oid"]]
                assert hashlib.sha256(found).hexdigest() == part["value"]["oid"]
                files[part["value"]["path"]] = found
        return {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}


def _chunks(stream: Any) -> bytes:
    found = b""
    while size := int(stream.readline(), 16):
        found += stream.read(size)
        stream.readline()
    stream.readline()
    return found
