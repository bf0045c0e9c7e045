"""A loopback server that speaks the part of TSD's file API that transfers need. Ours, written after tsd-file-api (UiO).

It is no copy of the real one: no tenants' rights, no hooks, no encryption. What it keeps to: paths and verbs, JWT
claims (project and expiry), the resumable protocol with its order of chunks, the listing's shape, ranges of exports,
507 where the project's quota is spent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
import uuid
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(slots=True)
class TsdServer:
    """The running server. Files: `<root>/<project>/<group>/` imported, `<root>/<project>/export/` to be fetched.

    cut_after: bytes of request bodies after which the line is cut, once; quota: bytes that a project may hold.
    """

    root: Path
    port: int = 0
    cut_after: int | None = None
    quota: int = 1 << 60
    taken: int = 0
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def imported(self, project: str = "p11") -> Path:
        return self.root / project / f"{project}-member-group"

    def export(self, project: str = "p11") -> Path:
        folder = self.root / project / "export"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def token(project: str = "p11", *, expires_in: int = 3600) -> str:
    """A JWT with the claims that the file API looks at (it leaves signatures to the authorisation server)."""
    claims = {"proj": project, "user": f"{project}-test", "exp": int(time.time()) + expires_in, "name": "import"}
    words = [{"alg": "HS256"}, claims, {}]
    return ".".join(urlsafe_b64encode(json.dumps(word).encode()).decode().rstrip("=") for word in words)


@contextmanager
def server(root: Path, port: int = 0) -> Iterator[TsdServer]:
    """One on loopback. The client's `dev` is port 3003; on a free one, set `tsdapiclient.tools.HOSTS['dev']` to it."""
    state = TsdServer(root)
    handler = type("Bound", (_Handler,), {"tsd": state})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as http:
        state.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            http.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    tsd: TsdServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.tsd.requests.append(format % args)

    def do_PATCH(self) -> None:
        self._answer(self._patch)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_DELETE(self) -> None:
        self._answer(self._delete)

    def _answer(self, act: Any) -> None:
        url = urlsplit(self.path)
        steps = [unquote(step) for step in url.path.strip("/").split("/")]
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self._body()
        if body is None:
            return
        project = steps[1] if len(steps) > 3 else ""
        if steps[0] != "v1" or steps[2:3] != ["files"] or not self._known(project):
            self._say(401, {"message": "Authorization not possible"})
            return
        with self.tsd.lock:
            act(self.tsd.root / project, steps[3:], query, body)

    def _body(self) -> bytes | None:
        """The request's bytes; None where the line was cut among them."""
        left = int(self.headers.get("Content-Length") or 0)
        most = left if self.tsd.cut_after is None else max(0, self.tsd.cut_after - self.tsd.taken)
        body = self.rfile.read(min(left, most))
        self.tsd.taken += len(body)
        if len(body) == left:
            return body
        self.tsd.cut_after = None
        self.close_connection = True
        self.connection.close()
        return None

    def _known(self, project: str) -> bool:
        try:
            words = self.headers["Authorization"].removeprefix("Bearer ").split(".")
            claims = json.loads(urlsafe_b64decode(words[1] + "=="))
        except (AttributeError, IndexError, ValueError):
            return False
        return bool(claims.get("proj") == project and claims.get("exp", 0) > time.time())

    def _patch(self, project: Path, steps: list[str], query: dict[str, str], body: bytes) -> None:
        name, chunk = steps[-1], query.get("chunk", "")
        upload = query.get("id") or str(uuid.uuid4())
        folder = project / ".resumables" / upload
        data, about = folder / "data", folder / "about.json"
        known: dict[str, Any] = json.loads(about.read_text()) if about.is_file() else {"name": name, "chunks": []}
        if chunk == "end":
            if not known["chunks"]:
                return self._say(400, {"message": "no such upload"})
            target = project / steps[1] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            data.replace(target)
            shutil.rmtree(folder)
            return self._say(201, {"filename": name, "id": upload, "max_chunk": "end", "key": None})
        if int(chunk) != len(known["chunks"]) + 1:
            return self._say(400, {"message": "chunk_order_incorrect"})
        held = sum(file.stat().st_size for file in project.rglob("*") if file.is_file())
        if held + len(body) > self.tsd.quota:
            return self._say(507, {"message": "Project has run out of disk quota"})
        folder.mkdir(parents=True, exist_ok=True)
        with data.open("ab") as file:
            file.write(body)
        known["chunks"].append([len(body), hashlib.md5(body, usedforsecurity=False).hexdigest()])
        about.write_text(json.dumps(known))
        return self._say(201, {"filename": name, "id": upload, "max_chunk": int(chunk), "key": None})

    def _get(self, project: Path, steps: list[str], query: dict[str, str], body: bytes) -> None:
        del query, body
        if steps[0] == "resumables":
            return self._resumable(project, steps[1])
        folder = project.joinpath(*steps[1:]) if steps[0] == "stream" else project / "export"
        if steps[0] == "export" and len(steps) > 1:
            return self._export(folder / steps[1])
        if not folder.is_dir():
            return self._say(404, {"message": "not found"})
        rows = [
            {"filename": file.name, "size": file.stat().st_size, "modified_date": "", "href": "", "exportable": True,
             "reason": None, "mime-type": "application/x-tar", "owner": "", "etag": "", "mtime": 0}
            for file in sorted(folder.iterdir())
        ]  # fmt: skip
        return self._say(200, {"files": rows, "page": None})

    def _resumable(self, project: Path, name: str) -> None:
        best: dict[str, Any] = {}
        for about in sorted((project / ".resumables").glob("*/about.json")):
            known = json.loads(about.read_text())
            end = sum(size for size, _ in known["chunks"])
            if known["name"] == name and known["chunks"] and end >= best.get("next_offset", 0):
                size, digest = known["chunks"][-1]
                best = {
                    "filename": name, "id": about.parent.name, "chunk_size": known["chunks"][0][0],
                    "max_chunk": len(known["chunks"]), "md5sum": digest, "previous_offset": end - size,
                    "next_offset": end, "warning": None, "group": None, "key": None,
                }  # fmt: skip
        return self._say(200, best) if best else self._say(404, {"message": "not found"})

    def _export(self, file: Path) -> None:
        if not file.is_file():
            return self._say(404, {"message": "not found"})
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        self.send_response(200)
        self.send_header("Content-Length", str(file.stat().st_size - start))
        self.end_headers()
        with file.open("rb") as content:
            content.seek(start)
            shutil.copyfileobj(content, self.wfile, 1 << 20)
        return None

    def _delete(self, project: Path, steps: list[str], query: dict[str, str], body: bytes) -> None:
        del body
        if steps[0] == "resumables":
            shutil.rmtree(project / ".resumables" / query["id"], ignore_errors=True)
        else:
            project.joinpath(*steps[1:]).unlink(missing_ok=True)
        return self._say(200, {"message": "deleted"})

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
