import dataclasses
from random import Random

import pytest

from distill.problems import writing
from pipeline.records import Check, Problem


def notes(count=300):
    return list(writing.generate(count, 1))


def test_the_worked_note_meets_every_principle():
    for problem in notes():
        assert problem.check.reference is None
        assert all(writing.measure(problem, problem.answer)), (problem.check.principles, problem.answer)


def test_a_draft_meets_as_many_principles_as_its_quality_says():
    rng = Random(0)
    for problem in notes():
        principles = len(problem.check.principles)
        for met in range(principles + 1):
            text = writing.draft(problem, rng, met / principles)
            assert sum(writing.measure(problem, text)) == met, (problem.check.principles, text)


def test_critique_and_score_agree_with_the_measure():
    rng = Random(1)
    for problem in notes(100):
        text = writing.draft(problem, rng, rng.random())
        measured = writing.measure(problem, text)
        clauses = writing.critique(problem, text).removesuffix(".").split(". ")
        assert [clause.endswith(" yes") for clause in clauses] == measured
        assert writing.score(problem, text) == round(10 * sum(measured) / len(measured))


def test_the_measure_reads_whole_words_in_any_case():
    problem = next(writing.generate(1, 0, ["question"]))
    assert writing.measure(problem, "hello Ann. How are you?") == [True, True]
    assert writing.measure(problem, "Othello asks.") == [False, False]
    assert writing.measure(problem, "") == [False, False]


def test_a_problem_from_elsewhere_is_not_measurable_whatever_its_principles_say():
    ours = notes(1)[0]
    assert writing.measurable(ours)
    assert not writing.measurable(dataclasses.replace(ours, source="jsonl:letters"))


def test_a_principle_no_program_can_measure_is_refused():
    problem = Problem(id="x", domain="writing", skill="note", messages=(), source="s", split="",
                      check=Check(kind="principles", principles=("It is kind.",)))
    with pytest.raises(ValueError, match="It is kind"):
        writing.measure(problem, "Hello.")
    with pytest.raises(ValueError, match="It is kind"):
        writing.draft(problem, Random(0), 1.0)
