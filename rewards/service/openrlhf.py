"""OpenRLHF's remote reward model: `--remote_rm_url http://HOST/get_reward`."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from rewards.scoring import ScoringError
from rewards.service.answers import item_of, response_of, scores_of

router = APIRouter()


class RewardRequest(BaseModel):
    """query holds prompt and response with special tokens; with several URLs all but one receive empty lists."""

    query: list[str]
    prompts: list[str] = []
    labels: list[Any] = []


@router.post("/get_reward")
async def get_reward(asked: RewardRequest, request: Request,
                     kind: Literal["math", "exact", "match"] = "math") -> dict[str, Any]:
    """A label is the reference of `kind`, or an object with the fields of an item. OpenRLHF knows no null: 503, upon
    which it tries again, when one of the answers cannot be scored.
    """
    if not len(asked.query) == len(asked.prompts) == len(asked.labels):
        raise ScoringError(f"query, prompts and labels have {len(asked.query)}, {len(asked.prompts)} and "
                           f"{len(asked.labels)} entries; give --label_key so that every query has its label")
    items = [item_of(str(index), prompt, response_of(query, prompt), label, kind) for index, (query, prompt, label)
             in enumerate(zip(asked.query, asked.prompts, asked.labels, strict=True))]
    results = await request.app.state.backend.score(items) if items else []
    scores = scores_of(results)
    logs = {"malformed": [float(result.status == "malformed") for result in results]} if results else {}
    return {"rewards": scores, "scores": scores, "extra_logs": logs}
