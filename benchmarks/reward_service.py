"""The reward service under load: math at a fixed rate, then everything at once while parts of it are killed.

    python benchmarks/reward_service.py [--small] [--seconds 600] [--json FILE]

The service is a process of its own; this one sends the requests, knows every right score, and kills a math worker, the
replicas of math and code, and the one that speaks HTTP. An answer counts as lost when no result came, and as false when
a result has another score than the right one (null, "cannot tell", is not false).
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from figures import Row, report

from rewards.adversarial.math import GOLD
from rewards.client import RewardClient, ServiceUnreachable

RATE, BATCH = 300, 15  # math items a second, and in a request
PORT = 8167
Wanted = tuple[dict[str, Any], float]  # an item and its score


@contextmanager
def service(folder: Path) -> Iterator[psutil.Process]:
    """`posttrain serve` in a process of its own, ready to answer."""
    command = [sys.executable, "-m", "pipeline.cli", "serve", "--math", "--code", "--port", str(PORT)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with open(folder / "service.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{PORT}/healthz").raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the service did not start:\n{(folder / 'service.log').read_text()}") from None
                time.sleep(0.5)
        yield psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def math_item(rng: random.Random) -> Wanted:
    """Numbers mostly, every tenth in another notation, every other one wrong."""
    right = rng.random() < 0.5
    if rng.random() < 0.1:
        gold = rng.choice(GOLD)
        return {"kind": "math", "completion": rf"\boxed{{{gold.other if right else gold.wrong}}}",
                "reference": gold.right}, float(right)
    value = rng.randint(-999, 99_999)
    shown = f"{value:,}" if right else str(value + rng.randint(1, 9))
    return {"kind": "math", "completion": rf"<think>so</think>It is \boxed{{{shown}}}.", "reference": str(value)}, \
        float(right)


def code_item(rng: random.Random) -> Wanted:
    right, step = rng.random() < 0.5, rng.randint(1, 99)
    tests = [{"args": [number], "expected": number + step} for number in range(5)]
    return {"kind": "code", "completion": f"```python\ndef f(x):\n    return x + {step if right else step + 1}\n```",
            "entry_point": "f", "tests": tests}, float(right)


def hostile_item(rng: random.Random) -> Wanted:
    """Answers that try to hold up whoever reads them."""
    text = rng.choice(("9^{9^{9^9}}", r"\frac{1}{" * 40 + "2" + "}" * 40, "(x+1)^{99999}"))
    return {"kind": "math", "completion": rf"\boxed{{{text}}}", "reference": "x^2+1"}, 0.0


@dataclass
class Tally:
    seconds: list[float] = field(default_factory=list)
    items: int = 0
    false: int = 0
    untold: int = 0
    lost: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, client: RewardClient, wanted: Sequence[Wanted]) -> None:
        rows = [{**item, "id": str(index)} for index, (item, _) in enumerate(wanted)]
        began = time.monotonic()
        try:
            results = client.score(rows)
        except ServiceUnreachable:
            results = []
        with self.lock:
            self.seconds.append(time.monotonic() - began)
            self.items += len(results)
            self.lost += len(rows) - len(results)
            for result, (_, score) in zip(results, wanted, strict=False):
                self.untold += result.score is None
                self.false += result.score is not None and result.score != score


def at_a_rate(seconds: float) -> list[Row]:
    """Math in batches at RATE items a second, sent when they are due whatever became of the last ones."""
    tally, due, left = Tally(), time.monotonic(), threading.Lock()
    end = due + seconds

    def sender(seed: int) -> None:
        nonlocal due
        rng = random.Random(seed)
        with RewardClient(f"http://127.0.0.1:{PORT}") as client:
            while True:
                with left:
                    mine, due = due, due + BATCH / RATE
                if mine > end:
                    return
                time.sleep(max(0.0, mine - time.monotonic()))
                tally.send(client, [math_item(rng) for _ in range(BATCH)])

    began = time.monotonic()
    _together([lambda seed=seed: sender(seed) for seed in range(8)])
    took = time.monotonic() - began
    return [("math alone: items", tally.items / took, "items/s"),
            ("math alone: request, p50", statistics.median(tally.seconds) * 1000, "ms"),
            ("math alone: request, p99", _p99(tally.seconds) * 1000, "ms"),
            ("math alone: false scores", tally.false, ""),
            ("math alone: lost or untold", tally.lost + tally.untold, "")]


def mixed(seconds: float, root: psutil.Process) -> list[Row]:
    """Everything at once, and at each fifth of the time something is killed."""
    tally, end = Tally(), time.monotonic() + seconds
    kinds: list[Callable[[random.Random], Wanted]] = [math_item] * 6 + [code_item] * 3 + [hostile_item]

    def sender(seed: int) -> None:
        rng = random.Random(seed)
        with RewardClient(f"http://127.0.0.1:{PORT}") as client:
            while time.monotonic() < end:
                make = rng.choice(kinds)
                count = {hostile_item: 1, code_item: 4, math_item: BATCH}[make]
                tally.send(client, [make(rng) for _ in range(count)])

    def killer() -> None:
        for name in ("rewards.math_worker", "ServeReplica:rewards:code", "ServeReplica:rewards:math",
                     "ServeReplica:rewards:api"):
            time.sleep(seconds / 5)
            killed.append((name, _kill(root, name)))

    killed: list[tuple[str, bool]] = []
    memory: list[int] = []

    def watcher() -> None:
        while time.monotonic() < end:
            memory.append(_memory(root))
            time.sleep(min(5.0, seconds / 20))

    began = time.monotonic()
    _together([killer, watcher, *(lambda seed=seed: sender(seed) for seed in range(6))])
    took = time.monotonic() - began
    third = max(1, len(memory) // 3)
    return [("mixed load: items", tally.items / took, "items/s"), ("mixed load: requests", len(tally.seconds), ""),
            ("mixed load: request, p50", statistics.median(tally.seconds) * 1000, "ms"),
            ("mixed load: request, p99", _p99(tally.seconds) * 1000, "ms"),
            *((f"mixed load: killed {name}", float(done), "") for name, done in killed),
            ("mixed load: false scores", tally.false, ""), ("mixed load: lost", tally.lost, ""),
            ("mixed load: untold", tally.untold, ""),
            ("memory, median of the first third", statistics.median(memory[:third]) / 2**20, "MiB"),
            ("memory, median of the last third", statistics.median(memory[-third:]) / 2**20, "MiB")]


def _together(functions: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _kill(root: psutil.Process, name: str) -> bool:
    for process in root.children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                process.kill()
                return True
        except psutil.NoSuchProcess:
            continue
    return False


def _memory(root: psutil.Process) -> int:
    """Private memory of the service and all its processes, bytes."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().uss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _p99(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98] if len(seconds) > 1 else seconds[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the smallest size at which everything runs")
    parser.add_argument("--seconds", type=float, default=600, help="of mixed load")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as root:
        rows = at_a_rate(4 if options.small else 60) + mixed(15 if options.small else options.seconds, root)
    report(rows, options.json)


if __name__ == "__main__":
    main()
