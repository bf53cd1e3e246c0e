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
        for met in range(4):
            text = writing.draft(problem, rng, met / 3)
            assert sum(writing.measure(problem, text)) == met, (problem.check.principles, text)


def test_critique_and_score_agree_with_the_measure():
    rng = Random(1)
    for problem in notes(100):
        text = writing.draft(problem, rng, rng.random())
        clauses = writing.critique(problem, text).removesuffix(".").split(". ")
        assert [clause.endswith(" yes") for clause in clauses] == writing.measure(problem, text)
        assert writing.score(problem, text) == round(10 * sum(writing.measure(problem, text)) / len(clauses))


def test_the_measure_reads_whole_words_sentences_and_edges():
    problem = Problem(id="x", domain="writing", skill="note", messages=(), source="generated:writing", split="",
                      check=Check(kind="principles", principles=(
                          "It mentions the cat.", "It has 2 sentences.", "It starts with Dear Ann,",
                          "It ends with Thank you, Bob.")))
    assert writing.measure(problem, "Dear Ann, The Cat is old. Thank you, Bob.") == [True, True, True, True]
    assert writing.measure(problem, "Dear Anna, The category is 2.5 big! ") == [False, False, False, False]
    assert writing.measure(problem, "") == [False, False, False, False]


def test_a_principle_no_program_can_measure_is_refused():
    problem = Problem(id="x", domain="writing", skill="note", messages=(), source="s", split="",
                      check=Check(kind="principles", principles=("It is kind.",)))
    with pytest.raises(ValueError, match="It is kind"):
        writing.measure(problem, "Hello.")
    with pytest.raises(ValueError, match="It is kind"):
        writing.draft(problem, Random(0), 1.0)
