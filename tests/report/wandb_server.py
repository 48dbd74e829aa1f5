"""A server that answers what making a W&B Report asks, and keeps what it was sent.

It listens on this machine alone and stands in for the network: the library is the real one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40


@dataclass
class Server:
    """What it knows, and what it was told.

    Attributes:
        projects: Those that exist, as ``ENTITY/PROJECT``.
        status: Of its answers.
        refuses: Says no to saving.
        saved: The variables of every report that was saved.
        asked: Every query.
    """

    projects: tuple[str, ...] = ("team/merging",)
    status: int = 200
    refuses: bool = False
    entity: str | None = "team"
    url: str = ""
    saved: list[dict[str, Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    @property
    def spec(self) -> dict[str, Any]:
        """The content of the only report that was saved."""
        (variables,) = self.saved
        found: dict[str, Any] = json.loads(variables["spec"])
        return found

    def answer(self, query: str, told: dict[str, Any]) -> dict[str, Any]:
        if "upsertView" in query:
            if self.refuses:
                return {"errors": [{"message": "permission denied"}]}
            self.saved.append(told)
            view = {
                "id": "VmlldzoxMjM=",
                "type": "runs",
                "name": told["name"],
                "displayName": told["displayName"],
                "description": told["description"],
                "project": {
                    "id": "1",
                    "name": told["projectName"],
                    "entityName": told["entityName"],
                },
                "spec": told["spec"],
                "updatedAt": "2026-01-01T00:00:00",
            }
            return {"data": {"upsertView": {"view": view, "inserted": True}}}
        if "ProjectInternalId" in query:
            place = f"{told['entityName']}/{told['projectName']}"
            known = place in self.projects
            return {"data": {"project": {"id": "1", "internalId": "7"} if known else None}}
        if "models(" in query:
            edges = [
                {
                    "node": {
                        "__typename": "Project",
                        "id": "1",
                        "name": place.partition("/")[2],
                        "entityName": place.partition("/")[0],
                        "createdAt": "2026-01-01T00:00:00Z",
                        "isBenchmark": False,
                        "user": None,
                    },
                    "cursor": "",
                }
                for place in self.projects
            ]
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"data": {"models": {"edges": edges, "pageInfo": page}}}
        viewer: dict[str, Any] = {
            "id": "1",
            "entity": self.entity,
            "username": "me",
            "email": "",
            "flags": "{}",
            "teams": {"edges": []},
        }
        return {"data": {"viewer": viewer, "serverInfo": {}}}


@contextmanager
def serving(**known: Any) -> Iterator[Server]:
    """Serve for the block."""
    server = Server(**known)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path != "/graphql":  # the library's own telemetry
                self._send(404, {})
                return
            request = json.loads(content)
            server.asked.append(request["query"])
            if server.status != 200:
                self._send(server.status, {"errors": [{"message": "user is not logged in"}]})
                return
            self._send(200, server.answer(request["query"], request.get("variables") or {}))

        def _send(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Stay silent."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
