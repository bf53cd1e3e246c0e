import dataclasses

import pytest
from sft_set_stages import reject

from distill.problems import GENERATORS
from distill.prompts import prompt_messages, worked_completion
from pipeline.recipe import RejectConfig
from pipeline.records import Sample, Status, Verdict
from pipeline.stage import StageError

CONFIG = RejectConfig(keep=1, max_tokens=100, min_judge_score=0.7)
MATH = list(GENERATORS["math"](3, 0))
NOTE = next(GENERATORS["writing"](1, 0))


def verdict(status=Status.CORRECT, score=1.0, verifier="math"):
    return Verdict(status=status, score=None if status in (Status.INFRA_ERROR, Status.ABSTAIN) else score,
                   reason="r", verifier=verifier, version="1")


def sample(problem, form="original", completion=None, **changes):
    completion = worked_completion(problem, form) if completion is None else completion
    made = Sample(id=Sample.make_id(problem.id, form, "c", str(changes), completion), problem_id=problem.id,
                  domain=problem.domain, form=form, messages=prompt_messages(problem, form, "Think first."),
                  completion=completion,
                  checkpoint="c", sampling="{}", finish_reason="stop", tokens=len(completion), verdict=verdict())
    return dataclasses.replace(made, **changes)


def test_the_shortest_correct_sample_of_each_problem_and_form_is_kept():
    p = MATH[0]
    short, long = sample(p, tokens=10), sample(p, completion="Well. " + p.answer, tokens=20)
    thought = sample(p, "reasoning", tokens=60)
    kept, rejected, funnel = reject([long, short, thought], CONFIG)
    assert kept == [short, thought]  # in the order they came in
    assert rejected == [(long, "not_shortest")]
    assert funnel == {"math": {"in": 3, "out": 2, "lost": {"not_shortest": 1}}}


def test_every_rejected_sample_has_the_reason_that_sent_it_away():
    p = MATH[0]
    cases = {
        "no_verdict": sample(p, verdict=None),
        "wrong": sample(p, verdict=verdict(Status.WRONG, 0.0)),
        "malformed": sample(p, verdict=verdict(Status.MALFORMED, 0.0)),
        "timeout": sample(p, verdict=verdict(Status.TIMEOUT, 0.0)),
        "infra_error": sample(p, verdict=verdict(Status.INFRA_ERROR)),
        "abstain": sample(p, verdict=verdict(Status.ABSTAIN)),
        "truncated": sample(p, finish_reason="length"),
        "too_long": sample(p, tokens=101),
        "bad_thinking": sample(p, completion="<think>\nHm. " + p.answer),
        "no_thinking": sample(p, "reasoning", completion=p.answer),
        "empty_answer": sample(p, completion=" \n"),
    }
    kept, rejected, funnel = reject([*cases.values(), sample(MATH[1], tokens=9)], CONFIG)
    assert len(kept) == 1
    assert {reason: s for s, reason in rejected} == cases
    assert funnel["math"]["lost"] == dict.fromkeys(cases, 1)
    assert funnel["math"]["in"] == funnel["math"]["out"] + sum(funnel["math"]["lost"].values())


def test_equal_completions_do_not_fill_the_places_of_a_problem():
    p = MATH[0]
    same = [sample(p, tokens=10, sampling=str(i), id=f"{i:016x}") for i in range(3)]
    other = sample(p, completion="So: " + p.answer, tokens=12)
    kept, rejected, _ = reject([*same, other], RejectConfig(keep=2, max_tokens=100))
    assert [s.completion for s in kept] == [p.answer, other.completion]
    assert [reason for _, reason in rejected] == ["duplicate", "duplicate"]


def test_an_original_sample_may_think_unasked():
    p = MATH[0]
    thinks = sample(p, completion=worked_completion(p, "reasoning"), tokens=60)
    assert reject([thinks], CONFIG)[0] == [thinks]


def test_judged_samples_pass_the_floor_and_the_best_score_wins_over_length():
    scored = [sample(NOTE, completion=f"Note {score}.", tokens=tokens, verdict=verdict(Status.CORRECT, score, "judge"))
              for score, tokens in ((0.5, 5), (0.75, 10), (1.0, 30))]
    kept, rejected, _ = reject(scored, CONFIG)
    assert kept == [scored[2]]
    assert {reason for _, reason in rejected} == {"judge_score", "not_shortest"}


def test_a_domain_that_ends_empty_stops_with_the_funnel():
    samples = [sample(MATH[0], tokens=9), sample(NOTE, verdict=verdict(Status.ABSTAIN)),
               sample(NOTE, completion="Hi.", verdict=verdict(Status.WRONG, 0.2, "judge"))]
    with pytest.raises(StageError, match=r"nothing for writing:\n  math: 1 in, 1 out\n  writing: 2 in, 0 out; lost"):
        reject(samples, CONFIG)


def test_chains_that_mix_languages_or_go_in_circles_are_rejected_and_long_plain_ones_are_not():
    p = MATH[0]
    chinese = "<think>\n\u6211\u4eec\u5148\u628a\u6570\u5b57\u52a0\u8d77\u6765\n</think>\n" + p.answer
    circles = "<think>\nFirst a sum. " + "Wait, let me check that again. " * 40 + "\n</think>\n" + p.answer
    steps = " ".join(f"Step {i} adds {i * 37 % 101} to what was there." for i in range(60))
    plain = f"<think>\n{steps}\n</think>\n{p.answer}"
    for completion, reason in ((chinese, "mixed_language"), (circles, "repetition"), (plain, None)):
        kept, rejected, _ = reject([sample(p, completion=completion, tokens=90), sample(MATH[1], tokens=9)], CONFIG)
        assert [why for _, why in rejected] == ([reason] if reason else [])
        assert len(kept) == (1 if reason else 2)


def test_the_parts_that_samples_lie_in_do_not_matter():
    samples = [sample(p, form, completion=f"{lead}{worked_completion(p, form)}", tokens=9 + len(lead))
               for lead in ("", "So. ", "Well. ") for p in MATH for form in ("original", "reasoning")]
    whole, split = reject(samples, CONFIG), reject(samples, CONFIG, per_part=4)
    assert {s.id for s in whole[0]} == {s.id for s in split[0]} and len(whole[0]) == 2 * len(MATH)
    assert whole[2] == split[2]
