"""The page where a person reviews the queue: one sample at a time, each decision on disk before the next is shown.

It listens on this machine alone, and takes decisions from its own page alone: a request must name the address it came
to (a web page could reach it by a name of its own), a decision must come from that origin.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from distill.review import Decision, fault, read_decisions
from pipeline.stage import StageError
from pipeline.visible import visible

HERE = Path(__file__).parent
MOST_BYTES = 4 << 20  # of a decision
POLICY = ("default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
           "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
FILES = (("/", "review.html", "text/html"), ("/review.css", "review.css", "text/css"),
         ("/review.js", "review.js", "text/javascript"))
HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE)


class ReviewFile:
    """Decisions as lines of a file that is only ever added to."""

    def __init__(self, path: Path) -> None:
        """Raises StageError for a file with a broken line or in a folder that is not there."""
        self.path = path
        try:
            self._cut_torn_line()
            with open(path, "ab"):
                pass
            folder = os.open(path.parent, os.O_RDONLY)
        except OSError as error:
            raise StageError(f"{path}: {error.strerror}; give another --out") from None
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.decisions = read_decisions(path)

    def _cut_torn_line(self) -> None:
        """A last line without its end is of a process that was killed; nobody was told that it was kept."""
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            content = file.read()
            whole, _, rest = content.rpartition(b"\n")
            if not rest:
                return
            try:
                json.loads(rest)
                file.write(b"\n")
            except ValueError:
                file.truncate(len(content) - len(rest))

    def append(self, decision: Decision) -> None:
        """Keep a decision; it is on disk when this returns."""
        line = decision.model_dump_json(exclude_none=True).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:
            file.write(line)
            os.fsync(file.fileno())
        self.decisions[decision.id] = decision


def read_queue(path: Path) -> list[dict[str, Any]]:
    """The rows of a review queue. Raises StageError when there is none."""
    if not path.is_file():
        raise StageError(f"{path}: there is no review queue; it is made by stage reject, for judged domains, when "
                         "reject.review is above 0")
    return pq.read_table(path).to_pylist()


def build_app(rows: list[dict[str, Any]], problems: Mapping[str, dict[str, Any]], kept: ReviewFile, reviewer: str
              ) -> FastAPI:
    """The application. rows: of the queue; problems: by id, with their check."""
    by_id = {row["id"]: row for row in rows}
    items = [_item(row, problems.get(row["problem_id"])) for row in rows]
    app = FastAPI(title="posttrain review", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def own_page_alone(request: Request, call_next: Any) -> Response:
        response: Response
        host = request.headers.get("host", "")
        if not HOST.fullmatch(host):
            response = _refused(403, "this service answers to 127.0.0.1 and localhost alone")
        elif request.method == "POST" and request.headers.get("origin") != f"http://{host}":
            response = _refused(403, "decisions come from the page of this service alone")
        else:
            response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    def serve(path: str, file: str, kind: str) -> None:
        content = (HERE / file).read_text()
        app.add_api_route(path, lambda: Response(content, media_type=kind), response_model=None)

    for path, file, kind in FILES:
        serve(path, file, kind)

    @app.get("/items")
    async def all_items() -> JSONResponse:
        return JSONResponse([{**item, "decided": _decided(kept.decisions.get(item["id"]))} for item in items])

    @app.post("/decisions")
    async def decide(request: Request) -> JSONResponse:
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return _refused(413, f"a decision has a length, of at most {MOST_BYTES} bytes")
        try:
            told = Decision.model_validate_json(await request.body())
        except ValidationError as error:
            return _refused(422, error.errors()[0]["msg"].removeprefix("Value error, "))
        row = by_id.get(told.id)
        if row is None:
            return _refused(422, "this sample is not in the queue")
        wrong = fault(row["form"], told.completion) if told.completion is not None else None
        if wrong:
            return _refused(422, wrong)
        if told.completion == row["completion"]:
            return _refused(422, "the text is what it was: accept the sample instead")
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            kept.append(told.model_copy(update={"reviewer": reviewer, "time": moment}))
        except OSError as error:
            return _refused(507, f"{kept.path}: {error.strerror}; the decision was not kept")
        return JSONResponse({"left": sum(row["id"] not in kept.decisions for row in rows)})

    return app


def _refused(code: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, code)


def _decided(decision: Decision | None) -> dict[str, Any] | None:
    return decision and {"decision": decision.decision, "note": decision.note, "completion": decision.completion}


def _item(row: dict[str, Any], problem: dict[str, Any] | None) -> dict[str, Any]:
    """What the page shows of a sample. `completion` is as the model wrote it, for the editor; all else is made visible.
    """
    verdict, check = row["verdict"], (problem or {}).get("check") or {}
    thought, closed, answer = row["completion"].rpartition("</think>")
    return {"id": row["id"], "completion": row["completion"],
            "facts": [visible(row["domain"]), f"{visible(row['form'])} form", f"{row['tokens']} tokens",
                      f"lost: {row['lost']}" if row["lost"] else "kept"],
            "score": verdict["score"], "evidence": visible(verdict["evidence"]),
            "messages": [[visible(message["role"]), visible(message["content"])] for message in row["messages"]],
            "thought": visible(thought.strip().removeprefix("<think>").strip()) if closed else "",
            "answer": visible(answer.strip()), "principles": [visible(text) for text in check.get("principles") or ()],
            "reference": visible(check.get("reference") or "")}
