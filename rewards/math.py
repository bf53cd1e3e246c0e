"""Verdicts on boxed answers: mathematical equality with a reference, or equality of text.

Order: extraction, exact comparison (`exact.py`), then algebra in a process that can be killed. Killable
processes because no time-out inside Python stops a sympy computation, and because math-verify's own need the
main thread. The workers start when the first answer needs them (importing sympy takes a second) and are
shared by all threads; a killed comparison costs its time, not the pool.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from pipeline.records import Status, Verdict
from rewards import exact
from rewards.extract import last_box, single_value, split_thinking
from rewards.reasons import Reason, verdict


class WorkerFailure(RuntimeError):
    """A math worker did not start or died for no reason of the answer's."""


class _Worker:
    """One `rewards.math_worker` process, started by the first comparison. It outlives answers that run out of time."""

    def __init__(self, cpu_seconds: float, wall_seconds: float, address_bytes: int) -> None:
        self.arguments = [str(cpu_seconds), str(wall_seconds), str(address_bytes)]
        self.patience = wall_seconds + 10  # the worker's own timers come first
        self.process: subprocess.Popen[str] | None = None

    def ask(self, reference: str, value: str) -> str:
        """"equal", "different", "unreadable", "memory_limit" or "time_limit"; raises WorkerFailure."""
        process = self.process or self._start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps([reference, value]) + "\n")
            process.stdin.flush()
            reply = self._line(process, self.patience)
        except BrokenPipeError:
            reply = ""
        if reply and not reply.startswith("died"):
            return reply
        self.stop()
        raise WorkerFailure(f"the math worker {reply or 'ended'} while comparing {value[:80]!r}")

    def _start(self) -> subprocess.Popen[str]:
        # `-m` finds the package by this path, wherever the caller's working directory is
        root = str(Path(__file__).parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        self.process = subprocess.Popen([sys.executable, "-m", "rewards.math_worker", *self.arguments], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        env=environment)
        if self._line(self.process, 120) != "ready":
            self.stop()
            raise WorkerFailure(f"{sys.executable} -m rewards.math_worker did not start; run it by hand to see why "
                                "(is math-verify installed?)")
        return self.process

    @staticmethod
    def _line(process: subprocess.Popen[str], seconds: float) -> str:
        """The next line, or "" when the process died or stayed silent."""
        assert process.stdout
        if not select.select([process.stdout], [], [], seconds)[0]:
            return ""
        return process.stdout.readline().strip()

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream:
                    try:
                        stream.close()
                    except BrokenPipeError:  # what was still buffered for the dead worker
                        pass
        self.process = None


class MathPool:
    """Comparisons by algebra from any thread, `size` at a time.

    cpu_seconds: strict limit per comparison; wall_seconds: generous one, for loaded machines.
    """

    def __init__(self, size: int = 2, cpu_seconds: float = 1.5, wall_seconds: float = 15.0,
                 address_bytes: int = 1 << 30) -> None:
        self.size = size
        self._workers: queue.Queue[_Worker] = queue.Queue()
        for _ in range(size):
            self._workers.put(_Worker(cpu_seconds, wall_seconds, address_bytes))

    def start(self) -> None:
        """Start all workers, for callers that want no wait at their first answers."""
        workers = [self._workers.get() for _ in range(self.size)]
        with ThreadPoolExecutor(self.size) as threads:
            for worker, _ in zip(workers, threads.map(lambda worker: worker.ask("1", "1"), workers), strict=True):
                self._workers.put(worker)

    def compare(self, reference: str, value: str) -> str:
        """One comparison; a worker that dies for no known reason is tried once more, then WorkerFailure."""
        worker = self._workers.get()
        try:
            try:
                return worker.ask(reference, value)
            except WorkerFailure:
                return worker.ask(reference, value)
        finally:
            self._workers.put(worker)

    def close(self) -> None:
        for _ in range(self.size):
            worker = self._workers.get()
            worker.stop()
            self._workers.put(worker)

    def __enter__(self) -> MathPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def read_answer(completion: str, prompt: str, verifier: str, began: float) -> str | Verdict:
    """The box of a completion, or the verdict that there is none."""
    thinking = split_thinking(completion)
    if not thinking.well_formed:
        return verdict(Status.MALFORMED, Reason.BAD_THINKING, verifier, began)
    if not thinking.answer:
        return verdict(Status.MALFORMED, Reason.EMPTY_ANSWER, verifier, began)
    box = last_box(thinking.answer, prompt)
    if box.value is None:
        assert box.reason
        return verdict(Status.MALFORMED, box.reason, verifier, began, thinking.answer[-120:])
    return box.value


def verify_exact(completion: str, reference: str, prompt: str = "") -> Verdict:
    """Boxed text equal to `reference`, ignoring case and white space."""
    began = time.monotonic()
    box = read_answer(completion, prompt, "exact", began)
    if isinstance(box, Verdict):
        return box
    if exact.same_text(reference, box):
        return verdict(Status.CORRECT, Reason.EQUAL_EXACT, "exact", began, box)
    return verdict(Status.WRONG, Reason.DIFFERENT, "exact", began, f"{box} instead of {reference}")


def verify_math(completion: str, reference: str, pool: MathPool, prompt: str = "") -> Verdict:
    """Boxed value mathematically equal to `reference`.

    Hedges, chains of "=" and over-complex values are MALFORMED or WRONG before any algebra; TIMEOUT when the
    comparison ran out of time; ABSTAIN when the reference is unreadable; INFRA_ERROR when the worker broke.
    """
    began = time.monotonic()
    box = read_answer(completion, prompt, "math", began)
    if isinstance(box, Verdict):
        return box

    def found(status: Status, reason: Reason) -> Verdict:
        return verdict(status, reason, "math", began, box if status is Status.CORRECT else f"{box} for {reference}")

    if len(box) > exact.MAX_LENGTH:
        return found(Status.WRONG, Reason.TOO_COMPLEX)
    value, refused = single_value(box, reference)
    if value is None:
        assert refused
        return found(Status.MALFORMED, refused)
    decided = exact.compare(reference, value)
    if decided is not None:
        return found(Status.CORRECT, Reason.EQUAL_EXACT) if decided else found(Status.WRONG, Reason.DIFFERENT)
    if exact.too_complex(value):
        return found(Status.WRONG, Reason.TOO_COMPLEX)
    if exact.too_complex(reference):
        return found(Status.ABSTAIN, Reason.REFERENCE_UNREADABLE)
    try:
        result = pool.compare(reference, value)
    except WorkerFailure as failure:
        return verdict(Status.INFRA_ERROR, Reason.VERIFIER_FAILED, "math", began, str(failure))
    return found(*{"equal": (Status.CORRECT, Reason.EQUAL_SYMBOLIC), "different": (Status.WRONG, Reason.DIFFERENT),
                   "unreadable": (Status.ABSTAIN, Reason.REFERENCE_UNREADABLE),
                   "memory_limit": (Status.WRONG, Reason.MEMORY_LIMIT),
                   "time_limit": (Status.TIMEOUT, Reason.TIME_LIMIT)}[result])


def verify_math_batch(items: Sequence[tuple[str, str, str]], pool: MathPool) -> list[Verdict]:
    """`verify_math` for (completion, reference, prompt) triples, `pool.size` at a time."""
    with ThreadPoolExecutor(pool.size) as threads:
        return list(threads.map(lambda item: verify_math(item[0], item[1], pool, item[2]), items))
