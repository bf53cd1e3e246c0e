"""The API: `POST /v1/score`, health, metrics, and the routes of the contracts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from rewards.scoring import Item, Result, ScoringError
from rewards.service import nemo_gym, open_instruct, openrlhf, slime, verl
from rewards.service.backend import Backend, Overloaded, Unavailable
from rewards.service.gate import Gate, Metrics, Rules

MAX_ITEMS = 1024
DOCS = Path(__file__).with_name("docs.html")
DEFAULT_PRINCIPLES = ("It answers what was asked.", "What it says is right.", "It is clear and no longer than needed.")


LOCAL = Rules()


class ScoreRequest(BaseModel):
    """A batch of items; results come back in their order."""

    model_config = ConfigDict(extra="forbid")

    items: Annotated[list[Item], Field(max_length=MAX_ITEMS)]
    n_votes: Annotated[int, Field(strict=True, ge=1, le=64)] | None = Field(
        None, description="in place of the judge's own number")


class ScoreResponse(BaseModel):
    results: list[Result]


class Counted:
    """A backend whose results are counted."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self.backend, self.metrics, self.groups, self.run = backend, metrics, backend.groups, backend.run

    async def score(self, items: Sequence[Item], n_votes: int | None = None) -> list[Result]:
        results = await self.backend.score(items, n_votes)
        for item, result in zip(items, results, strict=True):
            self.metrics.items.labels(item.kind, result.status, result.reason).inc()
        return results


def build_app(backend: Backend, rules: Rules = LOCAL, principles: Sequence[str] = DEFAULT_PRINCIPLES) -> FastAPI:
    """The application. principles: for contracts that bring an answer and nothing to judge it by."""
    # a page of our own: FastAPI's loads its scripts from the internet
    app = FastAPI(title="posttrain rewards", version="1", docs_url=None, redoc_url=None,
                  openapi_tags=[{"name": "native", "description": "For any caller."},
                                *({"name": name, "description": module.__doc__} for name, module in CONTRACTS.items())])
    metrics = Metrics()
    app.state.backend, app.state.principles = Counted(backend, metrics), tuple(principles)
    app.add_middleware(Gate, rules=rules, metrics=metrics)

    @app.post("/v1/score", tags=["native"], responses={429: {"description": "Queues are full; see Retry-After."}})
    async def score(asked: ScoreRequest, request: Request) -> ScoreResponse:
        """Verdicts on a batch of answers. A score of null says that the service cannot tell, never that it is wrong."""
        results = await request.app.state.backend.score(asked.items, asked.n_votes)
        request.state.counted = {"items": len(results), "unscored": sum(found.score is None for found in results)}
        return ScoreResponse(results=results)

    @app.get("/healthz", tags=["native"])
    async def healthz(request: Request) -> dict[str, object]:
        """200 when requests are answered, and the parts that were started."""
        return {"status": "ok", "parts": sorted(request.app.state.backend.groups)}

    @app.get("/metrics", tags=["native"], response_class=Response)
    async def exposition() -> Response:
        """Prometheus text."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(DOCS.read_text())

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    for name, module in CONTRACTS.items():
        app.include_router(module.router, tags=[name])
    app.add_exception_handler(ScoringError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Overloaded, _overloaded)
    app.add_exception_handler(Unavailable, _unavailable)
    return app


CONTRACTS = {"OpenRLHF": openrlhf, "slime": slime, "verl": verl, "open-instruct": open_instruct, "NeMo Gym": nemo_gym}


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """What is wrong and where, without the input, which may be long."""
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": [{"loc": found["loc"], "msg": found["msg"].removeprefix("Value error, ")}
                                    for found in error.errors()[:5]]}, 422)


async def _overloaded(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, _retried(request, 429), {"Retry-After": "1"})


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, _retried(request, 503), {"Retry-After": "2"})


def _retried(request: Request, code: int) -> int:
    """The status upon which this caller sends its request again."""
    return verl.RETRIED.get(request.url.path, code)
