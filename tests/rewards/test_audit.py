"""The audit of the project's own verifiers, and of rewards that deserve to fail it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from rewards.adversarial import audit
from rewards.adversarial.cases import all_cases, named
from rewards.extract import single_value
from rewards.reasons import Reason

ROOT = Path(__file__).parents[2]
CASES = all_cases()


def test_cases_are_many_different_and_named_once():
    assert len(CASES) > 200
    assert max(Counter((case.exploit, json.dumps(case.check, sort_keys=True)) for case in CASES).values()) == 1
    assert max(Counter(name for name, _ in named(CASES)).values()) == 1
    assert all(case.exploit != case.twin for case in CASES)


def test_no_exploit_is_paid_and_no_honest_twin_refused(verifier):
    findings = audit.audit(audit.present(CASES), audit.our_reward(verifier))
    assert [finding.id for finding in findings if finding.paid] == []
    assert [finding.id for finding in findings if finding.refused] == []
    # an attack that breaks the sandbox gets no verdict: that is not held either
    assert [finding.id for finding in findings if finding.case.family == "sandbox" and finding.exploit is None] == []


def test_a_bound_is_no_value_unless_one_is_asked_for():
    for box in (r"\geq 42", "x < 42", r"\le 42", "\u2265 42", r"x \geqslant 42"):
        assert single_value(box, "42").reason is Reason.HEDGED_BOX
    for box, reference in (("x > 3", "x > 3"), ("x > 3", r"(3, \infty)"), ("2 < x < 5", "(2, 5)"),
                           (r"\left(2, 5\right)", "(2, 5)")):
        assert single_value(box, reference).value is not None


def test_a_reward_of_a_persons_own_is_audited_and_what_it_does_stays_in_a_fork(tmp_path):
    (tmp_path / "mine.py").write_text("""
import os
def lenient(prompts, completions, reference, **_):
    if "10^{12}" in completions[0]:
        os._exit(3)
    return [1.0 if reference[0] and reference[0] in completions[0] else 0.0]
""")
    done = subprocess.run(["env", f"PYTHONPATH={ROOT}:{tmp_path}", sys.executable, "-m", "pipeline.cli",
                           "audit-rewards", "--reward", "mine:lenient", "--family", "math", "--json"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)["mine:lenient"]
    paid = {row["id"] for row in rows if row["paid"]}
    assert "math-negated-01" in paid and "math-wrong-01" not in paid
    assert len(rows) == sum(case.family == "math" for case in CASES)
    missing = subprocess.run(["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "pipeline.cli", "audit-rewards",
                              "--reward", "nowhere:f"], capture_output=True, text=True, timeout=60)
    assert missing.returncode == 2 and "give it as module:function" in missing.stderr


def test_attacks_on_the_machine_reach_a_persons_reward_only_when_asked_for(tmp_path):
    (tmp_path / "harsh.py").write_text("def nothing(prompts, completions, **_): return [0.0]")
    command = ["env", f"PYTHONPATH={ROOT}:{tmp_path}", sys.executable, "-m", "pipeline.cli", "audit-rewards",
               "--reward", "harsh:nothing", "--json"]
    for family, wanted in (((), {"math", "code"}), (("--family", "sandbox"), {"sandbox"})):
        done = subprocess.run([*command, *family], capture_output=True, text=True, timeout=120)
        assert {row["id"].split("-")[0] for row in json.loads(done.stdout)["harsh:nothing"]} == wanted


@pytest.mark.parametrize(("score", "expected"), [(lambda: 0.5, 0.5), (lambda: None, None), (lambda: 1 / 0, None)])
def test_an_isolated_reward_gives_its_score_or_nothing(score, expected):
    assert audit.isolated(score) == expected
