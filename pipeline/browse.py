"""Samples as a person reads them in a terminal: sums, rows, all attempts at a problem, two sets next to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from pipeline.lineage import Artifacts, follow
from pipeline.sample_set import SampleSet
from pipeline.visible import one_line, visible

EXCERPT = 100  # characters of a completion in a list
GROUP = ["domain", "form"]


def summary(index: pl.DataFrame) -> list[dict[str, Any]]:
    """Per domain and form: samples, share, mean_tokens, p95_tokens, mean_score, statuses {status: samples}, and lost
    {reason: samples} where samples are lost.
    """
    tokens = pl.col("tokens")
    rows = index.group_by(GROUP).agg(
        samples=pl.len(), mean_tokens=tokens.mean(), p95_tokens=tokens.quantile(0.95), mean_score=pl.col("score").mean()
    ).with_columns(share=pl.col("samples") / max(1, len(index))).cast({column: pl.String for column in GROUP})
    found = {(row["domain"], row["form"]): row for row in rows.sort(GROUP).to_dicts()}
    for column, name in (("status", "statuses"), ("lost", "lost")):
        if column in index.columns:
            counted = index.drop_nulls(column).group_by(*GROUP, column).len().cast({column: pl.String})
            for row in found.values():
                row[name] = {}
            for domain, form, value, count in counted.sort("len", column, descending=[True, False]).iter_rows():
                found[domain, form][name][value] = count
    return list(found.values())


def print_summary(title: str, index: pl.DataFrame, console: Console) -> None:
    lost = "lost" in index.columns
    grid = _grid(("domain", "form", "samples", "share", "mean tokens", "p95 tokens", "mean score",
                  "lost because of" if lost else "verdicts"), right=range(2, 7))
    for row in summary(index):
        counts = row["lost"] if lost else row["statuses"]
        _add(grid, row["domain"], row["form"], f"{row['samples']:,}", f"{100 * row['share']:.1f}%",
             _number(row["mean_tokens"]), _number(row["p95_tokens"]), _number(row["mean_score"], 2),
             ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    console.print(Text(f"{visible(title)}: {len(index):,} samples"))
    console.print(grid)


def print_samples(samples: Sequence[dict[str, Any]], places: Sequence[int], console: Console) -> None:
    """A line or two for each; `#` is the number that `posttrain show` takes."""
    lost = any("lost" in sample for sample in samples)
    grid = _grid(("#", "id", "problem", "domain", "form", "tokens", "verdict", *(["lost because of"] if lost else []),
                  "prompt and completion"), right=(0, 5))
    for place, sample in zip(places, samples, strict=True):
        because = [_lost(sample)] if lost else []
        prompt = sample["messages"][-1]["content"] if sample["messages"] else ""
        _add(grid, str(place), sample["id"], sample["problem_id"], sample["domain"], sample["form"],
             f"{sample['tokens']:,}", _verdict(sample), *because,
             f"{one_line(prompt, EXCERPT)}\n{one_line(sample['completion'], EXCERPT)}")
    console.print(grid)


def attempts(samples: SampleSet, index: pl.DataFrame) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The problem and the whole samples of one problem; in a run, `fate` of each says what became of it."""
    found = samples.samples(index)
    problem = samples.problems([found[0]["problem_id"]]).get(found[0]["problem_id"]) if found else None
    if samples.run is not None and samples.stage in ("verify", "generate"):
        artifacts = Artifacts(samples.run)
        verify = next((manifest for manifest in artifacts.manifests if manifest["stage"] == "verify"), None)
        fates = follow(artifacts, verify, [sample["id"] for sample in found]) if verify else {}
        for sample in found:
            sample["fate"] = fates[sample["id"]].steps if fates else ["not verified yet"]
    return problem, found


def print_attempts(problem: dict[str, Any] | None, samples: Sequence[dict[str, Any]], console: Console) -> None:
    first = samples[0]
    console.print(Text(f"problem {visible(first['problem_id'])}, {visible(first['domain'])}", style="bold cyan"))
    messages = problem["messages"] if problem else first["messages"]
    for message in messages:
        console.print(Text(f"{visible(message['role'])}: {visible(message['content'])}"), soft_wrap=True)
    if problem:
        check = problem["check"]
        told = check["reference"] or "; ".join(check["principles"] or ()) or "no reference"
        console.print(Text(f"checked by {visible(check['kind'])}: {visible(told)}"), soft_wrap=True)
    grid = _grid(("form", "id", "tokens", "verdict", "what became of it", "answer"), right=(2,))
    for sample in sorted(samples, key=lambda sample: sample["form"]):
        fate = sample.get("fate") or ([f"lost: {_lost(sample)}"] if "lost" in sample else [sample.get("split", "")])
        _add(grid, sample["form"], sample["id"], f"{sample['tokens']:,}", _verdict(sample), "\n".join(fate),
             one_line(answer(sample["completion"]), 4 * EXCERPT))
    console.print(grid)


def answer(completion: str) -> str:
    """What follows the thinking."""
    return completion.rpartition("</think>")[2].strip()


def _verdict(sample: dict[str, Any]) -> str:
    verdict = sample["verdict"]
    if verdict is None:
        return "none yet"
    score = "" if verdict["score"] is None or verdict["verifier"] != "judge" else f" {verdict['score']:.2f}"
    return f"{verdict['status']}{score} ({verdict['reason']})"


def _lost(sample: dict[str, Any]) -> str:
    return f"{sample['lost']}, like {sample['other']}" if sample.get("other") else sample["lost"]


def compare(one: SampleSet, first: pl.DataFrame, other: SampleSet, second: pl.DataFrame, limit: int) -> dict[str, Any]:
    """Two sets next to each other.

    groups: per domain and form, samples, mean tokens and mean score, a pair each. in_both, only: samples by id;
    problems_in_both, problems_only; answers: pairs of problem and form in both sets, `compared` where they do not hold
    the same samples, and `different` of those that have no answer, after the thinking, in common; examples: `limit` of
    them.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for side, index in enumerate((first, second)):
        for row in summary(index):
            group = groups.setdefault((row["domain"], row["form"]), {
                "domain": row["domain"], "form": row["form"], "samples": [0, 0], "mean_tokens": [None, None],
                "mean_score": [None, None]})
            for name in ("samples", "mean_tokens", "mean_score"):
                group[name][side] = row[name]
    only = [here.join(there, on="id", how="anti", maintain_order="left") for here, there in
            ((first, second), (second, first))]
    problems = [index["problem_id"].n_unique() for index in (first, second)]
    shared = first.select("problem_id").unique().join(second.select("problem_id").unique(), on="problem_id")
    pairs, different = _different_answers(((one, first, only[0]), (other, second, only[1])))
    examples = []
    for problem_id, form, *places in different.head(limit).select("problem_id", "form", "place", "place_right"
                                                                 ).iter_rows():
        found = [samples.table.rows([place], ["id", "completion"])[0] for samples, place
                 in zip((one, other), places, strict=True)]
        examples.append({"problem_id": problem_id, "form": form, "ids": [row["id"] for row in found],
                         "answers": [answer(row["completion"]) for row in found]})
    return {"sets": [one.title, other.title], "groups": [groups[key] for key in sorted(groups)],
            "in_both": len(first) - len(only[0]), "only": [len(index) for index in only],
            "only_ids": [index["id"].head(limit).to_list() for index in only],
            "problems_in_both": len(shared), "problems_only": [count - len(shared) for count in problems],
            "answers": {"compared": pairs, "different": len(different), "examples": examples}}


def _different_answers(sides: Sequence[tuple[SampleSet, pl.DataFrame, pl.DataFrame]]) -> tuple[int, pl.DataFrame]:
    """How many pairs of problem and form hold different samples in two sets, and those without an answer in common: a
    place in each set. Sides: set, its index, the rows of the index that the other set lacks.
    """
    key = ["problem_id", "form"]
    keys = [index.select(key).unique() for _, index, _ in sides]
    changed = pl.concat([only.select(key) for _, _, only in sides]).unique()
    pairs = changed.join(keys[0], on=key, how="semi").join(keys[1], on=key, how="semi")
    said = pl.col("completion").str.split("</think>").list.last().str.strip_chars().hash()
    found = []
    for samples, index, _ in sides:
        asked = index.join(pairs, on=key, how="semi").select("place", *key).sort("place")
        hashes = [frame.select("place", said=said) for frame in samples.table.read(asked["place"].to_list(),
                                                                                  ["completion"])]
        answers = pl.concat(hashes) if hashes else pl.DataFrame(schema={"place": pl.Int64, "said": pl.UInt64})
        found.append(asked.join(answers, on="place").group_by(key).agg(pl.col("said").unique().sort(),
                                                                       pl.col("place").min()))
    both = found[0].join(found[1], on=key).filter(
        pl.col("said").list.set_intersection("said_right").list.len() == 0)
    return len(pairs), both.cast({"form": pl.String}).sort(key)


def print_comparison(found: dict[str, Any], console: Console) -> None:
    names = [visible(title) for title in found["sets"]]
    console.print(Text(f"A: {names[0]}\nB: {names[1]}"))
    grid = _grid(("domain", "form", "samples A", "samples B", "mean tokens A", "mean tokens B", "mean score A",
                  "mean score B"), right=range(2, 8))
    for row in found["groups"]:
        _add(grid, row["domain"], row["form"], *(f"{count:,}" for count in row["samples"]),
             *map(_number, row["mean_tokens"]), *(_number(score, 2) for score in row["mean_score"]))
    console.print(grid)
    for side, count, ids in zip("AB", found["only"], found["only_ids"], strict=True):
        shown = f": {', '.join(map(visible, ids))}{', ...' if count > len(ids) else ''}" if ids else ""
        console.print(Text(f"only in {side}: {count:,} samples{shown}"), soft_wrap=True)
    first, second = found["problems_only"]
    console.print(Text(f"in both: {found['in_both']:,} samples, {found['problems_in_both']:,} problems; problems only "
                       f"in A: {first:,}, only in B: {second:,}"))
    answers = found["answers"]
    console.print(Text(f"problems and forms with other samples: {answers['compared']:,}, of which without any answer "
                       f"in common: {answers['different']:,}"))
    if answers["examples"]:
        grid = _grid(("problem", "form", "answer in A", "answer in B"))
        for row in answers["examples"]:
            _add(grid, row["problem_id"], row["form"], *(one_line(text, 2 * EXCERPT) for text in row["answers"]))
        console.print(grid)


def _grid(names: Sequence[str], right: Sequence[int] = ()) -> Grid:
    grid = Grid(box=None, header_style="bold", pad_edge=False)
    for place, name in enumerate(names):
        fixed = name in ("id", "problem", "tokens", "samples")
        grid.add_column(name, justify="right" if place in right else "left", no_wrap=fixed, overflow="fold")
    return grid


def _add(grid: Grid, *cells: str) -> None:
    """A row of plain text: what looks like markup is text of a model."""
    grid.add_row(*(Text(visible(cell)) for cell in cells))


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"
