"""A small OpenAI-compatible chat server on a port of this machine that misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Trouble = tuple[int, dict[str, str], str]  # HTTP status, headers, body


def completion(text: str, reasoning: str | None = None, finish_reason: str = "stop", prompt_tokens: int = 10,
               completion_tokens: int = 5) -> dict[str, Any]:
    message = {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


class ChatServer:
    """Serves `answer(body)`; before an answer, the troubles that `trouble(number of the request, body)` gives.

    Use it as a context manager. `requests` holds (time, headers, body) of all that came, `most_at_once` how many were
    being answered at a time.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], dict[str, Any]],
                 trouble: Callable[[int, dict[str, Any]], Trouble | None] = lambda number, body: None,
                 seconds: float = 0.0) -> None:
        self.answer, self.trouble, self.seconds = answer, trouble, seconds
        self.requests: list[tuple[float, dict[str, str], dict[str, Any]]] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def serve(self, call: BaseHTTPRequestHandler) -> None:
        body = json.loads(call.rfile.read(int(call.headers["Content-Length"])))
        with self._lock:
            self.requests.append((time.monotonic(), dict(call.headers), body))
            number = len(self.requests)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.seconds)
        if call.path != "/v1/chat/completions":
            status, headers, text = 404, {}, "no such path"
        else:
            status, headers, text = self.trouble(number, body) or (200, {}, json.dumps(self.answer(body)))
        with self._lock:
            self._now -= 1
        data = text.encode()
        call.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            call.send_header(name, value)
        call.end_headers()
        call.wfile.write(data)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
