import dataclasses
import json
import threading

import pytest
from tiny_models import Killed, Quiet

from distill.generation import Answer, LoggedChat, Order, Requests, samples_of, solve, with_verdicts
from distill.problems import GENERATORS
from distill.prompts import prompt_messages
from pipeline.records import Status, Verdict
from pipeline.request_log import RequestLog

PROBLEMS = list(GENERATORS["math"](5, 0))
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8}


class Echo:
    """A generator that answers with the seed; keeps what it was asked, and dies at lot `die_at` of `lot` answers."""

    def __init__(self, die_at=None, too_long=(), name="c", sampling=SAMPLING, lot=4):
        self.name, self.sampling, self.lot, self.die_at, self.too_long = name, sampling, lot, die_at, too_long
        self.asked, self.lots = [], 0

    def prompt(self, messages):
        return "".join(message["content"] for message in messages)

    def answers(self, prompts, seeds):
        places = list(range(len(prompts)))
        for start in range(0, len(places), self.lot):
            self.lots += 1
            if self.lots == self.die_at:
                raise Killed("in the middle of a shard")
            part = places[start:start + self.lot]
            self.asked += [(prompts[place], seeds[place]) for place in part]
            # in another order than asked: answers come as they are finished
            yield {place: Answer("", 0, "too_long") if prompts[place] in self.too_long else
                   Answer(str(seeds[place]), len(str(seeds[place])), "stop", len(prompts[place]))
                   for place in reversed(part)}

    def stop(self):
        self.die_at = self.lots + 1


def orders(samples=2, problems=PROBLEMS):
    return [Order(problem, form, prompt_messages(problem, form, "Think first."), samples)
            for problem in problems for form in ("original", "reasoning")]


def run(tmp_path, generator, samples=2, seed=0, progress=None):
    return samples_of(orders(samples), generator=generator, log_path=tmp_path / "requests.jsonl", seed=seed,
                      progress=progress or Quiet())


def test_every_order_gives_its_samples_in_order_with_what_made_them(tmp_path):
    found = run(tmp_path, Echo())
    assert [(s.problem_id, s.form) for s in found] == [
        (problem.id, form) for problem in PROBLEMS for form in ("original", "reasoning") for _ in range(2)]
    assert [json.loads(s.sampling)["index"] for s in found] == [0, 1] * 10
    assert json.loads(found[0].sampling) == {**SAMPLING, "index": 0, "seed": 0}
    assert len({s.id for s in found}) == 20 and all(s.checkpoint == "c" and s.verdict is None for s in found)
    assert all(s.tokens == len(s.completion) > 0 for s in found)


def test_every_sample_has_a_seed_of_its_own_that_no_batch_changes(tmp_path):
    echo = Echo()
    found = run(tmp_path, echo)
    assert len({seed for _, seed in echo.asked}) == 20
    assert all(0 <= seed < 2**31 for _, seed in echo.asked)
    assert run(tmp_path / "other", Echo(lot=7)) == found


def test_a_killed_generation_asks_again_for_nothing_finished(tmp_path):
    whole = run(tmp_path / "whole", Echo())
    with pytest.raises(Killed):
        run(tmp_path, Echo(die_at=3))
    echo, progress = Echo(), Quiet()
    assert run(tmp_path, echo, progress=progress) == whole
    assert len(echo.asked) == 12 and progress.done == 20
    assert progress.notes == ["20 samples asked, 8 made before, 12 left"]


def test_more_samples_a_problem_ask_for_the_new_ones_alone(tmp_path):
    before = run(tmp_path, Echo(), samples=2)
    echo = Echo()
    after = run(tmp_path, echo, samples=3)
    assert len(echo.asked) == 10
    assert {s.id for s in before} < {s.id for s in after} and len(after) == 30


@pytest.mark.parametrize("change", [{"name": "d"}, {"sampling": {**SAMPLING, "temperature": 0.5}}, {"seed": 1}])
def test_another_checkpoint_temperature_or_seed_is_another_request(tmp_path, change):
    run(tmp_path, Echo())
    seed = change.pop("seed", 0)
    echo = Echo(**change)
    run(tmp_path, echo, seed=seed)
    assert len(echo.asked) == 20


def test_a_prompt_too_long_gives_empty_samples_and_the_others_still_come(tmp_path):
    found = run(tmp_path, Echo(too_long={Echo().prompt(prompt_messages(PROBLEMS[1], "original"))}))
    empty = [s for s in found if s.finish_reason == "too_long"]
    assert [(s.problem_id, s.form, s.completion, s.tokens) for s in empty] == [
        (PROBLEMS[1].id, "original", "", 0)] * 2
    assert len(found) == 20


# -- rounds ----------------------------------------------------------------------------------------------------


class Judgement:
    """A verifier to which the samples of problem k are right from number RIGHT_FROM[k] on, as it sees them."""

    RIGHT_FROM = (0, 2, 4, 4, 99)

    def __init__(self, status=Status.WRONG):
        self.status, self.given, self.lock = status, 0, threading.Lock()
        self.seen = {}

    def __call__(self, problems, texts):
        verdicts = []
        for problem, text in zip(problems, texts, strict=True):
            place = [p.id for p in PROBLEMS].index(problem.id)
            tries = self.seen.setdefault(problem.id, [])
            if text not in tries:
                tries.append(text)
            right = tries.index(text) >= self.RIGHT_FROM[place]
            self.given += 1
            verdicts.append(Verdict(Status.CORRECT, 1.0, "equal", "math", "1") if right else
                            Verdict(self.status, None if self.status is Status.INFRA_ERROR else 0.0, "no", "math", "1"))
        return verdicts


def solved(tmp_path, echo, verify, most=8, wanted=1, samples=1):
    with RequestLog(tmp_path / "requests.jsonl") as log:
        return solve(orders(samples), Requests(echo, log, 0), verify, most, wanted)


def counts(samples):
    return [sum(s.problem_id == problem.id for s in samples) for problem in PROBLEMS]


def test_easy_problems_stop_after_the_first_round_and_hard_ones_get_as_many_again_up_to_the_cap(tmp_path):
    echo = Echo(lot=1)
    found = solved(tmp_path, echo, Judgement(), most=8)
    # in two forms: 1, then 2, 4, 8 samples each
    assert counts(found) == [2, 4, 8, 8, 16]
    assert len(echo.asked) == len(found) and all(s.verdict is not None for s in found)
    assert [s.problem_id for s in found] == [p.id for p, n in zip(PROBLEMS, counts(found), strict=True)
                                             for _ in range(n)]


def test_a_cap_between_two_rounds_is_kept(tmp_path):
    assert counts(solved(tmp_path, Echo(lot=1), Judgement(), most=3)) == [2, 4, 6, 6, 6]


def test_more_right_samples_wanted_are_more_rounds(tmp_path):
    assert counts(solved(tmp_path, Echo(lot=1), Judgement(), most=8, wanted=2)) == [4, 8, 8, 8, 16]


def test_a_verifier_that_fails_asks_for_no_further_samples(tmp_path):
    verify = Judgement(Status.INFRA_ERROR)
    found = solved(tmp_path, Echo(lot=1), verify)
    assert counts(found) == [2] * 5
    assert sum(s.verdict.status is Status.INFRA_ERROR for s in found) == 8
    assert verify.given == 10 + 8, "each failure is tried once again"


def test_a_prompt_that_cannot_be_answered_gets_one_round(tmp_path):
    long = {Echo().prompt(prompt_messages(PROBLEMS[4], form, "Think first.")) for form in ("original", "reasoning")}
    assert counts(solved(tmp_path, Echo(lot=1, too_long=long), Judgement()))[4] == 2


@pytest.mark.parametrize("die_at", [3, 11, 14, 30])
def test_rounds_killed_anywhere_end_with_the_same_samples_and_ask_for_none_twice(tmp_path, die_at):
    verify = Judgement()
    whole = solved(tmp_path / "whole", Echo(lot=1), verify)
    first, second, again = Echo(lot=1, die_at=die_at), Echo(lot=1), Judgement()
    with pytest.raises(Killed):
        solved(tmp_path, first, again)
    assert solved(tmp_path, second, again) == whole
    assert len(first.asked) == die_at - 1 and len(first.asked + second.asked) == len(whole)
    assert not set(first.asked) & set(second.asked)
    assert again.given == verify.given, "verdicts of finished rounds come from the log"


# -- verdicts ----------------------------------------------------------------------------------------------------


def test_verdicts_are_joined_to_their_samples(tmp_path):
    samples, advanced = run(tmp_path, Echo()), []

    def verify(problems, texts):
        return [Verdict(Status.WRONG, 0.0, f"{problem.id}/{text}", "math", "1")
                for problem, text in zip(problems, texts, strict=True)]

    found = with_verdicts(samples, {problem.id: problem for problem in PROBLEMS}, verify, advanced.append)
    assert sum(advanced) == 20
    assert [s.verdict.reason for s in found] == [f"{s.problem_id}/{s.completion}" for s in samples]
    assert [dataclasses.replace(s, verdict=None) for s in found] == samples


def test_only_samples_without_a_verdict_are_verified_and_failures_tried_once_more(tmp_path):
    right = Verdict(Status.CORRECT, 1.0, "kept", "math", "1")
    broken = Verdict(Status.INFRA_ERROR, None, "x", "code", "1")
    samples = run(tmp_path, Echo())
    samples = [dataclasses.replace(s, verdict=v) for s, v in
               zip(samples, [right] * 15 + [broken] * 2 + [None] * 3, strict=True)]
    calls = []

    def verify(problems, texts):
        calls.append(list(texts))
        heals = len(calls) > 1
        return [broken if text == samples[19].completion or not heals and text == samples[16].completion else
                Verdict(Status.WRONG, 0.0, "new", "math", "1") for text in texts]

    found = with_verdicts(samples, {problem.id: problem for problem in PROBLEMS}, verify)
    assert calls == [[s.completion for s in samples[15:]], [samples[16].completion, samples[19].completion]]
    assert [s.verdict.reason for s in found] == ["kept"] * 15 + ["new"] * 4 + ["x"]


def test_a_judge_reads_from_the_log_what_it_was_answered(tmp_path):
    conversations = [[{"role": "user", "content": text}] for text in "abc"]
    echo = Echo(lot=1, die_at=4)
    with RequestLog(tmp_path / "log.jsonl") as log, pytest.raises(Killed):
        chat = LoggedChat(echo)
        chat.log = log
        chat(conversations, 2, seed=0)
    second = Echo()
    with RequestLog(tmp_path / "log.jsonl") as log:
        chat = LoggedChat(second)
        chat.log = log
        texts = chat(conversations, 2, seed=0)
    assert [len(row) for row in texts] == [2, 2, 2] and len({text for row in texts for text in row}) == 6
    assert len(echo.asked) == len(second.asked) == 3
