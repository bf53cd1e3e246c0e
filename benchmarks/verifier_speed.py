"""Speed of the rule rewards on this machine, next to math-verify and to a bare interpreter.

    python benchmarks/verifier_speed.py [--small] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from figures import Row, report

from pipeline.records import Check, Problem
from rewards.adversarial.math import GOLD, cases
from rewards.math import MathPool, verify_math
from rewards.registry import Verifier
from rewards.sandbox import PYTHON, Job, Sandbox


def rate(function: Callable[[], object], count: int) -> float:
    """Items a second for `count` items done by one call."""
    began = time.perf_counter()
    function()
    return count / (time.perf_counter() - began)


def numbers(size: int) -> list[Row]:
    """Plain numeric answers, one core: the exact path alone decides."""
    rng = random.Random(0)
    items = []
    for _ in range(size):
        value = rng.choice((rng.randint(-999, 9999), round(rng.uniform(-99, 99), 2)))
        shown = rng.choice((value, f"{value}", f"{value:,}" if isinstance(value, int) else value))
        items.append((rf"<think>so</think>The answer is \boxed{{{shown}}}.", str(value)))
    with MathPool(size=1) as pool:
        return [("plain numbers, one core",
                 rate(lambda: [verify_math(text, gold, pool) for text, gold in items], size), "answers/s")]


def symbols(size: int) -> list[Row]:
    """Answers that need algebra: ours through its one killable worker, and math-verify alone in this process."""
    import math_verify

    pairs = [(gold.right, gold.other) for gold in GOLD if "cdot" not in gold.other] * (size // len(GOLD) + 1)
    pairs = pairs[:size]

    def alone() -> None:
        for right, other in pairs:
            math_verify.verify(math_verify.parse(f"${right}$"), math_verify.parse(rf"\boxed{{{other}}}"))

    with MathPool(size=1) as pool:
        def ours() -> None:
            for right, other in pairs:
                verify_math(rf"\boxed{{{other}}}", right, pool)

        alone(), ours()  # imports and caches of both are warm
        own, peer = rate(ours, size), rate(alone, size)
    return [("other notations, ours", own, "answers/s"), ("other notations, math-verify alone", peer, "answers/s"),
            ("other notations, ours / math-verify", own / peer, "x")]


def hostile(repeats: int) -> list[Row]:
    """Every math exploit once or more: the slowest answers a person could find."""
    seconds = []
    with MathPool(size=1) as pool:
        pool.compare("x", "x")
        for case in [*cases()] * repeats:
            began = time.perf_counter()
            verify_math(case.exploit, case.check["reference"], pool, case.check["prompt"])
            seconds.append(time.perf_counter() - began)
    return [("hostile answers, p99", statistics.quantiles(seconds, n=100)[98], "s"),
            ("hostile answers, slowest", max(seconds), "s")]


def starts(size: int) -> list[Row]:
    """What a sandbox costs above the bare interpreter, one trivial program in each."""
    sandbox, job = Sandbox(), Job("python", "programs", "pass", [""])

    def median(function: Callable[[], object]) -> float:
        return statistics.median(1 / rate(function, 1) for _ in range(size))

    inside = median(lambda: sandbox.run([job]))
    bare = median(lambda: subprocess.run([PYTHON, "-S", "-c", "pass"], check=True))
    return [("sandbox start, median", inside * 1000, "ms"), ("bare interpreter, median", bare * 1000, "ms"),
            ("sandbox above bare", (inside - bare) * 1000, "ms")]


def programs(size: int) -> list[Row]:
    """Trivial Python problems of five tests, all cores."""
    tests = json.dumps([{"args": [number], "expected": number + 1} for number in range(5)])
    check = Check("code", language="python", entry_point="f", tests=tests)
    problem = Problem("p", "code", "code", ({"role": "user", "content": "?"},), check, "benchmark", "rl")
    answers = [f"```python\ndef f(x):\n    return x + 1 + {number} - {number}\n```" for number in range(size)]
    with Verifier() as verifier:
        verifier.verify_batch([problem], answers[:1])
        return [("Python problems, two sandboxes",
                 rate(lambda: verifier.verify_batch([problem] * size, answers), size), "problems/s")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the smallest size at which everything runs")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args(arguments)
    small = options.small
    rows = [*numbers(50 if small else 20_000), *symbols(8 if small else 800), *hostile(1 if small else 3),
            *starts(3 if small else 60), *programs(8 if small else 400)]
    report(rows, options.json)


if __name__ == "__main__":
    main()
