"""The service on Ray Serve: math, code and judge are deployments of their own, with a queue each.

The API is one replica that holds no state. A part that dies is started again by Serve, and what was with it is sent
once more: scoring changes nothing, so a second time does no harm. A full queue is told to the caller, who loses
nothing.
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pipeline.stage import StageError
from rewards.judge import Judge
from rewards.registry import Verifier
from rewards.sandbox import Isolation, Job, Limits, Outcome, Sandbox, SandboxFailure
from rewards.scoring import Item, Result, score
from rewards.service.app import DEFAULT_PRINCIPLES, build_app
from rewards.service.backend import GROUPS, Overloaded, Unavailable, refuse_missing
from rewards.service.gate import Rules, log

CHUNK = {"math": 128, "code": 32, "judge": 256}  # items of one call to a part: long requests spread over its replicas
TRIES, PAUSE = 8, 1.0  # of a call whose replica died; Serve starts another within seconds
PATIENCE = 600.0  # seconds for one call


@dataclass(frozen=True)
class Parts:
    """What to start. workers: math workers, and sandboxes, of each replica. judge: makes one, where it will run."""

    math: bool = True
    code: bool = True
    judge: Callable[[], Judge] | None = None
    workers: int = 2
    replicas: int = 1
    isolation: Isolation = "bubblewrap"
    queue: int = 64  # calls that wait for a part, beyond those it works on

    def names(self) -> list[str]:
        return [name for name, there in (("math", self.math), ("code", self.code), ("judge", self.judge)) if there]


class Part:
    """One part of the service: a verifier for some kinds of check."""

    def __init__(self, judge: Callable[[], Judge] | None, workers: int, canaries: Sequence[str], isolation: Isolation
                 ) -> None:
        self.verifier = Verifier(judge() if judge else None, workers, isolation=isolation)
        if "math" in canaries:
            self.verifier.math.start()
        self.verifier.run_canaries(canaries, ["python"])

    async def score(self, items: list[dict[str, Any]], n_votes: int | None) -> list[dict[str, Any]]:
        asked = [Item.model_construct(**item) for item in items]
        return [found.model_dump() for found in await asyncio.to_thread(score, asked, self.verifier, n_votes)]

    async def run(self, jobs: list[Job], limits: Limits) -> list[Outcome]:
        return await asyncio.to_thread(Sandbox(limits, self.verifier.isolation).run, jobs)


class JudgePart(Part):
    """The judge: requests that arrive together are asked together, as the engine is fastest with many.

    Ends when its engine is dead: Serve starts another, and the API asks that one.
    """

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.02)
    async def _together(self, calls: list[tuple[list[dict[str, Any]], int | None]]) -> list[list[dict[str, Any]]]:
        found: list[list[dict[str, Any]]] = [[] for _ in calls]
        for votes in {votes for _, votes in calls}:
            own = [index for index, call in enumerate(calls) if call[1] == votes]
            try:
                results = iter(await super().score([item for index in own for item in calls[index][0]], votes))
            except StageError as error:
                logging.getLogger("ray.serve").error("the judge's engine failed, starting anew: %s", error)
                os._exit(1)
            for index in own:
                found[index] = [next(results) for _ in calls[index][0]]
        return found

    async def score(self, items: list[dict[str, Any]], n_votes: int | None) -> list[dict[str, Any]]:
        return await self._together((items, n_votes))


class ServeBackend:
    """The parts as the API sees them."""

    def __init__(self, handles: dict[str, Any]) -> None:
        self.handles, self.groups = handles, frozenset(handles)

    async def score(self, items: Sequence[Item], n_votes: int | None = None) -> list[Result]:
        refuse_missing(self.groups, {GROUPS[item.kind] for item in items})
        calls = []
        for group, size in CHUNK.items():
            own = [index for index, item in enumerate(items) if GROUPS[item.kind] == group]
            calls += [(group, own[start:start + size]) for start in range(0, len(own), size)]
        answers = await asyncio.gather(*(
            self._call(group, "score", [items[index].model_dump() for index in own], n_votes) for group, own in calls))
        found = {index: Result.model_construct(**row) for (_, own), rows in zip(calls, answers, strict=True)
                 for index, row in zip(own, rows, strict=True)}
        return [found[index] for index in range(len(items))]

    async def run(self, jobs: Sequence[Job], limits: Limits) -> list[Outcome]:
        refuse_missing(self.groups, {"code"})
        return await self._call("code", "run", list(jobs), limits)

    async def _call(self, group: str, method: str, *arguments: Any) -> Any:
        error: Exception | None = None
        for _ in range(TRIES):
            try:
                return await asyncio.wait_for(getattr(self.handles[group], method).remote(*arguments), PATIENCE)
            except BackPressureError:
                raise Overloaded(f"the queue of {group} is full; send this again") from None
            except (ray.exceptions.RayActorError, DeploymentUnavailableError) as death:
                error = death
                await asyncio.sleep(PAUSE)
            except TimeoutError:
                raise Unavailable(f"{group} did not answer within {PATIENCE:g} s") from None
            except SandboxFailure as failure:
                raise Unavailable(str(failure)) from None
        raise Unavailable(f"{group} died {TRIES} times in a row: {error}")


@serve.ingress()
class Api:
    """The replica that speaks HTTP."""

    def __init__(self, handles: dict[str, Any], rules: Rules, log_file: str, principles: Sequence[str]) -> None:
        self.handles, self.rules, self.principles = handles, rules, principles
        handler = logging.handlers.RotatingFileHandler(log_file, maxBytes=64 << 20, backupCount=3)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(ServeBackend(self.handles), self.rules, self.principles)


def start(parts: Parts, host: str, port: int, rules: Rules, log_file: Path, principles: Sequence[str] = ()) -> None:
    """Deploy on the running Ray and return when requests are answered. Raises StageError when a part does not start."""
    handles = {}
    for group in parts.names():
        # no CPUs are reserved: those who work are the replica's children, sandboxes and math workers and the engine
        deployment = serve.deployment(
            JudgePart if group == "judge" else Part, name=group, num_replicas=parts.replicas,
            max_ongoing_requests=64 if group == "judge" else 2 * parts.workers, max_queued_requests=parts.queue,
            ray_actor_options={"num_cpus": 0}, graceful_shutdown_timeout_s=5)
        canaries = {"math": ("math", "exact"), "code": ("code",), "judge": ()}[group]
        handles[group] = deployment.bind(parts.judge if group == "judge" else None, parts.workers, canaries,
                                         parts.isolation)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
    api = serve.deployment(Api, name="api", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0},
                           graceful_shutdown_timeout_s=5)
    bound = api.bind(handles, rules, str(log_file), tuple(principles) or DEFAULT_PRINCIPLES)
    try:
        serve.run(bound, name="rewards", route_prefix="/")
    except RuntimeError as error:
        raise StageError(f"the service did not start: {error}") from None


def stop() -> None:
    """End the service; Ray goes on."""
    serve.shutdown()
