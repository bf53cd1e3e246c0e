"""Rollouts for a person to read: a few per domain, over the whole training and all kinds of verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pipeline.report_charts import absent, fold, number, tag, text
from pipeline.report_data import STATUSES, RunView

PER_DOMAIN = 10
MOST_CHARACTERS = 6000  # of one text; `posttrain show` prints it whole


def rollouts_section(run: RunView) -> str:
    """Each domain's rollouts of `rl`, or of its expert's training while `rl` has none."""
    parts = []
    for domain in run.domains:
        stage = next((name for name in ("rl", f"expert-{domain}-rl") if run.file(name, "rollouts.parquet")), None)
        if stage is None:
            parts.append(tag("h3", text(domain)) + absent("Not there yet:", "no GRPO training of it has finished."))
            continue
        path = run.file(stage, "rollouts.parquet")
        assert path is not None
        chosen = choose(path, domain)
        heading = tag("h3", text(domain), " ", tag("small", text(f"{len(chosen)} of {stage}")))
        parts.append(heading + _cards(run, stage, path, chosen))
    intro = tag("p", "Chosen by rule, not by eye: each kind of verdict that occurs gets its share, spread over the "
                     "steps of the training. The text is what the model wrote, character by character.", class_="lead")
    return intro + "".join(parts)


def choose(path: Path, domain: str, wanted: int = PER_DOMAIN) -> list[int]:
    """Row numbers of up to `wanted` rollouts of a domain, in order of the table.

    Every verdict status gets an even share as far as it has rows (the rarest may be short and the others fill up);
    inside a status rows lie evenly over the steps, at different problems where there are any.
    """
    table = pq.ParquetFile(path).read(columns=["domain", "step", "problem_id", "verdict.status"]).flatten()
    places = pc.indices_nonzero(pc.equal(table["domain"], domain)).to_pylist()
    table = table.take(places)
    rows = list(zip(places, table["step"].to_pylist(), table["problem_id"].to_pylist(),
                    table["verdict.status"].to_pylist(), strict=True))
    kinds = [found for status in STATUSES if (found := [row for row in rows if row[3] == status])]
    chosen: list[int] = []
    for position, kind in enumerate(sorted(kinds, key=len)):
        share = -(-(wanted - len(chosen)) // (len(kinds) - position))
        chosen += [row[0] for row in _spread(sorted(kind, key=lambda row: row[1]), share)]
    return sorted(chosen)


def _spread(rows: Sequence[tuple[int, int, str, str]], count: int) -> list[tuple[int, int, str, str]]:
    """`count` of the rows at even distances, one step to the side where the problem was chosen before."""
    if len(rows) <= count:
        return list(rows)
    picked: list[tuple[int, int, str, str]] = []
    for index in range(count):
        begin, end = index * len(rows) // count, (index + 1) * len(rows) // count
        middle = (begin + end) // 2
        nearest = sorted(range(begin, end), key=lambda place, middle=middle: abs(place - middle))
        seen = {row[2] for row in picked}
        picked.append(rows[next((place for place in nearest if rows[place][2] not in seen), middle)])
    return picked


def _cards(run: RunView, stage: str, path: Path, chosen: Sequence[int]) -> str:
    columns = ["id", "problem_id", "step", "policy_version", "text", "reward", "parts", "advantage", "verdict"]
    records = ds.dataset(path, format="parquet").scanner(columns=columns, use_threads=False).take(chosen).to_pylist()
    problems = _problems(run, {record["problem_id"] for record in records})
    forms = {(line["step"], line["prompt_id"]): line["form"] for line in run.lines(stage, "ledger.jsonl")
             if "form" in line}
    return "".join(_card(run, stage, row, record, problems.get(record["problem_id"]),
                         forms.get((record["step"], record["problem_id"])))
                   for row, record in zip(chosen, records, strict=True))


def _problems(run: RunView, ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    path = run.file("problems", "problems.parquet")
    if path is None:
        return {}
    table = ds.dataset(path, format="parquet").to_table(
        columns=["id", "messages", "check", "skill"], filter=ds.field("id").isin(sorted(ids)))
    return {row["id"]: row for row in table.to_pylist()}


def _card(run: RunView, stage: str, row: int, record: dict[str, Any], problem: dict[str, Any] | None,
          form: str | None) -> str:
    verdict = record["verdict"]
    reward, advantage = record["reward"], record["advantage"]
    summary = (tag("span", text(verdict["status"]), class_=f"chip v-{verdict['status']}") +
               tag("span", text(verdict["reason"]), class_="reason") +
               tag("span", text(problem["skill"] if problem else ""), class_="reason dim") +
               tag("span", f"step {record['step']}", class_="dim") +
               tag("span", f"reward {'none' if reward is None else number(reward)}", class_="dim") +
               tag("span", f"advantage {'none' if advantage is None else format(advantage, '+.2f')}", class_="dim"))
    prompt = "".join(_field(message["role"], message["content"]) for message in problem["messages"]) if problem else \
        absent("The problem is not there:", f"{record['problem_id']} (problems.parquet was removed).")
    score = "none" if verdict["score"] is None else number(verdict["score"])
    facts = [("verdict", f"{verdict['status']}, {verdict['reason']}; score {score}; by {verdict['verifier']} "
                         f"{verdict['version']} in {number(verdict['seconds'])} s"),
             ("reward", ", ".join(f"{name} {number(value)}" for name, value in record["parts"].items()
                                  if value is not None) + ", each times its weight"),
             ("asked", {"reasoning": "with the reflective system prompt before it", None: "form not recorded",
                        "original": "as it stands"}.get(form, form)),
             ("ids", f"problem {record['problem_id']}, policy version {record['policy_version']}"),
             ("whole", f"posttrain show {run.directory.root} {stage} --sample {row}")]
    reference = problem["check"]["reference"] if problem else None
    return fold(summary, prompt + _field("the model wrote", record["text"], thought=True) +
                (_field("reference answer", reference) if reference else "") +
                (_field("evidence of the verifier", verdict["evidence"]) if verdict["evidence"] else "") +
                tag("dl", *(tag("dt", text(name)) + tag("dd", text(value)) for name, value in facts)), class_="rollout")


def _field(name: str, content: str, thought: bool = False) -> str:
    left_out = len(content) - MOST_CHARACTERS
    shown = content if left_out <= 0 else content[:MOST_CHARACTERS]
    head, end, rest = shown.partition("</think>") if thought else ("", "", shown)
    inside = (tag("span", text(head + end), class_="thought") + text(rest)) if end else text(shown)
    # a browser drops the first line break of a pre; this one, not one of the text
    return tag("div", tag("h4", text(name)),
               tag("pre", "\n", inside or tag("span", "(empty)", class_="thought"), tabindex="0", dir="ltr"),
               tag("p", f"{left_out:,} more characters", class_="note") if left_out > 0 else "")
