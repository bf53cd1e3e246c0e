"""What every request passes before any code of the API sees it: an id, the token, limits, and at the end a count.

Plain ASGI, so that a body is refused while it arrives. Nothing is unpickled: a body is JSON of bounded size and depth.
"""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic_core import from_json

log = logging.getLogger("posttrain.serve")
OPEN = frozenset({"/healthz", "/", "/docs", "/openapi.json"})  # without a token
LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?", re.IGNORECASE)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Rules:
    """token: asked for as `Authorization: Bearer`; without one only loopback names may be in the Host header, so that a
    web page cannot reach the service through a name of its own. max_depth of JSON is 200, the parser's own.
    """

    token: str | None = None
    max_body_bytes: int = 32 << 20
    max_requests: int = 256  # under way at once


class Metrics:
    """Counts for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram("posttrain_request_seconds", "time of a request", ["path", "code"],
                                  registry=self.registry, buckets=SECONDS)
        self.items = Counter("posttrain_items", "scored items", ["kind", "status", "reason"], registry=self.registry)
        self.under_way = Gauge("posttrain_requests_under_way", "requests being answered", registry=self.registry)


class Gate:
    """ASGI middleware around the application."""

    def __init__(self, app: Any, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics, self.under_way = app, rules, metrics, 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.monotonic(), 500

        async def tell(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        self.under_way += 1
        self.metrics.under_way.set(self.under_way)
        try:
            refusal = self._refusal(scope, headers)
            body = b""
            if refusal is None and scope["method"] == "POST":
                body, refusal = await self._body(receive)
            if refusal:
                await _answer(tell, *refusal)
            else:
                await self.app(scope, _replay(body, receive) if scope["method"] == "POST" else receive, tell)
        finally:
            self.under_way -= 1
            self.metrics.under_way.set(self.under_way)
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "other")  # not the raw path, which anyone can make up
            self.metrics.requests.labels(route, str(status)).observe(seconds)
            log.info(json.dumps({"request_id": request_id, "method": scope["method"], "path": scope["path"][:200],
                                 "status": status, "ms": round(seconds * 1000, 1),
                                 **scope["state"].get("counted", {})}))

    def _refusal(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        if self.rules.token is not None:
            given = headers.get(b"authorization", b"")
            if scope["path"] not in OPEN and not hmac.compare_digest(given, f"Bearer {self.rules.token}".encode()):
                return 401, "give the token of this service: Authorization: Bearer TOKEN"
        elif not LOOPBACK.fullmatch(headers.get(b"host", b"").decode("latin-1")):
            return 403, "without a token this service answers to localhost alone (Host header)"
        kind = headers.get(b"content-type", b"").split(b";")[0].strip()
        if scope["method"] == "POST" and kind != b"application/json":
            return 415, "send JSON: Content-Type: application/json"
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return 415, "send the body as it is, without Content-Encoding"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.rules.max_body_bytes:
            return 413, f"the body may have {self.rules.max_body_bytes} bytes; send smaller batches"
        if self.under_way > self.rules.max_requests and scope["path"] not in OPEN:
            return 429, "too many requests under way; send this one again"
        return None

    async def _body(self, receive: Any) -> tuple[bytes, tuple[int, str] | None]:
        """The body, or why it is refused."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"", (400, "the connection ended before the body did")
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.rules.max_body_bytes:
                return b"", (413, f"the body may have {self.rules.max_body_bytes} bytes; send smaller batches")
        body = b"".join(parts)
        try:
            from_json(body, allow_inf_nan=False)
        except ValueError as error:
            return b"", (400, f"the body is no JSON that can be read: {error}")
        return body, None


def _replay(body: bytes, receive: Any) -> Any:
    """The body once more for the application, then whatever follows."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict[str, Any]:
        return left.pop() if left else await receive()

    return again


async def _answer(send: Any, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
