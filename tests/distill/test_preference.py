import dataclasses
import json
from random import Random

import pytest

from distill.preference import Pair, keep_pair, labelled, pairs_of, training_rows
from distill.problems import writing
from pipeline.records import Check, Sample
from rewards.judge import Comparison
from rewards.judge_prompts import pairwise_messages, parse_pairwise, parse_pointwise, pointwise_messages

NOTES = list(writing.generate(6, 0))
FOREIGN = dataclasses.replace(NOTES[0], id="foreign", source="jsonl:mine",
                              check=Check("principles", principles=("Be kind.",)))


def sample(problem, completion, index=0, finish_reason="stop"):
    return Sample(f"{problem.id}-{index}", problem.id, "writing", "original", problem.messages, completion, "c", "{}",
                  finish_reason, 3, None)


def compared(a, b, consistent=True):
    return Comparison(a, b, 2, 2, consistent, ("", ""))


def vote(a, b, about=("x", "y")):
    return f"A: {about[0]}\nB: {about[1]}\nScores: {a} {b}"


def row(problem, outputs, score_a, score_b, a="first answer", b="second answer"):
    return {"problem_id": problem.id, "a": a, "b": b, "outputs": outputs, "score_a": score_a, "score_b": score_b}


def test_the_first_two_whole_answers_of_a_problem_are_its_pair_without_their_thinking():
    samples = [sample(NOTES[0], "<think>never closed"), sample(NOTES[0], "cut off", finish_reason="length"),
               sample(NOTES[0], "<think>\nhm\n</think>\nOne."), sample(NOTES[0], "Two."), sample(NOTES[0], "Three."),
               sample(NOTES[1], "Same."), sample(NOTES[1], " Same. "), sample(NOTES[2], "Alone."),
               sample(NOTES[2], "<think>x</think> ")]
    pairs, lost = pairs_of(NOTES[:4], samples)
    assert pairs == [Pair(NOTES[0], "One.", "Two.")]
    assert lost == {"same_answer": 1, "malformed": 2}


@pytest.mark.parametrize(("comparison", "a", "b", "reason"), [
    (compared(8, 2), "x" * 10, "y" * 20, None), (compared(3, 2), "x", "y", None),
    (compared(None, None, False), "x", "y", "abstained"), (compared(8, 2, False), "x", "y", "orders_disagree"),
    (compared(5, 4.5), "x", "y", "small_gap"), (compared(5, 5), "x", "y", "small_gap"),
    (compared(8, 2), "x" * 10, "y" * 21, "length"), (compared(2, 8), "x" * 21, "y" * 10, "length")])
def test_a_pair_stays_when_it_is_clear_agreed_and_of_like_length(comparison, a, b, reason):
    assert keep_pair(Pair(NOTES[0], a, b), comparison, min_gap=1.0) == reason


def test_labels_are_measured_where_a_program_can_and_ties_are_left_out():
    rng = Random(0)
    problems = {problem.id: problem for problem in NOTES}
    pairs = [row(p, [], 1.0, 9.0, a=writing.draft(p, rng, 1.0), b=writing.draft(p, rng, 0.0)) for p in NOTES]
    pairs.append(row(NOTES[0], [], 9.0, 1.0, a="same", b="same"))
    known, source = labelled(pairs, problems)
    assert source == "measured"
    assert [(found[0], found[3]) for found in known] == [(p, 10.0) for p in NOTES]  # whatever the votes said


def test_labels_are_votes_where_no_program_can_measure():
    pairs = [row(FOREIGN, [], 3.0, 7.0), row(FOREIGN, [], None, None), row(FOREIGN, [], 5.0, 5.0)]
    assert labelled(pairs, {"foreign": FOREIGN}) == ([(FOREIGN, "first answer", "second answer", -4.0)], "votes")
    both = [row(FOREIGN, [], 3.0, 7.0), row(NOTES[0], [], 3.0, 7.0)]
    assert labelled(both, {"foreign": FOREIGN, NOTES[0].id: NOTES[0]})[1] == "measured+votes"


def test_votes_that_agree_become_pairwise_and_pointwise_judgements():
    outputs = [vote(8, 2, ("good", "poor")), vote(3, 9, ("weak", "strong"))]  # A first, then B first
    rows = training_rows([row(FOREIGN, outputs, 8.5, 2.5)], {"foreign": FOREIGN})
    assert [(messages, text) for _, messages, text in rows] == [
        (pairwise_messages(FOREIGN, "first answer", "second answer"), outputs[0]),
        (pointwise_messages(FOREIGN, "first answer"), "good\nScore: 8"),
        (pointwise_messages(FOREIGN, "second answer"), "poor\nScore: 2"),
        (pairwise_messages(FOREIGN, "second answer", "first answer"), outputs[1]),
        (pointwise_messages(FOREIGN, "second answer"), "weak\nScore: 3"),
        (pointwise_messages(FOREIGN, "first answer"), "strong\nScore: 9")]
    assert len({row_id for row_id, _, _ in rows}) == 6
    for _, messages, text in rows:
        parsed = parse_pairwise(text) if "two answers" in messages[0]["content"] else parse_pointwise(text)
        assert parsed is not None


def test_votes_against_the_average_torn_votes_and_ties_teach_nothing():
    outputs = [vote(8, 2), vote(2, 8), "no scores here", vote(5, 5), vote(9, 1), vote(5, 5)]
    rows = training_rows([row(FOREIGN, outputs, 6.0, 4.0)], {"foreign": FOREIGN})
    assert {text for _, messages, text in rows if "two answers" in messages[0]["content"]} == {vote(8, 2)}


def test_thinking_of_the_judge_is_removed_and_equal_judgements_stand_once():
    thought = f"<think>\nhm\n</think>\n{vote(8, 2)}"
    rows = training_rows([row(FOREIGN, [thought, vote(8, 2), vote(2, 8), vote(2, 8)], 8.0, 2.0)], {"foreign": FOREIGN})
    assert [text for _, _, text in rows].count(vote(8, 2)) == 1
    assert not any("<think>" in text for _, _, text in rows)
    assert json.dumps([text for _, _, text in rows]).count("Score: ") == 4
