from dataclasses import replace
from unittest.mock import ANY

import pytest

from evaluation.benchmark import accuracy, pooled, row, win_rate
from evaluation.calibration import calibrate, calibrate_match, clear_cases, expected_calibration_error
from evaluation.statistics import wilson
from pipeline.records import Check, Problem, Sample, Status, Verdict
from rewards.judge import Judge

NOTE = Problem("note", "writing", "note", ({"role": "user", "content": "Write."},),
               Check("principles", principles=("It is good.",)), "test", "heldout")


def sample(status, problem="p", index=0):
    score = {Status.CORRECT: 1.0, Status.INFRA_ERROR: None, Status.ABSTAIN: None}.get(status, 0.0)
    found = None if status is None else Verdict(status, score, "r", "math", "1")
    return Sample(f"{problem}-{index}", problem, "math", "original", (), "", "c", "{}", "stop", 1, found)


def scripted_judge(quality, first_bonus=0.0):
    """A judge that scores by `quality` (text -> 0 to 10, or None for an output no one can read)."""

    def scores(text):
        answers = [part.split("\nEnd of answer")[0] for part in text.replace("\r", "").split(":\n")[1:]]
        return [quality(answer) for answer in answers if answer in KNOWN]

    def generate(conversations, n, seed):
        outputs = []
        for conversation in conversations:
            found = scores(conversation[0]["content"])
            if None in found:
                outputs.append("?")
            elif len(found) == 1:
                outputs.append(f"fine\nScore: {found[0]:g}")
            else:
                outputs.append(f"A: x\nB: y\nScores: {min(10, found[0] + first_bonus):g} {found[1]:g}")
        return [[output] * n for output in outputs]

    return Judge(generate)


KNOWN = ("good words", "bad words", "fair words", "odd words")
QUALITY = {"good words": 9, "fair words": 5, "bad words": 1, "odd words": None}.get


def test_accuracy_is_over_problems_with_a_verdict():
    statuses = [Status.CORRECT] * 3 + [Status.WRONG, Status.MALFORMED, Status.TIMEOUT, Status.INFRA_ERROR,
                                       Status.INFRA_ERROR, Status.ABSTAIN, None]
    found = accuracy([sample(status, f"p{i}") for i, status in enumerate(statuses)], [], 4)
    assert found == {"n": 6, "accuracy": 0.5, "ci95": list(wilson(3, 6)), "pass_at_k": None}


def test_accuracy_without_a_verdict_is_unknown_and_not_zero():
    found = accuracy([sample(Status.INFRA_ERROR)], [], 4)
    assert found == {"n": 0, "accuracy": None, "ci95": [0.0, 1.0], "pass_at_k": None}


def test_pass_at_k_is_over_problems_with_k_verdicts():
    tries = {"solved": [Status.WRONG, Status.CORRECT], "failed": [Status.WRONG, Status.TIMEOUT],
             "broken": [Status.CORRECT, Status.INFRA_ERROR]}
    sampled = [sample(status, problem, i) for problem, found in tries.items() for i, status in enumerate(found)]
    assert accuracy([], sampled, 2)["pass_at_k"] == 0.5


def test_pooled_counts_every_problem_once_and_skips_empty_domains():
    rows = {"math": row(90, 100, 0.8), "code": row(1, 10, None), "logic": row(0, 0, 0.4)}
    assert pooled(rows) == {"n": 110, "accuracy": pytest.approx(91 / 110), "ci95": pytest.approx(list(wilson(91, 110))),
                            "pass_at_k": pytest.approx(0.6)}
    assert pooled({})["accuracy"] is None


def test_the_win_rate_counts_wins_one_and_ties_half():
    ours = ["good words", "bad words", "fair words", "good words"]
    theirs = ["bad words", "good words", "fair words", "fair words"]
    found = win_rate(scripted_judge(QUALITY), unmeasured, [NOTE] * 4, ours, theirs)
    assert (found["n"], found["accuracy"]) == (4, 2.5 / 4)
    back = win_rate(scripted_judge(QUALITY), unmeasured, [NOTE] * 4, theirs, ours)
    assert found["accuracy"] + back["accuracy"] == 1.0


def test_a_judge_that_likes_the_first_place_gives_half_to_both():
    judge = scripted_judge(lambda text: 5, first_bonus=3)
    assert win_rate(judge, unmeasured, [NOTE], ["good words"], ["bad words"])["accuracy"] == 0.5


def test_pairs_the_judge_cannot_read_leave_the_win_rate():
    found = win_rate(scripted_judge(QUALITY), unmeasured, [NOTE] * 2, ["odd words", "good words"], ["bad words"] * 2)
    assert (found["n"], found["accuracy"]) == (1, 1.0)


def test_a_program_decides_where_it_can_measure():
    def measure(problem, text):
        return QUALITY(text)

    found = win_rate(None, measure, [NOTE] * 3, ["good words", "<think>x</think>good words", "bad words"],
                     ["bad words", "good words", "good words"])
    assert (found["n"], found["accuracy"]) == (3, 1.5 / 3)
    assert win_rate(None, measure, [NOTE], ["<think>good words"], ["bad words"])["accuracy"] == 0.0


def unmeasured(problem, text):
    return None


def test_an_empty_or_broken_answer_loses_without_being_asked_about():
    ours = ["", "good words", "<think>never closed", "<think>x</think>good words"]
    theirs = ["bad words", "<think>x</think>", "", "bad words"]
    found = win_rate(scripted_judge(QUALITY), unmeasured, [NOTE] * 4, ours, theirs)
    assert (found["n"], found["accuracy"]) == (4, (0 + 1 + 0.5 + 1) / 4)
    assert win_rate(scripted_judge(QUALITY), unmeasured, [], [], [])["accuracy"] is None


def test_calibration_counts_right_consistent_and_abstained_pairs():
    pairs = [(NOTE, "good words", "bad words", 1.0),  # right
             (NOTE, "bad words", "fair words", 2.0),  # wrong: the label says A
             (NOTE, "bad words", "good words", -3.0),  # right
             (NOTE, "odd words", "good words", -1.0)]  # abstains, which counts as wrong
    assert calibrate(scripted_judge(QUALITY), pairs, "measured") == {
        "n": 4, "truth": "measured", "accuracy": 0.5, "pairwise_accuracy": 0.5, "consistency": 1.0,
        "abstain_rate": 0.25, "ece": ANY}


def test_a_judge_that_follows_the_order_is_not_consistent():
    pairs = [(NOTE, "good words", "bad words", 1.0)]
    found = calibrate(scripted_judge(lambda text: 5, first_bonus=3), pairs, "votes")
    assert (found["accuracy"], found["pairwise_accuracy"], found["consistency"]) == (0.5, 0.5, 0.0)


def test_calibration_without_pairs_is_unknown():
    assert calibrate(scripted_judge(QUALITY), [], "votes") == {
        "n": 0, "truth": "votes", "accuracy": None, "pairwise_accuracy": None, "consistency": None,
        "abstain_rate": None, "ece": None}


def test_calibration_error_is_the_distance_of_accuracy_from_confidence():
    sure_and_right, sure_and_wrong, unsure = (0.95, 1.0), (0.95, 0.0), (0.5, 0.5)
    assert expected_calibration_error([sure_and_right] * 9 + [sure_and_wrong]) == pytest.approx(0.05)
    assert expected_calibration_error([sure_and_wrong, unsure]) == pytest.approx(0.95 / 2)
    # within a bin too much and too little confidence cancel; between bins they do not
    assert expected_calibration_error([(0.61, 0.0), (0.64, 1.0)]) == pytest.approx(0.125)
    assert expected_calibration_error([(0.51, 0.0), (0.94, 1.0)]) == pytest.approx((0.51 + 0.06) / 2)
    assert expected_calibration_error([]) is None


def test_matching_is_calibrated_on_answers_whose_truth_is_known():
    problem = replace(NOTE, check=Check("math", "4"))

    def generate(conversations, n, seed):
        texts = [conversation[0]["content"].split("Answer:\n")[1] for conversation in conversations]
        return [[{"4": "same\nMatch: yes", "5": "same\nMatch: yes", "6": "no\nMatch: no"}.get(text[0], "?")]
                for text in texts]

    cases = [(problem, "4", True), (problem, "5", False), (problem, "6", False), (problem, "7", False)]
    assert calibrate_match(Judge(generate), cases) == {"match_n": 4, "match_accuracy": 0.5, "match_abstain_rate": 0.25}


def test_canaries_are_answers_that_the_judge_found_right_and_wrong_as_it_should():
    pairs = [(NOTE, "good words", "bad words", 1.0), (NOTE, "bad words", "fair words", 2.0),
             (NOTE, "odd words", "good words", -1.0)]
    assert clear_cases(scripted_judge(QUALITY), pairs) == [
        (NOTE, "good words", Status.CORRECT), (NOTE, "good words", Status.CORRECT), (NOTE, "bad words", Status.WRONG)]
