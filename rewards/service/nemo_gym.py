"""NeMo Gym's resources server: `/seed_session` and `/verify`, also under its `/ng-rollout/ID` prefix."""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from rewards.scoring import ScoringError
from rewards.service.answers import item_of, read_json, text_of

router = APIRouter()
MAX_UNPACKED = 16 << 20


class VerifyRequest(BaseModel):
    """The row, its fields at the top level: expected_answer, or verifier_metadata.unit_tests, or unit_tests."""

    model_config = ConfigDict(extra="allow")

    responses_create_params: dict[str, Any]
    response: dict[str, Any]


@router.post("/seed_session")
@router.post("/ng-rollout/{rollout}/seed_session", include_in_schema=False)
async def seed_session() -> dict[str, Any]:
    """Nothing to prepare: a verdict depends on its request alone."""
    return {}


@router.post("/verify")
@router.post("/ng-rollout/{rollout}/verify", include_in_schema=False)
async def verify(asked: VerifyRequest, request: Request) -> dict[str, Any]:
    """The request with its reward. An answer without a score has `mask_sample`, which keeps its 0 out of training."""
    row = asked.model_extra or {}
    prompt = text_of(asked.responses_create_params.get("input"))
    item = item_of("0", prompt, _text(asked.response.get("output")), _label(row), "math")
    result, = await request.app.state.backend.score([item])
    unknown = result.score is None
    return {**asked.model_dump(), "reward": 0.0 if result.score is None else result.score, "mask_sample": unknown,
            "failure_kind": f"posttrain:{result.status}" if unknown else None,
            "failure_reason": f"{result.reason}: {result.evidence}" if unknown else None,
            "verdict": result.status, "verdict_reason": result.reason}


def _text(output: Any) -> str:
    """What the messages among the entries of a response say."""
    messages = [entry for entry in output or [] if entry.get("type") == "message"] if _objects(output or []) else None
    if messages is None or not all(_objects(message.get("content") or []) for message in messages):
        raise ScoringError("response.output and the content of its messages must be lists of objects")
    texts = [part.get("text") for message in messages for part in message.get("content") or []
             if part.get("type") == "output_text"]
    if not all(isinstance(text, str) for text in texts):
        raise ScoringError("response.output: the text of each output_text must be a text")
    return "".join(texts)


def _objects(entries: Any) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)


def _label(row: dict[str, Any]) -> Any:
    metadata = row.get("verifier_metadata")
    packed = (metadata.get("unit_tests") if isinstance(metadata, dict) else None) or row.get("unit_tests")
    if packed is None:
        if row.get("expected_answer") in (None, ""):
            raise ScoringError("the row has neither expected_answer nor unit_tests")
        return row["expected_answer"]
    tests = _unpacked(packed)
    inputs, outputs, name = tests.get("inputs"), tests.get("outputs"), tests.get("fn_name")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) and inputs
            and all(isinstance(text, str) for text in (*inputs, *outputs))):
        raise ScoringError("unit_tests: inputs and outputs must be lists of texts of the same length")
    if not name:
        return {"kind": "code", "tests": [{"stdin": given, "expected": wanted}
                                          for given, wanted in zip(inputs, outputs, strict=True)]}
    try:  # a line of JSON per argument
        calls = [{"args": [read_json(line) for line in given.splitlines() if line.strip()],
                  "expected": read_json(wanted)} for given, wanted in zip(inputs, outputs, strict=True)]
    except ValueError as error:
        raise ScoringError(f"unit_tests: with fn_name, inputs and outputs are JSON: {error}") from None
    return {"kind": "code", "entry_point": name, "tests": calls}


def _unpacked(tests: Any) -> dict[str, Any]:
    if not isinstance(tests, dict):
        raise ScoringError("unit_tests must be an object")
    if "packed" not in tests:
        return tests
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(base64.b64decode(tests["packed"], validate=True), MAX_UNPACKED)
        if reader.unconsumed_tail:
            raise ScoringError(f"unit_tests.packed holds more than {MAX_UNPACKED} bytes")
        return {**read_json(text), "fn_name": tests.get("fn_name")}
    except (zlib.error, binascii.Error, ValueError, TypeError) as error:
        if isinstance(error, ScoringError):
            raise
        raise ScoringError(f"unit_tests.packed is not base64 of compressed JSON: {error}") from None
