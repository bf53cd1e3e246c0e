import json

import pytest

from pipeline.recipe import RewardWeights
from pipeline.records import Check, Problem, Status, Verdict
from pipeline.stage import StageError
from rewards.compose import compose
from rewards.judge import Judge
from rewards.language import consistency
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
    with pytest.raises(ValueError, match="need a judge"):
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
def test_rewards_are_the_weighted_sum_of_their_parts(status, score, completion, form, parts, total):
    weights = RewardWeights(accuracy=2.0, language=0.5)
    assert compose(verdict(status, score), completion, "Why so?", form, weights) == (
        {**parts, "language": 1.0}, None if total is None else total + 0.5)
    mixed = completion + " so \u6211\u4eec"
    assert compose(verdict(status, score), mixed, "Why so?", form, weights)[0]["language"] < 1


@pytest.mark.parametrize(("text", "prompt", "share"), [
    ("We add four apples.", "How many apples?", 1.0),
    ("We add \u56db\u4e2a apples.", "How many apples?", 3 / 5),
    ("\u6211\u4eec\u52a0\u56db", "\u6709\u591a\u5c11\u4e2a", 1.0),
    ("First \u6211\u4eec\u52a0", "\u6709\u591a\u5c11\u4e2a", 3 / 4),
    ("\u041c\u044b \u0441\u043a\u043b\u0430\u0434\u044b\u0432\u0430\u0435\u043c four", "How many?", 1 / 3),
    ("\u3053\u308c\u306f\u6f22\u5b57\u3067\u3059", "\u3044\u304f\u3064\u3067\u3059\u304b", 1.0),
    (r"$x + y = \frac{a}{b}$, 12 -> 3", "\u6709\u591a\u5c11\u4e2a", 1.0),  # formulas have no language
    ("```python\ndef total(items): return sum(items)\n```", "\u6709\u591a\u5c11\u4e2a", 1.0),
    ("<think>\u6211\u4eec</think>\u597d", "\u6709\u591a\u5c11", 1.0),
    ("words", "12 + 3 =", 1.0),
])
def test_language_is_the_share_of_words_in_the_script_of_the_question(text, prompt, share):
    assert consistency(text, prompt) == pytest.approx(share)
