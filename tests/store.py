"""A store of files behind HTTP on loopback, which fails, lies and is slow when it is told to."""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Store:
    """Files by path. faults: what happens to the next answers for a path, one after the other:

    a status; `cut`: the connection ends half-way; `short`: half of it comes, said to be all; `long`: more is said to
    come than does; `other`: bytes of that length, but not those; `silent`: no answer.
    ranges: parts of files are given, as nearly every store does. tells_versions: by ETag. slow_s: before each answer.
    asked: (path, range) of every GET; whole: paths of those that were for all of a file.
    """

    def __init__(self, *, ranges: bool = False, tells_versions: bool = False) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.whole: list[str] = []
        self.ranges, self.tells_versions, self.slow_s = ranges, tells_versions, 0.0
        self.closing = threading.Event()
        store = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_HEAD(self) -> None:
                self._answer(with_content=False)

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                store.asked.append(path)
                if "Range" not in self.headers:
                    store.whole.append(path)
                self._answer(with_content=True)

            def _answer(self, with_content: bool) -> None:
                path = self.path.split("?")[0]
                content = store.files.get(path)
                faults = store.faults.get(path, [])
                fault = (faults.pop(0) if len(faults) > 1 or with_content else faults[0]) if faults else ""
                time.sleep(store.slow_s if with_content else 0)
                if fault == "silent":
                    store.closing.wait(60)
                    return
                if content is None or fault.isdigit():
                    self.send_error(int(fault or 404))
                    return
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if store.ranges else None
                if asked:
                    begin, end = int(asked[1]), min(len(content), int(asked[2]) + 1)
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
                    content = content[begin:end]
                else:
                    self.send_response(200)
                if fault == "other" and with_content:
                    content = content[: len(content) // 2] + bytes(200) + content[len(content) // 2 + 200 :]
                sent = content[: len(content) // 2] if fault in ("cut", "short") else content
                said = len(sent if fault == "short" and with_content else content) + 100 * (fault == "long")
                self.send_header("Content-Length", str(said))
                if store.tells_versions:
                    self.send_header("ETag", f'"{hash(store.files[path])}"')
                self.end_headers()
                if with_content:
                    self.wfile.write(sent)
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def put(self, folder: Path, under: str = "/set") -> None:
        for path in folder.iterdir():
            self.files[f"{under}/{path.name}"] = path.read_bytes()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
