"""What the math verdicts accept and refuse of answers in competition notation, next to math-verify alone.

    python benchmarks/math_reach.py [--small] [--json FILE]

`math_answers.jsonl` holds {"gold", "same", "near", "kind"}: an answer, the same value in other notations, and wrong
values that look alike. Of each kind the even rows are "dev", which rules may be written against; the odd rows are
"held-out", and tell what the rules are worth on answers they were not written for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import math_verify
from rich.console import Console
from rich.table import Table

from rewards.math import MathPool, verify_math

ANSWERS = Path(__file__).with_name("math_answers.jsonl")
WANTED = {"itself": "all", "other notation": "all", "shuffled": "none", "near miss": "none"}


class Pair(NamedTuple):
    """A value put before a reference. `what` is a key of WANTED, `half` is "dev" or "held-out"."""

    what: str
    half: str
    kind: str
    gold: str
    value: str


def read_rows() -> list[dict]:
    """The rows of the data file, each with its half."""
    seen: Counter[str] = Counter()
    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    for row in rows:
        row["half"] = "held-out" if seen[row["kind"]] % 2 else "dev"
        seen[row["kind"]] += 1
    return rows


def pairs(rows: Sequence[dict], shuffled: int) -> list[Pair]:
    """All pairs the rows hold, and `shuffled` random ones of two golds with different values in each half."""
    found = []
    for row in rows:
        for what, values in (("itself", [row["gold"]]), ("other notation", row["same"]), ("near miss", row["near"])):
            found += [Pair(what, row["half"], row["kind"], row["gold"], value) for value in values]
    rng = random.Random(0)
    for half in ("dev", "held-out"):
        own = [row for row in rows if row["half"] == half]
        drawn: set[tuple[int, int]] = set()
        while len(drawn) < min(shuffled, len(own) ** 2 // 2):
            left, right = rng.sample(range(len(own)), 2)
            # two rows that share a notation have one value
            if {own[left]["gold"], *own[left]["same"]}.isdisjoint({own[right]["gold"], *own[right]["same"]}):
                drawn.add((left, right))
        found += [Pair("shuffled", half, own[left]["kind"], own[left]["gold"], own[right]["gold"])
                  for left, right in sorted(drawn)]
    return found


def judge(tested: Sequence[Pair], accepts: Callable[[str, str], bool]) -> tuple[list[bool], list[float]]:
    """(accepted, seconds) of each pair."""
    accepted, seconds = [], []
    for pair in tested:
        began = time.perf_counter()
        accepted.append(accepts(pair.gold, pair.value))
        seconds.append(time.perf_counter() - began)
    return accepted, seconds


def alone(gold: str, value: str) -> bool:
    """math-verify by itself, with its own time limits."""
    parsed = math_verify.parse(f"${gold}$"), math_verify.parse(rf"\boxed{{{value}}}")
    return bool(math_verify.verify(*parsed))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the smallest size at which everything runs")
    parser.add_argument("--json", type=Path, help="write the figures and every pair judged wrongly there as well")
    options = parser.parse_args(arguments)
    rows = read_rows()
    tested = pairs(rows[::23] if options.small else rows, 20 if options.small else 3000)
    with MathPool(size=1) as pool:
        pool.compare("x", "x")
        accepted, seconds = judge(tested, lambda gold, value: bool(
            verify_math(rf"\boxed{{{value}}}", gold, pool).score))
    peer, peer_seconds = judge(tested, alone)

    figures: list[dict] = []
    for title, part in (("half", lambda pair: pair.half), ("kind", lambda pair: pair.kind)):
        table = Table("accepted", title, "pairs", "wanted", "ours %", "math-verify alone %", box=None,
                      header_style="bold", pad_edge=False)
        whats = WANTED if title == "half" else ("other notation", "near miss")
        for what in whats:
            for name in sorted({part(pair) for pair in tested}):
                chosen = [index for index, pair in enumerate(tested) if pair.what == what and part(pair) == name]
                if not chosen:
                    continue
                own, other = (100 * statistics.fmean(verdicts[index] for index in chosen)
                              for verdicts in (accepted, peer))
                figures.append({"what": what, title: name, "pairs": len(chosen), "ours": own, "alone": other})
                table.add_row(what, name, str(len(chosen)), WANTED[what], f"{own:.2f}", f"{other:.2f}")
        Console().print(table, "")
    table = Table("seconds", "p50", "p99", "slowest", box=None, header_style="bold", pad_edge=False)
    for name, taken in (("ours", seconds), ("math-verify alone", peer_seconds)):
        percentiles = statistics.quantiles(taken, n=100)
        times = {"p50": percentiles[49], "p99": percentiles[98], "slowest": max(taken)}
        figures.append({"what": f"seconds, {name}", **times})
        table.add_row(name, *(f"{value:.4f}" for value in times.values()))
    Console().print(table)
    if options.json:
        wrong = [{**pair._asdict(), "ours": own, "alone": other}
                 for pair, own, other in zip(tested, accepted, peer, strict=True)
                 if own != (WANTED[pair.what] == "all")]
        options.json.write_text(json.dumps({"figures": figures, "wrong": wrong}, indent=2))


if __name__ == "__main__":
    main()
