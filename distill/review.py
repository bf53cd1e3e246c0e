"""A person's word on samples a model judged: which to look at, what was decided, and how that changes the set.

DeepSeek-V3 lets people "verify the accuracy and correctness" of its non-reasoning data (section 5.1). They see few of
many samples, so they get those where the judge's word is worth least: the scores nearest the floor.

A decision makes the reviewer the verifier of the sample: what was accepted or edited is correct, what was rejected is
lost with the reason "reviewer".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.recipe import RejectConfig
from pipeline.records import SCHEMAS, Sample, Status, Verdict
from pipeline.stage import StageError
from pipeline.tables import Table
from rewards.extract import split_thinking

REVIEWER = "reviewer"  # the verifier of a reviewed sample, and the reason of a loss
HALF = 0.5  # where a judge that compares with a reference divides right from wrong
QUEUE = pa.schema([*SCHEMAS[Sample], pa.field("lost", pa.string())])  # lost: why, or null for a kept sample
_NEARLY = ("judge_score", Status.WRONG.value)  # losses that a judge's score decided
_REASONS = {"accept": "accepted", "edit": "edited", "reject": "refused"}


class Decision(BaseModel):
    """One line of a review file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(min_length=1)]
    decision: Literal["accept", "edit", "reject"]
    completion: str | None = Field(None, description="the new one; with edit alone")
    note: str = ""
    reviewer: str = ""
    time: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Decision:
        if (self.decision == "edit") != (self.completion is not None):
            raise ValueError("an edit, and nothing else, has a completion")
        return self


def read_decisions(path: Path) -> dict[str, Decision]:
    """The last decision on each sample, by its id. Raises StageError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"reject.reviews: {path}: {getattr(error, 'strerror', None) or error}; give the file that "
                         "posttrain review wrote") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                decision = Decision.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise StageError(f"{path}, line {number}: {where + ': ' if where else ''}"
                                 f"{first['msg'].removeprefix('Value error, ')}; mend or delete the line") from None
            found[decision.id] = decision
    return found


def revised(sample: Sample, decision: Decision) -> Sample:
    """The sample as the reviewer left it; an edited one has a new id, and its old one in its provenance.

    The tokens of an edited sample are those of the old one in proportion to the text.
    """
    good = decision.decision != "reject"
    verdict = Verdict(Status.CORRECT if good else Status.WRONG, float(good), _REASONS[decision.decision], REVIEWER,
                      decision.reviewer or "unnamed", evidence=decision.note[:300])
    if decision.completion is None:
        return dataclasses.replace(sample, verdict=verdict)
    completion = decision.completion
    return dataclasses.replace(
        sample, verdict=verdict, completion=completion, finish_reason="stop",
        id=Sample.make_id(sample.problem_id, sample.form, sample.checkpoint, sample.sampling, completion),
        tokens=max(1, round(sample.tokens * len(completion) / max(1, len(sample.completion)))),
        provenance=json.dumps({**json.loads(sample.provenance), "edited_from": sample.id,
                               "reviewer": decision.reviewer}))


def apply(frame: pl.DataFrame, decisions: Mapping[str, Decision]) -> pl.DataFrame:
    """Samples as the reviewers left them: the same rows in the same order, with all columns of `Sample`.

    Those rejected have a verdict of REVIEWER that is not correct; see `refused`.
    """
    places = frame["id"].is_in(list(decisions)).arg_true()
    if not len(places):
        return frame
    rows = frame[places].to_dicts()
    done = [dataclasses.asdict(revised(_sample(row), decisions[row["id"]])) for row in rows]
    changed = pl.DataFrame(pl.from_arrow(pa.Table.from_pylist(done, schema=SCHEMAS[Sample]))).select(
        pl.col(name).cast(kind) for name, kind in frame.schema.items())
    return (pl.concat([frame.with_row_index().remove(pl.col("index").is_in(places.implode())),
                       changed.with_columns(index=places).select("index", *frame.columns)])
            .sort("index").drop("index"))


def refused() -> pl.Expr:
    """Whether a reviewer rejected the sample, from its verdict."""
    verdict = pl.col("verdict").struct
    by_reviewer = (verdict.field("verifier") == REVIEWER) & (verdict.field("status") != Status.CORRECT.value)
    return by_reviewer.fill_null(False).alias("refused")


def _sample(row: dict[str, Any]) -> Sample:
    verdict = row["verdict"] and Verdict(**{**row["verdict"], "status": Status(row["verdict"]["status"])})
    return Sample(**{**row, "verdict": verdict, "messages": tuple(row["messages"])})


def queue(verified: Path, lost: pl.DataFrame, config: RejectConfig, principled: Collection[str],
          reviewed: Collection[str] = ()) -> pa.Table:
    """What a person should look at, least certain first: rows of QUEUE, at most `config.review` of each domain.

    verified: the samples with the judge's verdicts. lost: id and reason of those that rejection lost; one lost for
    other reasons than its score, or malformed, is not asked about. principled: the domains judged by principles, whose
    floor is `config.min_judge_score`; where a judge compares with a reference it is one half. reviewed: ids that are
    decided. Follows from its arguments alone.
    """
    table = Table(verified)
    columns = ["id", "domain", "verdict.verifier", "verdict.score"]
    distance = (pl.col("verdict.score") - pl.when(pl.col("domain").cast(pl.String).is_in(list(principled)))
                .then(config.min_judge_score).otherwise(HALF)).abs()
    judged = (pl.col("verdict.verifier").cast(pl.String) == "judge") & pl.col("verdict.score").is_not_null()
    chosen = (table.narrow(columns, ["domain", "verdict.verifier"]).filter(judged)
              .join(lost.select("id", lost=pl.col("reason").cast(pl.String)), on="id", how="left")
              .filter(pl.col("lost").is_null() | pl.col("lost").is_in(_NEARLY),
                      ~pl.col("id").is_in(list(reviewed)))
              .with_columns(distance=distance).sort("distance", "id")
              .filter(pl.int_range(pl.len()).over("domain") < config.review))
    rows = table.rows(chosen["place"].to_list(), SCHEMAS[Sample].names)
    return pa.Table.from_pylist([{**row, "lost": why} for row, why in zip(rows, chosen["lost"], strict=True)
                                 if fault(row["form"], row["completion"]) is None], schema=QUEUE)


def fault(form: str, completion: str) -> str | None:
    """What keeps a completion from being a sample of its form, in words; None when nothing does."""
    parts = split_thinking(completion)
    if not parts.well_formed:
        return "thinking stands once, first, between <think> and </think>"
    if form == "reasoning" and not parts.thought:
        return "the reasoning form needs thinking between <think> and </think>"
    return None if parts.answer else "there is no answer after the thinking"
