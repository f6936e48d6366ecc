"""A stand-in for the hub's HTTP: what ``create_repo`` and ``upload_folder`` ask for, on a port of this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What was uploaded to the stand-in."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        """Path in the repository -> content, of the last commit."""
        self.commits: list[str] = []
        """``REPOSITORY REVISION: SUMMARY`` of each."""
        self.cards: list[str] = []
        """Cards whose metadata were to be validated."""
        self.tokens: set[str] = set()
        self.refuses_with: int | None = None
        """Status with which a commit is refused."""
        self.large: dict[str, bytes] = {}
        self.address = ""


@contextmanager
def hub() -> Iterator[Hub]:
    """A stand-in that listens until the block ends."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def _handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def answer(self, content: Any, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            self.answer({"error": f"no {self.path} here"}, 404)

        def do_PUT(self) -> None:  # a large file
            state.large[self.path.rpartition("/")[2]] = self.body()
            self.answer({})

        def do_POST(self) -> None:
            body = self.body()
            state.tokens.add(self.headers.get("Authorization", ""))
            path = self.path.split("?")[0]
            if path == "/api/repos/create":
                asked = json.loads(body)
                state.created.append(asked)
                owner = asked.get("organization") or "somebody"
                name = f"{owner}/{asked['name']}"
                self.answer({"url": f"{state.address}/{name}", "name": name, "id": name})
            elif path == "/api/validate-yaml":
                state.cards.append(json.loads(body)["content"])
                self.answer({"warnings": [], "errors": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                kinds = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                self.answer({"files": kinds})
            elif path.endswith("/info/lfs/objects/batch"):
                wanted = json.loads(body)["objects"]
                objects = [
                    {
                        "oid": one["oid"],
                        "size": one["size"],
                        "actions": {"upload": {"href": f"{state.address}/large/{one['oid']}"}},
                    }
                    for one in wanted
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                if state.refuses_with is not None:
                    self.answer({"error": "not today"}, state.refuses_with)
                    return
                self.commit(path, body)
            else:
                self.answer({"error": f"no {path} here"}, 404)

        def commit(self, path: str, body: bytes) -> None:
            repository, _, revision = path.removeprefix("/api/models/").partition("/commit/")
            state.files = {}
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    state.commits.append(f"{repository} {revision}: {value['summary']}")
                elif entry["key"] == "file":
                    state.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    state.files[value["path"]] = state.large[value["oid"]]
            oid = "0" * 40
            url = f"{state.address}/{repository}/commit/{oid}"
            self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    return Handler
