"""slime's remote reward: `--rm-type remote_rm --rm-url http://HOST/remote_rm`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from rewards.service.answers import item_of, response_of, scores_of, text_of

router = APIRouter()


class RemoteRequest(BaseModel):
    prompt: str | list[dict[str, Any]]
    response: str
    label: Any = None


@router.post("/remote_rm")
async def remote_rm(asked: RemoteRequest, request: Request, kind: Literal["math", "exact", "match"] = "math",
                    key: str | None = None) -> float | dict[str, Any]:
    """The reward as a number; with `?key=NAME`, as slime's `--reward-key NAME` wants it, an object with that key. slime
    knows no null: 503, upon which it tries again, when the answer cannot be scored.
    """
    item = item_of("0", text_of(asked.prompt), response_of(asked.response, ""), asked.label, kind)
    result, = await request.app.state.backend.score([item])
    score, = scores_of([result])
    return score if key is None else {key: score, "status": result.status, "reason": result.reason}
