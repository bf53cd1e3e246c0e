"""Calling the service from Python: a client, and a reward function for TRL's trainers."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from rewards.scoring import Item, Kind, Result

log = logging.getLogger(__name__)
BATCH = 256
RETRIED = frozenset({429, 500, 502, 503, 504})


class RewardServiceError(RuntimeError):
    """The service refused a request: the items, the token or the url are wrong."""


class ServiceUnreachable(RuntimeError):
    """Nobody answered, or the service could not tell, for as long as the client was patient."""


class RewardClient:
    """Scores items at the service under `url`, in batches; use `with`, or `close` it.

    patience: seconds over which a request that meets a full queue, a restart or a broken connection is sent again.
    Scoring changes nothing at the service, so sending twice does no harm.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 600.0, patience: float = 120.0) -> None:
        self.patience = patience
        self.http = httpx.Client(base_url=url, timeout=httpx.Timeout(timeout, connect=10.0),
                                 headers={"Authorization": f"Bearer {token}"} if token else {})

    def score(self, items: Sequence[Item | Mapping[str, Any]], n_votes: int | None = None) -> list[Result]:
        """A result per item, in order. Raises RewardServiceError or ServiceUnreachable."""
        rows = [item.model_dump(exclude_none=True) if isinstance(item, Item) else dict(item) for item in items]
        results: list[Result] = []
        for start in range(0, len(rows), BATCH):
            body = {"items": rows[start:start + BATCH], **({"n_votes": n_votes} if n_votes else {})}
            results += [Result.model_validate(row) for row in self._post(body)["results"]]
        return results

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        until, pause = time.monotonic() + self.patience, 0.25
        while True:
            try:
                answer = self.http.post("/v1/score", json=body)
                if answer.status_code not in RETRIED:
                    break
                problem, wait = f"{answer.status_code} {answer.text[:200]}", float(answer.headers.get("Retry-After", 0))
            except httpx.TransportError as error:
                problem, wait = f"{type(error).__name__}: {error}", 0.0
            if time.monotonic() + max(wait, pause) > until:
                raise ServiceUnreachable(f"{self.http.base_url} gave no answer within {self.patience:g} s; the last "
                                         f"try: {problem}")
            time.sleep(max(wait, pause * random.uniform(0.5, 1.5)))
            pause = min(2 * pause, 8.0)
        if answer.status_code != 200:
            raise RewardServiceError(f"{self.http.base_url} refused the request: {answer.status_code} "
                                     f"{answer.text[:500]}")
        return answer.json()

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def posttrain_reward(url: str, kind: Kind = "math", token: str | None = None, patience: float = 120.0,
                     **fields: str) -> Callable[..., list[float | None]]:
    """A reward function for TRL: `GRPOTrainer(reward_funcs=posttrain_reward("http://localhost:8000"))`.

    fields: item field -> column of the data set, where the two names differ (`reference="solution"`); a column named
    like a field is taken as it is. A column `kind` decides for each row. Answers that cannot be scored, or a service
    that cannot be reached within `patience` seconds, give None, which TRL leaves out, and never 0. A request that the
    service refuses raises RewardServiceError.
    """
    client = RewardClient(url, token, patience=patience)
    columns = {name: fields.get(name, name) for name in ("reference", "tests", "language", "entry_point", "principles")}

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **data: Any) -> list[float | None]:
        kinds = data.get(fields.get("kind", "kind")) or [kind] * len(completions)
        items = [{"id": str(index), "kind": kinds[index], "prompt": _text(prompt, "user"),
                  "completion": _text(completion, "assistant"),
                  **{name: data[column][index] for name, column in columns.items()
                     if column in data and data[column][index] is not None}}
                 for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))]
        try:
            return [result.score for result in client.score(items)]
        except ServiceUnreachable as error:
            log.warning("no rewards for %d completions: %s", len(items), error)
            return [None] * len(items)

    reward.__name__ = f"posttrain_{kind}"
    return reward


def _text(turn: Any, role: str) -> str:
    """A turn as text: TRL gives strings, or lists of chat messages."""
    if isinstance(turn, str):
        return turn
    return "\n".join(str(message["content"]) for message in turn if message.get("role") == role)
