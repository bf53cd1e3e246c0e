import dataclasses

import pytest

from distill.problems import GENERATORS
from distill.prompts import prompt_key, prompt_messages, worked_completion

REFLECTIVE = "Think first."


def problem():
    return next(GENERATORS["math"](1, 0))


def test_the_original_form_is_the_problem_alone_and_the_reasoning_form_has_the_system_prompt():
    p = problem()
    assert prompt_messages(p, "original") == p.messages
    assert prompt_messages(p, "reasoning", REFLECTIVE) == ({"role": "system", "content": REFLECTIVE}, *p.messages)
    assert prompt_key(prompt_messages(p, "reasoning", REFLECTIVE)) == prompt_key(p.messages)


def test_a_system_message_of_the_problem_follows_the_reflective_one():
    p = dataclasses.replace(problem(), messages=({"role": "system", "content": "Be kind."}, *problem().messages))
    sent = prompt_messages(p, "reasoning", REFLECTIVE)
    assert [m["role"] for m in sent] == ["system", "user"]
    assert sent[0]["content"] == f"{REFLECTIVE}\nBe kind."


def test_the_worked_reasoning_wraps_the_chain_and_needs_one():
    p = problem()
    assert worked_completion(p, "original") == p.answer
    assert worked_completion(p, "reasoning") == f"<think>\n{p.solution}\n</think>\n{p.answer}"
    bare = dataclasses.replace(p, solution=None)
    assert worked_completion(bare, "reasoning") is None and worked_completion(bare, "original") == p.answer
    assert worked_completion(dataclasses.replace(p, answer=None), "original") is None


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="original, reasoning"):
        prompt_messages(problem(), "loud", REFLECTIVE)
    with pytest.raises(ValueError, match="needs the reflective prompt"):
        prompt_messages(problem(), "reasoning")
    with pytest.raises(ValueError, match="original, reasoning"):
        worked_completion(problem(), "loud")
