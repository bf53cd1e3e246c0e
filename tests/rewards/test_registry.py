import json

import pytest

from pipeline.recipe import RewardWeights
from pipeline.records import Check, Problem, Status, Verdict
from pipeline.stage import StageError
from rewards.compose import compose
from rewards.judge import Judge
from rewards.languages import LANGUAGES
from rewards.registry import Verifier


def problem(check, text="How much is 6*7?"):
    messages = ({"role": "user", "content": text},)
    return Problem(Problem.make_id(messages, check), "d", "s", messages, check, "test", "rl")


MATH = problem(Check("math", "42"))
NAMES = problem(Check("exact", "Ann"))
CODE = problem(Check("code", language="python", entry_point="f", tests=json.dumps([{"args": [1], "expected": 2}])))
TALK = problem(Check("principles", principles=("kind",)))


def code(text):
    return f"```python\n{text}\n```"


def test_the_canaries_pass_on_this_machine(verifier):
    verifier.run_canaries(languages=[name for name in LANGUAGES if not LANGUAGES[name].missing()])


def test_a_verifier_that_finds_everything_wrong_is_stopped_by_its_canary(verifier, monkeypatch):
    monkeypatch.setattr("rewards.registry.verify_exact", lambda *_: verdict(Status.WRONG, 0.0))
    with pytest.raises(StageError, match="exact verifier is not working"):
        verifier.run_canaries(("exact",))


def test_a_mixed_batch_comes_back_in_order(verifier):
    rows = [(CODE, code("def f(x): return x + 1"), "correct"), (MATH, r"\boxed{42}", "correct"),
            (NAMES, "?", "malformed"),
            (CODE, code("def f(x): return x"), "wrong"), (MATH, r"\boxed{6 \cdot 7}", "correct"),
            (NAMES, r"\boxed{ann}", "correct"), (MATH, "How much is 6*7?", "malformed")] * 8
    found = verifier.verify_batch([row[0] for row in rows], [row[1] for row in rows])
    assert [verdict.status.value for verdict in found] == [row[2] for row in rows]


def test_equal_pairs_are_verified_once(monkeypatch):
    asked = []

    def generate(conversations, n, seed):
        asked.extend(conversations)
        return [["fine\nScore: 9"] * n for _ in conversations]

    with Verifier(judge=Judge(generate)) as verifier:
        found = verifier.verify_batch([TALK] * 3 + [MATH], ["hello", "hello", "hi", r"\boxed{42}"])
    assert [verdict.score for verdict in found] == [0.9, 0.9, 0.9, 1.0] and len(asked) == 2


def test_principles_without_a_judge_and_unknown_kinds_are_errors(verifier):
    with pytest.raises(ValueError, match="no judge"):
        verifier.verify(TALK, "hi")
    with pytest.raises(ValueError, match="'taste'"):
        verifier.verify(problem(Check("taste")), "hi")


def verdict(status, score):
    return Verdict(status, score, "r", "math", "1")


@pytest.mark.parametrize(("status", "score", "completion", "form", "parts", "total"), [
    (Status.CORRECT, 1.0, "<think>t</think>a", "reasoning", {"accuracy": 1.0, "format": 1.0}, 3.0),
    (Status.CORRECT, 1.0, "a", "reasoning", {"accuracy": 1.0, "format": 0.0}, 2.0),
    (Status.CORRECT, 1.0, "<think> </think>a", "reasoning", {"accuracy": 1.0, "format": 0.0}, 2.0),
    (Status.WRONG, 0.0, "a", "original", {"accuracy": 0.0, "format": 1.0}, 1.0),
    (Status.WRONG, 0.0, "<think>t</think>a", "original", {"accuracy": 0.0, "format": 1.0}, 1.0),
    (Status.MALFORMED, 0.0, "a", "original", {"accuracy": 0.0, "format": 0.0}, 0.0),
    (Status.MALFORMED, 0.0, "<think>t", "reasoning", {"accuracy": 0.0, "format": 0.0}, 0.0),
    (Status.INFRA_ERROR, None, "<think>t</think>a", "reasoning", {"format": 1.0}, None),
    (Status.ABSTAIN, None, "a", "original", {"format": 1.0}, None),
])
def test_rewards_are_the_weighted_sum_of_accuracy_and_format(status, score, completion, form, parts, total):
    assert compose(verdict(status, score), completion, form, RewardWeights(accuracy=2.0)) == (parts, total)
