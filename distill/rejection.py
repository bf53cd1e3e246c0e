"""Rejection sampling: of the samples of each problem keep the shortest that are right (DeepSeek-V3, section 5.1).

The report wants data that keeps "the strengths of DeepSeek-R1 while producing responses that are concise and
effective"; so among the correct, well-formed answers the shortest wins. Like DeepSeek-R1 (section 2.3.3) it leaves out
chains that mix languages or go in circles.

Two passes: `unfit` looks at the text of each sample, `choose` at a few columns of all of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import polars as pl

from distill.review import REVIEWER, refused
from pipeline.recipe import RejectConfig
from pipeline.records import UNSCORED, Status
from pipeline.stage import StageError
from rewards.extract import split_thinking
from rewards.language import consistency

Funnel = dict[str, dict]

SAME_LANGUAGE = 0.9  # least share of words in the script of the question
WINDOW, LEAST_WINDOW = 1000, 400  # characters among which repetition is looked for
RUNAWAY = 0.1  # compressed size over size: prose has 0.4 to 0.6, one sentence over and over 0.05


def unfit(frame: pl.DataFrame, config: RejectConfig, principled: Iterable[str]) -> pl.Series:
    """Why each sample cannot be trained on whatever the others look like; null where it can.

    frame: rows of `Sample`; `principled`: the domains whose answers a judge scores by principles. Reasons: reviewer,
    no_verdict, infra_error, abstain, malformed, timeout, wrong, judge_score, truncated, too_long, bad_thinking,
    no_thinking, empty_answer, mixed_language, repetition. A sample of the original form may think unasked: RL teaches
    an expert to bring its reasoning where no system prompt calls for it (section 5.1).
    """
    verdict = pl.col("verdict").struct
    status, score = verdict.field("status"), verdict.field("score")
    by_principles = pl.col("domain").is_in(list(principled))
    by_verdict = (
        pl.when(pl.col("verdict").is_null()).then(pl.lit("no_verdict"))
        .when(refused()).then(pl.lit(REVIEWER))
        .when(status.is_in([s.value for s in UNSCORED])).then(status)
        .when(by_principles & status.is_in([Status.MALFORMED.value, Status.TIMEOUT.value])).then(status)
        .when(by_principles & (score.is_null() | (score < config.min_judge_score))).then(pl.lit("judge_score"))
        .when(~by_principles & (status != Status.CORRECT.value)).then(status)
        .when(pl.col("finish_reason") != "stop").then(pl.lit("truncated"))
        .when(pl.col("tokens") > config.max_tokens).then(pl.lit("too_long")))
    reasons = frame.select(by_verdict.otherwise(None).cast(pl.String).alias("reason"))["reason"]
    fine = reasons.is_null()
    read = frame.filter(fine).select("form", "messages", "completion")
    texts = [_unreadable(*row) for row in read.iter_rows()]
    return reasons.scatter(fine.arg_true(), texts) if texts else reasons


def _unreadable(form: str, messages: list[dict[str, str]], completion: str) -> str | None:
    parts = split_thinking(completion)
    if not parts.well_formed:
        return "bad_thinking"
    if form == "reasoning" and not parts.thought:
        return "no_thinking"
    if not parts.answer:
        return "empty_answer"
    # ASCII is one script
    if not completion.isascii() or not messages[-1]["content"].isascii():
        prompt = "\n".join(message["content"] for message in messages if message["role"] == "user")
        if consistency(completion, prompt) < SAME_LANGUAGE:
            return "mixed_language"
    return "repetition" if _goes_in_circles(completion) else None


def _goes_in_circles(text: str) -> bool:
    raw = text.encode("utf-8", "surrogatepass")
    for start in range(0, max(1, len(raw) - LEAST_WINDOW + 1), WINDOW):
        window = raw[start:start + WINDOW]
        if len(window) >= LEAST_WINDOW and len(zlib.compress(window, 1, 11)) < RUNAWAY * len(window):
            return True
    return False


def narrow(frame: pl.DataFrame, reasons: pl.Series, principled: Iterable[str]) -> pl.DataFrame:
    """What `choose` needs of each sample: numbers instead of texts."""
    return frame.select(
        pl.col("id").str.to_integer(base=16, dtype=pl.UInt64),
        pl.col("problem_id").hash().alias("problem"),
        pl.col("domain", "form").cast(pl.Categorical),
        pl.col("tokens").cast(pl.Int32),
        pl.when(pl.col("domain").is_in(list(principled))).then(pl.col("verdict").struct.field("score"))
        .otherwise(0.0).cast(pl.Float32).alias("score"),
        pl.col("completion").hash().alias("text"),
        (pl.col("verdict").struct.field("verifier") == REVIEWER).fill_null(False).alias("reviewed"),
        reasons.cast(pl.Categorical).alias("reason"))


def choose(samples: pl.DataFrame, keep: int) -> pl.Series:
    """The reasons of all samples, those of `unfit` among them; null for the `keep` best of each problem and form.

    samples: rows of `narrow`, of all parts. The shortest different completions are best; where a judge scored them,
    the best scored come first. What a reviewer let through comes before all others, and stays whatever `keep` is. New
    reasons: duplicate, not_shortest.
    """
    group = ["problem", "form"]
    fit = (samples.with_row_index("row").filter(pl.col("reason").is_null())
           .sort(*group, "reviewed", "score", "tokens", "id", descending=[False, False, True, True, False, False])
           .select("row", *group, "reviewed", pl.struct(*group, "text").is_first_distinct().alias("first")))
    place = pl.col("first").cast(pl.UInt32).cum_sum().over(group)
    lost = fit.select("row", pl.when(~pl.col("first")).then(pl.lit("duplicate"))
                      .when((place > keep) & ~pl.col("reviewed")).then(pl.lit("not_shortest"))
                      .otherwise(None).alias("why"))
    lost = lost.filter(pl.col("why").is_not_null())
    return samples["reason"].cast(pl.String).scatter(lost["row"], lost["why"])


def funnel(domains: pl.Series, reasons: pl.Series) -> Funnel:
    """{domain: {"in", "out", "lost": {reason: count}}} of samples whose reason is null where they were kept."""
    counted = pl.DataFrame({"domain": domains.cast(pl.String), "reason": reasons.cast(pl.String)})
    found: Funnel = {}
    for domain, reason, count in counted.group_by("domain", "reason").len().sort("domain", "reason").iter_rows():
        row = found.setdefault(domain, {"in": 0, "out": 0, "lost": {}})
        row["in"] += count
        if reason is None:
            row["out"] = count
        else:
            row["lost"][reason] = count
    return found


def stop_when_empty(funnel: Funnel, what: str, remedy: str) -> None:
    """Raise StageError, with the funnel of every domain, when a domain has nothing left (or there is no sample)."""
    empty = [domain for domain, row in funnel.items() if row["out"] == 0]
    if empty or not funnel:
        raise StageError(f"{what} leaves nothing for {', '.join(empty) or 'any domain'}:\n{render_funnel(funnel)}\n"
                         f"{remedy}")


def render_funnel(funnel: Funnel) -> str:
    """One line a domain: `  math: 40 in, 0 out; lost wrong 38, truncated 2`."""
    lines = []
    for domain, row in funnel.items():
        lost = ", ".join(f"{reason} {count}" for reason, count in sorted(row["lost"].items(), key=lambda x: -x[1]))
        lines.append(f"  {domain}: {row['in']} in, {row['out']} out" + (f"; lost {lost}" if lost else ""))
    return "\n".join(lines)
