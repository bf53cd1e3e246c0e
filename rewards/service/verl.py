"""verl's two services: a discriminative reward model (`/classify`, as vLLM has it) and SandboxFusion (`/run_code`)."""

from __future__ import annotations

import math
import signal
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from rewards.code import program_job
from rewards.languages import LANGUAGES
from rewards.sandbox import Limits, Outcome
from rewards.scoring import MAX_TEXT, Item, ScoringError, Text
from rewards.service.answers import prompt_of, response_of, scores_of

router = APIRouter()
RETRIED = {"/run_code": 504}  # the only status upon which verl's sandbox client tries again; others it scores as failed
MAX_MEMORY_MB = 2048


class ClassifyRequest(BaseModel):
    """input: the chat as one text, the answer after the last assistant marker."""

    model: str = ""
    input: Text


@router.post("/classify")
async def classify(asked: ClassifyRequest, request: Request) -> dict[str, Any]:
    """The judge's score of an answer by the principles of the service: this contract brings nothing to judge by."""
    item = Item(id="0", kind="principles", prompt=prompt_of(asked.input), completion=response_of(asked.input),
                principles=list(request.app.state.principles))
    score, = scores_of(await request.app.state.backend.score([item]))
    return {"id": f"classify-{request.state.request_id}", "object": "list", "created": int(time.time()),
            "model": asked.model, "data": [{"index": 0, "label": None, "probs": [score], "num_classes": 1}],
            "usage": {"prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": None}}


class RunCodeRequest(BaseModel):
    """SandboxFusion's request. files and fetch_files must be empty, as verl sends them."""

    code: Text
    language: Literal["python", "cpp", "nodejs", "java", "c", "javascript"]
    stdin: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    compile_timeout: Annotated[float, Field(gt=0, le=300)] = 10
    run_timeout: Annotated[float, Field(gt=0, le=300)] = 10
    memory_limit_MB: int = -1
    files: dict[str, str | None] = {}
    fetch_files: list[str] = []
    args: list[str] = []


class CommandResult(BaseModel):
    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float | None
    return_code: int | None
    stdout: str | None
    stderr: str | None


class RunCodeResponse(BaseModel):
    status: Literal["Success", "Failed", "SandboxError"]
    message: str = ""
    compile_result: CommandResult | None = None
    run_result: CommandResult | None = None
    executor_pod_name: str | None = None
    files: dict[str, str] = {}


@router.post("/run_code")
async def run_code(asked: RunCodeRequest, request: Request) -> RunCodeResponse:
    """Run one program. The service's own troubles are 504, upon which verl tries again, and never a failed program."""
    if asked.files or asked.fetch_files or asked.args:
        raise ScoringError("files, fetch_files and args must be empty: a program gets its stdin and nothing else")
    language = {"nodejs": "javascript"}.get(asked.language, asked.language)
    if tool := LANGUAGES[language].missing():
        raise ScoringError(f"{tool} is missing on the machine of this service; apt-get install "
                           f"{LANGUAGES[language].package}")
    seconds = math.ceil(asked.run_timeout)
    memory = asked.memory_limit_MB if 0 < asked.memory_limit_MB < MAX_MEMORY_MB else MAX_MEMORY_MB
    limits = Limits(cpu_seconds=seconds, wall_seconds=asked.run_timeout, memory_bytes=memory << 20,
                    address_bytes=max(1 << 30, memory << 21), output_bytes=1 << 20)
    outcome, = await request.app.state.backend.run([program_job(asked.code, language, [asked.stdin or ""])], limits)
    return _response(outcome)


def _response(outcome: Outcome) -> RunCodeResponse:
    if outcome.compile is not None:
        return RunCodeResponse(status="Failed", compile_result=_result(outcome.compile, outcome.seconds))
    if outcome.status == "time_limit" or (outcome.runs and outcome.runs[0]["signal"] == signal.SIGXCPU):
        return RunCodeResponse(status="Failed", run_result=CommandResult(
            status="TimeLimitExceeded", execution_time=outcome.seconds, return_code=None, stdout="", stderr=""))
    if outcome.status != "done":
        return RunCodeResponse(status="Failed", run_result=CommandResult(
            status="Finished", execution_time=outcome.seconds, return_code=-9, stdout="", stderr=outcome.status))
    result = _result(outcome.runs[0], outcome.seconds)
    return RunCodeResponse(status="Success" if result.return_code == 0 else "Failed", run_result=result)


def _result(run: dict[str, Any], seconds: float) -> CommandResult:
    code = -run["signal"] if run["signal"] else run["exit"]
    return CommandResult(status="Finished", execution_time=seconds, return_code=code, stdout=run["stdout"],
                         stderr=run["stderr"])
