"""The Hub in a thread of the test process, with faults on demand and a log of all requests."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import uvicorn
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import Account, Hub, create_app

WRITE, READ, OTHER = "hf_alice_write", "hf_alice_read", "hf_bob_write"
ACCOUNTS = {
    WRITE: Account("alice", "write", ("acme",)),
    READ: Account("alice", "read", ("acme",)),
    OTHER: Account("bob", "write"),
}


class _AbortableProtocol(H11Protocol):
    """Remembers live connections by peer, so that a fault can reset one."""

    live: dict[tuple[Any, ...], Any] = {}  # noqa: RUF012

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._peer = tuple(transport.get_extra_info("peername")[:2])
        self.live[self._peer] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.live.pop(self._peer, None)
        super().connection_lost(exc)


class Faults:
    """Wraps the app: logs every request, and spoils those that match a rule.

    A rule has `method` and `path` (a regular expression), `times` (default 1), and one of: `status` (answered instead),
    `delay` seconds before the app sees the request, `drop_request_after` bytes (the connection is reset while the client sends), `lost_response` (the app does its work, then
    the connection is reset before the answer).
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.rules: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # "%2F" stays encoded: a revision such as refs%2Fpr%2F1 is one part of the path.
        raw = scope["raw_path"].decode()
        scope = {**scope, "path": unquote(re.sub("%2f", "%252F", raw, flags=re.IGNORECASE))}
        entry = {"method": scope["method"], "path": scope["path"], "status": None, "sent": 0}
        self.log.append(entry)
        rule = self._match(scope) or {}

        def reset() -> None:
            transport = _AbortableProtocol.live.get(tuple(scope["client"]))
            if transport:
                transport.abort()

        received = 0

        async def rx() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received >= rule.get("drop_request_after", float("inf")):
                reset()
                return {"type": "http.disconnect"}
            return message

        async def tx(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
                if rule.get("lost_response"):
                    return reset()
            elif rule.get("lost_response"):
                return None
            entry["sent"] += len(message.get("body", b""))
            return await send(message)

        await asyncio.sleep(rule.get("delay", 0))
        if rule.get("status"):
            body = json.dumps({"error": "injected fault"}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await tx({"type": "http.response.start", "status": rule["status"], "headers": headers})
            return await tx({"type": "http.response.body", "body": body})
        try:
            await self.app(scope, rx, tx)
        except (asyncio.CancelledError, ClientDisconnect):
            if not rule:
                raise

    def _match(self, scope: dict[str, Any]) -> dict[str, Any] | None:
        for rule in self.rules:
            fits = rule.get("method", scope["method"]) == scope["method"] and re.search(rule["path"], scope["path"])
            if fits:
                rule["times"] -= 1
                if rule["times"] <= 0:
                    self.rules.remove(rule)
                return rule
        return None


class HubServer:
    """`with HubServer(folder, listening_socket) as hub: ...`; the address is `hub.url`."""

    def __init__(self, root: Path, listening: socket.socket) -> None:
        port = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._socket = listening
        hub = Hub(root, ACCOUNTS, self.url, cdn_url=f"http://localhost:{port}")
        self.store = hub.store
        self.faults = Faults(create_app(hub))
        config = uvicorn.Config(
            self.faults, http=_AbortableProtocol, log_level="warning", lifespan="off", access_log=False
        )
        self._server = uvicorn.Server(config)

    @property
    def log(self) -> list[dict[str, Any]]:
        return self.faults.log

    def fault(self, path: str, times: int = 1, **rule: Any) -> None:
        """Spoil the next `times` requests to paths that match; see `Faults`."""
        self.faults.rules.append({"path": path, "times": times, **rule})

    def __enter__(self) -> HubServer:
        run = {"target": self._server.run, "kwargs": {"sockets": [self._socket]}, "daemon": True}
        self._thread = threading.Thread(**run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.should_exit = True
        self._thread.join(5)
