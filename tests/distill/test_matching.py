import dataclasses

from distill.judging import judge_demonstrations
from distill.matching import match_demonstration, verified_cases
from distill.problems import GENERATORS
from pipeline.records import Check, Sample, Status, Verdict
from rewards.judge_prompts import match_messages, parse_match

MATH = list(GENERATORS["math"](6, 0))
NOTE = next(GENERATORS["writing"](1, 0))
PROBLEMS = {problem.id: problem for problem in [*MATH, NOTE]}


def sample(problem, status, answer):
    return Sample(f"{problem.id}{answer}", problem.id, problem.domain, "original", problem.messages,
                  f"<think>so</think>{answer}", "c", "{}", "stop", 5,
                  Verdict(status, float(status is Status.CORRECT), "r", "v", "1"))


def test_half_of_the_comparisons_are_right_and_each_answer_comes_once():
    samples = [sample(problem, Status.CORRECT, problem.answer) for problem in MATH] * 2
    samples += [sample(problem, Status.WRONG, "It is \\boxed{-1}.") for problem in MATH[:4]]
    cases = verified_cases(samples, PROBLEMS, 6, seed=0)
    assert [right for _, _, right in cases] == [True, False] * 3
    assert len({(problem.id, answer) for problem, answer, _ in cases}) == 6
    assert len(verified_cases(samples, PROBLEMS, 100, seed=0)) == 8, "as many right ones as there are wrong ones"
    assert verified_cases(samples, PROBLEMS, 6, seed=0) == cases != verified_cases(samples, PROBLEMS, 6, seed=1)


def test_malformed_answers_and_problems_without_a_reference_teach_nothing():
    samples = [sample(NOTE, Status.CORRECT, "a"), sample(NOTE, Status.WRONG, "b"),
               sample(MATH[0], Status.MALFORMED, "c"),
               dataclasses.replace(sample(MATH[1], Status.WRONG, "d"), verdict=None)]
    assert verified_cases(samples, PROBLEMS, 6, seed=0) == []


def test_a_demonstration_is_a_judgement_that_the_parser_reads():
    problem = MATH[0]
    _, messages, judgement = match_demonstration(problem, "It is \\boxed{-1}.", False)
    assert messages == match_messages(problem, "It is \\boxed{-1}.")
    assert judgement == f"The reference says {problem.check.reference}. The answer says -1.\nMatch: no"
    assert match_demonstration(problem, "no box", False)[2].startswith(f"The reference says {problem.check.reference}. "
                                                                       "The answer says no box.\n")
    assert parse_match(judgement) == 0 and parse_match(match_demonstration(problem, "4", True)[2]) == 10


def test_worked_answers_show_a_judge_what_matches_and_what_does_not():
    pump = dataclasses.replace(MATH[0], id="a", check=Check("match", "It pumps blood."), answer="A pump for blood.")
    lung = dataclasses.replace(MATH[0], id="b", check=Check("match", "It takes in air."), answer="It breathes.")
    rows = judge_demonstrations([pump, lung, dataclasses.replace(pump, id="c", answer=None)], seed=0)
    assert [parse_match(judgement) for _, _, judgement in rows] == [10, 0, 10, 0]
    assert rows[1][1] == match_messages(pump, "It breathes.")
    alone, = judge_demonstrations([pump], seed=0)
    assert alone[2].endswith("Match: yes")
