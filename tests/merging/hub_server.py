"""A Hugging Face hub on this machine: as much of its protocol as fetching a model needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "76543210fedcba9876543210fedcba9876543210"


@dataclass
class Hub:
    """Repositories, what was asked for, and how to misbehave.

    Attributes:
        files: Name of a repository -> file -> content.
        refused: Name of a repository -> status and the hub's code for the error.
        commits: Revision -> commit.
        asked: Every file that was downloaded.
        address: Where it listens.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, COMMIT: COMMIT})
    asked: list[str] = field(default_factory=list)
    address: str = ""


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve a hub while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].replace("%2F", "/")
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            found = api or file
            repository = found.group(1) if found else ""
            status, code = hub.refused.get(repository, (404, "RepoNotFound"))
            if found is None or repository not in hub.files or repository in hub.refused:
                self.answer(status, b"{}", X_Error_Code=code)
                return
            commit = hub.commits.get((api.group(3) if api else found.group(2)) or "main")
            files = hub.files[repository]
            if commit is None:
                self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            elif api and api.group(2) == "tree":
                tree = [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for name, content in files.items()
                ]
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif api:
                info = {
                    "id": repository,
                    "sha": commit,
                    "siblings": [{"rfilename": name} for name in files],
                }
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            elif file and file.group(3) in files:
                content = files[file.group(3)]
                if self.command == "GET":
                    hub.asked.append(file.group(3))
                self.answer(
                    200,
                    content,
                    ETag=f'"{hashlib.sha1(content).hexdigest()}"',
                    X_Repo_Commit=commit,
                )
            else:
                self.answer(404, b"{}", X_Error_Code="EntryNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def cached(cache: Path, repository: str, files: dict[str, bytes], revision: str = "main") -> Path:
    """Lay files into a cache as the hub's library does; return the snapshot's folder."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs" / revision).write_text(COMMIT)
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha1(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(Path("../" * name.count("/") + "../../blobs") / blob.name)
    return snapshot
