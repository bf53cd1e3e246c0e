"""The five data types that carry everything through a run, and their Parquet schemas.

`Problem -> Sample -> Verdict -> Rollout -> Checkpoint`. Ids are content hashes, so the same
problem or sample has the same id in every run. Tables are Parquet with the Arrow schemas
written here; `write_table` and `read_table` are the only way in and out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def content_id(*parts: Any) -> str:
    """16 hex digits of SHA-256 over the canonical JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Status(StrEnum):
    """What a verifier found. Only `CORRECT`, `WRONG`, `MALFORMED` and `TIMEOUT` are about the answer."""

    CORRECT = "correct"
    WRONG = "wrong"
    MALFORMED = "malformed"  # no answer could be read: no box, no code block, unclosed thinking
    TIMEOUT = "timeout"  # the candidate's own work ran out of time
    INFRA_ERROR = "infra_error"  # the verifier failed; says nothing about the answer
    ABSTAIN = "abstain"  # the verifier cannot tell


UNSCORED = frozenset({Status.INFRA_ERROR, Status.ABSTAIN})


@dataclass(frozen=True)
class Verdict:
    """A verifier's finding on one completion. `score` is in [0, 1], or None when `status` is unscored."""

    status: Status
    score: float | None
    reason: str  # machine-readable code, e.g. "no_box", "wrong_output"
    verifier: str  # "math", "exact", "code", "judge"
    version: str
    seconds: float = 0.0
    evidence: str = ""  # at most some hundred characters a person can read

    def __post_init__(self) -> None:
        if (self.score is None) != (self.status in UNSCORED):
            raise ValueError(f"verdict {self.status.value} with score {self.score}: a score of None and only "
                             "None goes with infra_error and abstain")


JUDGED_KINDS = frozenset({"principles", "match"})  # no rule decides but a judge


@dataclass(frozen=True)
class Check:
    """How an answer to a problem is checked.

    kind: "math" (boxed answer, mathematical equality with `reference`), "exact" (boxed answer, normalised
    text equality), "code" (`tests` run on the code block), "principles" (a judge applies `principles`), "match" (a
    judge compares with the free-form `reference`).
    tests: JSON text, a list of {"args": [...], "expected": value} (function calls of `entry_point`) or
    {"stdin": text, "expected": text} (whole programs); for kind "code" only. {"assert_code": text} holds
    HumanEval's `check(candidate)` form.
    """

    kind: str
    reference: str | None = None
    language: str | None = None  # a key of rewards.languages.LANGUAGES
    entry_point: str | None = None
    tests: str | None = None
    principles: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        """Whether no rule decides but a judge."""
        return self.kind in JUDGED_KINDS


@dataclass(frozen=True)
class Problem:
    """One task. `messages` is the user's side; `solution` is a worked chain and `answer` the final text."""

    id: str
    domain: str  # "math" | "code" | "logic" | "writing" | any name the recipe gives
    skill: str
    messages: tuple[Message, ...]
    check: Check
    source: str  # "generated:math", "gsm8k:train.jsonl"
    split: str  # "corpus" | "sft" | "preference" | "rl" | "heldout"
    solution: str | None = None  # the reasoning, no box
    answer: str | None = None  # what is shown to the user: ends in the box, the code block or the text

    @staticmethod
    def make_id(messages: Iterable[Message], check: Check) -> str:
        return content_id(list(messages), dataclasses.asdict(check))


@dataclass(frozen=True)
class Sample:
    """A completion for a problem in one of the two forms of the report (DeepSeek-V3, section 5.1)."""

    id: str
    problem_id: str
    domain: str
    form: str  # "original" (problem alone) | "reasoning" (reflective system prompt + problem)
    messages: tuple[Message, ...]  # the prompt as sent
    completion: str
    checkpoint: str  # digest of the generator
    sampling: str  # JSON: temperature, top_p, max_tokens, seed, index
    finish_reason: str  # "stop" | "length"
    tokens: int
    verdict: Verdict | None = None
    provenance: str = "{}"  # JSON

    @staticmethod
    def make_id(problem_id: str, form: str, checkpoint: str, sampling: str, completion: str) -> str:
        return content_id(problem_id, form, checkpoint, sampling, completion)


@dataclass(frozen=True)
class Rollout:
    """One completion of a GRPO step with the engine's log-probs (same length as `completion_ids`)."""

    id: str
    problem_id: str
    domain: str
    step: int
    sample_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int  # optimizer steps behind the weights that sampled it
    text: str
    reward: float | None
    parts: dict[str, float | None]  # what the reward is the weighted sum of; accuracy is None where it is
    advantage: float | None
    verdict: Verdict
    # int16 [prompt + completion - 1, layers, top_k], the experts each token went to; None where the engine cannot say
    routes: bytes | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder and the digest over its tensors' checksums."""

    path: str
    digest: str


_VERDICT = pa.struct([("status", pa.string()), ("score", pa.float64()), ("reason", pa.string()),
                      ("verifier", pa.string()), ("version", pa.string()), ("seconds", pa.float64()),
                      ("evidence", pa.string())])
_PARTS = pa.struct([(name, pa.float64()) for name in ("accuracy", "format", "language")])
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_CHECK = pa.struct([("kind", pa.string()), ("reference", pa.string()), ("language", pa.string()),
                    ("entry_point", pa.string()), ("tests", pa.string()), ("principles", pa.list_(pa.string()))])

SCHEMAS: dict[type, pa.Schema] = {
    Problem: pa.schema([("id", pa.string()), ("domain", pa.string()), ("skill", pa.string()),
                        ("messages", _MESSAGES), ("check", _CHECK), ("source", pa.string()),
                        ("split", pa.string()), ("solution", pa.string()), ("answer", pa.string())]),
    Sample: pa.schema([("id", pa.string()), ("problem_id", pa.string()), ("domain", pa.string()),
                       ("form", pa.string()), ("messages", _MESSAGES), ("completion", pa.string()),
                       ("checkpoint", pa.string()), ("sampling", pa.string()), ("finish_reason", pa.string()),
                       ("tokens", pa.int64()), ("verdict", _VERDICT), ("provenance", pa.string())]),
    Rollout: pa.schema([("id", pa.string()), ("problem_id", pa.string()), ("domain", pa.string()),
                        ("step", pa.int64()), ("sample_index", pa.int64()),
                        ("prompt_ids", pa.list_(pa.int32())), ("completion_ids", pa.list_(pa.int32())),
                        ("logprobs", pa.list_(pa.float32())), ("policy_version", pa.int64()),
                        ("text", pa.string()), ("reward", pa.float64()), ("parts", _PARTS),
                        ("advantage", pa.float64()),
                        ("verdict", _VERDICT), ("routes", pa.binary())]),
}

T = TypeVar("T", Problem, Sample, Rollout)


def as_table(records: Iterable[T], record_type: type[T]) -> pa.Table:
    """Records as an Arrow table of their schema."""
    return pa.Table.from_pylist([dataclasses.asdict(record) for record in records], schema=SCHEMAS[record_type])


def write_table(path: Path, records: Iterable[T], record_type: type[T]) -> int:
    """Write records as one Parquet file (atomic: aside, fsync, rename), its folder made; returns the rows."""
    table = as_table(records, record_type)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    pq.write_table(table, aside, compression="zstd")
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    return table.num_rows


def read_table(path: Path, record_type: type[T], filters: list[tuple[str, str, Any]] | None = None) -> list[T]:
    """Read a table written by `write_table`, or a folder of them in name order.

    filters: (column, operator, value) that all rows read meet. Raises ValueError when it has another schema.
    """
    table = pq.read_table(path, filters=filters)
    expected = SCHEMAS[record_type]
    if not table.schema.equals(expected):
        raise ValueError(f"{path}: not a table of {record_type.__name__} (its columns are {table.schema.names})")
    return [_from_row(record_type, row) for row in table.to_pylist()]


def _from_row(record_type: type[T], row: dict[str, Any]) -> T:
    if row.get("verdict") is not None:
        row["verdict"] = Verdict(**{**row["verdict"], "status": Status(row["verdict"]["status"])})
    if "check" in row:
        row["check"] = Check(**{**row["check"], "principles": tuple(row["check"]["principles"] or ())})
    for key in ("messages", "prompt_ids", "completion_ids", "logprobs"):
        if key in row:
            row[key] = tuple(row[key])
    return record_type(**row)
