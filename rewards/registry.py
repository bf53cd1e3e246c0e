"""One door to all verifiers: problems and completions in, verdicts out, in order.

A verifier that breaks gives INFRA_ERROR, which leaves the group's baseline; it is never a 0. Canaries at the
start (a right, a wrong and a hostile answer per verifier) show that the verifiers work on this machine.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType

from pipeline.records import Check, Problem, Status, Verdict
from pipeline.stage import StageError
from rewards.code import verify_code_batch
from rewards.judge import Judge, Judges
from rewards.math import MathPool, verify_exact, verify_math
from rewards.sandbox import Isolation, Limits, Sandbox

JOBS_PER_SANDBOX = 16  # enough to share the start of a sandbox, few enough to share the work among threads
KINDS = ("math", "exact", "code", "principles", "match")


CodeRunner = Callable[[Sequence[tuple[str, Check]]], list[Verdict]]
"""(completion, check) pairs -> a verdict each."""


class Verifier:
    """Verdicts for any `Check`. Safe to call from any thread; `close` it (or use `with`) to end its workers.

    judge: needed for checks of kind "principles" and "match". workers: sandboxes, and math workers, at a time.
    runners: who runs code in place of sandboxes of this process, such as `spread.cluster_runners`.
    Raises SandboxUnavailable at the first code check on a machine without bubblewrap.
    """

    def __init__(self, judge: Judge | Judges | None = None, workers: int = 2, limits: Limits | None = None,
                 isolation: Isolation = "bubblewrap", runners: Sequence[CodeRunner] = ()) -> None:
        self.judge, self.limits, self.isolation = judge, limits or Limits(), isolation
        self.workers = len(runners) or workers
        self.math = MathPool(workers)
        self._runners: queue.Queue[CodeRunner] = queue.Queue()
        for runner in runners:
            self._runners.put(runner)
        self._threads = ThreadPoolExecutor(2 * workers, thread_name_prefix="verifier")
        self._starting = threading.Lock()
        self._started = bool(runners)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return self.verify_batch([problem], [completion])[0]

    def verify_batch(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Verdict]:
        """A verdict per completion (the assistant's turn as text). Equal pairs are verified once."""
        keys = [(problem.id, completion) for problem, completion in zip(problems, completions, strict=True)]
        unique = dict(zip(keys, problems, strict=True))
        by_kind: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
        for key, problem in unique.items():
            if problem.check.kind not in by_kind:
                raise ValueError(f"problem {problem.id}: check kind {problem.check.kind!r} is not one of {KINDS}")
            by_kind[problem.check.kind].append(key)
        judged = [key for key, problem in unique.items() if problem.check.judged]
        if judged and self.judge is None:
            raise ValueError(f"{len(judged)} problems need a judge, and this Verifier has none: pass "
                             "Verifier(judge=...) or leave those domains out")

        def code(chunk: list[tuple[str, str]]) -> list[Verdict]:
            runner = self._runners.get()
            try:
                return runner([(completion, unique[id_, completion].check) for id_, completion in chunk])
            finally:
                self._runners.put(runner)

        def mathematics(key: tuple[str, str]) -> list[Verdict]:
            problem = unique[key]
            return [verify_math(key[1], problem.check.reference or "", self.math, _prompt(problem))]

        if by_kind["code"]:
            self._make_sandboxes()
        size = max(1, min(JOBS_PER_SANDBOX, -(-len(by_kind["code"]) // self.workers)))
        chunks = [by_kind["code"][i:i + size] for i in range(0, len(by_kind["code"]), size)]
        pending = [(chunk, self._threads.submit(code, chunk)) for chunk in chunks]
        pending += [([key], self._threads.submit(mathematics, key)) for key in by_kind["math"]]
        verdicts: dict[tuple[str, str], Verdict] = {}
        for key in by_kind["exact"]:
            verdicts[key] = verify_exact(key[1], unique[key].check.reference or "", _prompt(unique[key]))
        if judged and self.judge:
            scored = self.judge.score([unique[key] for key in judged], [completion for _, completion in judged])
            verdicts.update(zip(judged, scored, strict=True))
        for chunk, future in pending:
            verdicts.update(zip(chunk, future.result(), strict=True))
        return [verdicts[key] for key in keys]

    def _make_sandboxes(self) -> None:
        # in the caller's thread, so that a missing bubblewrap is an error here and not a verdict
        with self._starting:
            if not self._started:
                for sandbox in [Sandbox(self.limits, self.isolation, slot) for slot in range(self.workers)]:
                    self._runners.put(partial(verify_code_batch, sandbox=sandbox))
                self._started = True

    def run_canaries(self, kinds: Sequence[str] = ("math", "exact", "code"),
                     languages: Sequence[str] = ("python", "c")) -> None:
        """Verify answers whose verdicts are known; raises StageError naming the first that comes out otherwise.

        languages: those of the code that will be verified.
        """
        if self.judge:
            self.judge.run_canaries()
        rows = [row for row in CANARIES if row[0].kind in kinds
                and (row[0].language is None or row[0].language in languages)]
        problems = [Problem(f"canary-{i}", "canary", "canary", (), check, "canary", "rl")
                    for i, (check, _, _) in enumerate(rows)]
        verdicts = self.verify_batch(problems, [completion for _, completion, _ in rows])
        for (check, completion, wanted), found in zip(rows, verdicts, strict=True):
            if (found.status is Status.CORRECT) != wanted or found.score is None:
                raise StageError(f"the {check.kind} verifier is not working: it found {completion!r} "
                                 f"{found.status.value} ({found.reason}: {found.evidence}) where "
                                 f"{'a right' if wanted else 'a wrong'} answer was given; no reward can be trusted")

    def close(self) -> None:
        self._threads.shutdown()
        self.math.close()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _prompt(problem: Problem) -> str:
    """The last user message, whose copies in an answer do not count."""
    return next((message["content"] for message in reversed(problem.messages) if message["role"] == "user"), "")


_ADD = json.dumps([{"args": [2, 3], "expected": 5}, {"args": [-1, 1], "expected": 0}])
_PYTHON, _C, _CPP, _JAVASCRIPT, _JAVA = (Check("code", language=name, entry_point="add", tests=_ADD)
                                         for name in ("python", "c", "cpp", "javascript", "java"))
_HOSTILE = """class Same(int):
    __eq__ = __ne__ = __bool__ = lambda *_: True
    __repr__ = lambda _: "5"
def add(a, b):
    return Same(7)
"""
CANARIES: tuple[tuple[Check, str, bool], ...] = (
    (Check("math", "x^2+2x+1"), r"<think>t</think>\boxed{(x+1)^2}", True),
    (Check("math", "42"), r"\boxed{41}", False),
    (Check("math", "42"), r"\boxed{41 = 42}", False),
    (Check("exact", "Ann"), r"<think>t</think>\boxed{ann}", True),
    (Check("exact", "Ann"), r"\boxed{Bob}", False),
    (Check("exact", "Ann"), r"\boxed{Ann}\boxed{Bob}", False),
    (_PYTHON, "```python\ndef add(a, b):\n    return a + b\n```", True),
    (_PYTHON, "```python\ndef add(a, b):\n    return a - b\n```", False),
    (_PYTHON, f"```python\n{_HOSTILE}```", False),
    (_C, "```c\nint add(int a, int b) { return a + b; }\n```", True),
    (_C, "```c\nint add(int a, int b) { return a - b; }\n```", False),
    (_C, '```c\n#include <stdlib.h>\nint add(int a, int b) { exit(0); }\n```', False),
    (_CPP, "```cpp\nint add(int a, int b) { return a + b; }\n```", True),
    (_CPP, "```cpp\nint add(int a, int b) { return a - b; }\n```", False),
    (_CPP, "```cpp\n#include <cstdlib>\nint add(int a, int b) { std::exit(0); }\n```", False),
    (_JAVASCRIPT, "```javascript\nfunction add(a, b) { return a + b; }\n```", True),
    (_JAVASCRIPT, "```javascript\nfunction add(a, b) { return a - b; }\n```", False),
    (_JAVASCRIPT, "```javascript\nJSON.stringify = () => '{\"value\": 5}';\n"
                  "function add(a, b) { return { valueOf: () => 5 }; }\n```", False),
    (_JAVA, "```java\nclass A { static int add(int a, int b) { return a + b; } }\n```", True),
    (_JAVA, "```java\nclass A { static int add(int a, int b) { return a - b; } }\n```", False),
    (_JAVA, "```java\nclass A { static int add(int a, int b) { System.exit(0); return 5; } }\n```", False),
)
