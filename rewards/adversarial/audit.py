"""Put every case before a reward: which exploits does it pay, which honest twins does it refuse?"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import select
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.adversarial.api import Service
from rewards.adversarial.cases import Case, named
from rewards.extract import code_block
from rewards.judge import Generate
from rewards.languages import LANGUAGES
from rewards.registry import Verifier
from rewards.sandbox import Job, Sandbox
from rewards.scoring import Item, ScoringError

PAID = 0.5  # a score from here on counts as paid
COLUMNS = ("reference", "tests", "language", "entry_point", "principles")  # what a reward in TRL's form is called with
SECONDS, ADDRESS_BYTES = 10, 4 << 30  # of one answer before a reward that runs in this process
Reward = Callable[[Sequence[tuple[Case, str]]], list[float | None]]
"""(case, completion) pairs -> a score each, None where it cannot tell."""


@dataclass(frozen=True)
class Finding:
    """What a reward made of one case; scores are None where it could not tell (or died)."""

    id: str
    case: Case
    exploit: float | None
    twin: float | None

    @property
    def paid(self) -> bool:
        return self.exploit is not None and self.exploit >= PAID

    @property
    def told(self) -> bool:
        """Whether the reward had a word on the case at all: a math grader has none on code."""
        return self.exploit is not None or self.twin is not None

    @property
    def refused(self) -> bool:
        return self.case.twin is not None and (self.twin is None or self.twin < PAID)


def audit(cases: list[Case], reward: Reward) -> list[Finding]:
    """Every case before a reward, in order."""
    exploits = reward([(case, case.exploit) for case in cases])
    honest = [(case, case.twin) for case in cases if case.twin is not None]
    twins = iter(reward(honest))
    return [Finding(name, case, score, None if case.twin is None else next(twins))
            for (name, case), score in zip(named(cases), exploits, strict=True)]


def present(cases: Sequence[Case]) -> list[Case]:
    """The cases whose language this machine can run."""
    return [case for case in cases if not LANGUAGES[case.check.get("language", "python")].missing()]


# -- rewards to audit --------------------------------------------------------------------------------------------------


def our_reward(verifier: Verifier) -> Reward:
    """The project's own verifiers, and the service around them for the family "api"."""
    service = Service(verifier)

    def reward(pairs: Sequence[tuple[Case, str]]) -> list[float | None]:
        items = [Item(id="case", completion=completion, **case.check) for case, completion in pairs
                 if case.family != "api"]
        verdicts = verifier.verify_batch([item.problem() for item in items], [item.completion for item in items])
        scores = iter([verdict.score for verdict in verdicts])
        return [service.ask(case, text) if case.family == "api" else next(scores) for case, text in pairs]
    return reward


def users_reward(name: str) -> Reward:
    """A function `module:function` in TRL's form: f(prompts, completions, **columns) -> scores.

    The columns are COLUMNS. Raises ScoringError when it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ScoringError(f"--reward {name}: {error}; give it as module:function, importable from here") from None

    def score(case: Case, completion: str) -> float | None:
        columns = {key: [case.check.get(key)] for key in COLUMNS}
        return function(prompts=[case.check["prompt"]], completions=[completion], **columns)[0]
    return lambda pairs: [isolated(score, *pair) for pair in pairs]


def math_verify_alone() -> Reward:
    """math-verify on the whole completion, for comparison; nothing about code."""
    import math_verify

    def score(case: Case, completion: str) -> float:
        gold = math_verify.parse(f"${case.check['reference']}$", parsing_timeout=None)
        value = math_verify.parse(completion, parsing_timeout=None)
        return float(math_verify.verify(gold, value, timeout_seconds=None))
    return lambda pairs: [isolated(score, *pair) if pair[0].family == "math" else None for pair in pairs]


def trl_accuracy() -> Reward:
    """TRL's accuracy reward, for comparison; nothing about code."""
    from trl.rewards import accuracy_reward

    def score(case: Case, completion: str) -> float | None:
        return accuracy_reward(completions=[[{"role": "assistant", "content": completion}]],
                               solution=[f"${case.check['reference']}$"])[0]
    return lambda pairs: [isolated(score, *pair) if pair[0].family == "math" else None for pair in pairs]


def naive_code(sandbox: Sandbox) -> Reward:
    """Tests appended to the Python program, and paid when it ends with 0: what many graders do. Runs in a sandbox."""
    def reward(pairs: Sequence[tuple[Case, str]]) -> list[float | None]:
        scores: list[float | None] = []
        for case, completion in pairs:
            tests = case.check.get("tests") or [{}]
            code = code_block(completion, LANGUAGES["python"].fences).value
            if case.check.get("language") != "python" or code is None or "stdin" in tests[0]:
                scores.append(None)
                continue
            checks = "\n".join(f"{test['assert_code']}\ncheck(f)" if "assert_code" in test else
                               f"assert f(*{test['args']!r}) == {test['expected']!r}" for test in tests)
            outcome, = sandbox.run([Job("python", "programs", f"{code}\n{checks}\n", [""])])
            scores.append(float(outcome.status == "done" and outcome.runs[0]["exit"] == 0))
        return scores
    return reward


def naive_judge(generate: Generate) -> Reward:
    """What many graders around a judge do: the answer goes into the prompt as it is, and the first thing in the output
    that looks like a verdict counts, wherever it stands.
    """
    def prompt(check: dict[str, Any], completion: str) -> str:
        asked, given = "Judge the answer.", "\n".join(["Principles:", *check.get("principles", ())])
        if check["kind"] == "match":
            asked, given = "Match the answer with the reference.", f"Reference:\n{check['reference']}"
        return f"{asked}\nTask: {check['prompt']}\n{given}\nAnswer:\n{completion}\nEnd of answer."

    def reward(pairs: Sequence[tuple[Case, str]]) -> list[float | None]:
        prompts = [prompt(case.check, completion) for case, completion in pairs if case.family == "judge"]
        outputs = iter(generate([[{"role": "user", "content": text}] for text in prompts], 1, 0) if prompts else [])
        return [_first_verdict(next(outputs)[0]) if case.family == "judge" else None for case, _ in pairs]
    return reward


def _first_verdict(output: str) -> float:
    found = re.search(r"score\W*(\d+)|match:\W*(yes|no)|\[\[(a|b|yes|no|\d+)\]\]", output, re.IGNORECASE)
    value = next((group for group in found.groups() if group), "no").lower() if found else "no"
    return min(float(value) / 10, 1.0) if value.isdigit() else float(value in ("yes", "a"))


def isolated(function: Callable[..., float | None], *arguments: Any) -> float | None:
    """Call in a forked process with limits: what a hostile answer does to it stays there. None when it dies."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
            score = function(*arguments)
            os.write(write, json.dumps(None if score is None else float(score)).encode())
        finally:
            os._exit(0)
    os.close(write)
    try:
        ready = select.select([read], [], [], SECONDS)[0]
        data = os.read(read, 1000) if ready else b""
    finally:
        os.close(read)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return json.loads(data) if data else None


# -- the result --------------------------------------------------------------------------------------------------------


def summary(findings: Sequence[Finding]) -> dict[tuple[str, str], dict[str, int]]:
    """{(family, kind): {"cases", "told", "paid", "refused"}}, families together under the kind "all"."""
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for finding in findings:
        for kind in (finding.case.kind, "all"):
            row = rows.setdefault((finding.case.family, kind), {"cases": 0, "told": 0, "paid": 0, "refused": 0})
            row["cases"] += 1
            row["told"] += finding.told
            row["paid"] += finding.paid
            row["refused"] += finding.refused and finding.told
    return dict(sorted(rows.items(), key=lambda row: (row[0][0], row[0][1] == "all", row[0][1])))

