import dataclasses
import json

import pytest
from tiny_models import Killed, Quiet

from distill.generation import Order, generate, with_verdicts
from distill.problems import GENERATORS
from distill.prompts import prompt_messages
from pipeline.records import Status, Verdict

PROBLEMS = list(GENERATORS["math"](5, 0))
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8}


def encode(messages):
    return list("".join(message["content"] for message in messages).encode())


def decode(ids):
    return bytes(ids).decode()


class EchoSampler:
    """Answers with its seed; keeps what it was asked, and dies at call `die_at`."""

    def __init__(self, die_at=None, too_long=()):
        self.asked, self.calls, self.die_at, self.too_long = [], 0, die_at, too_long

    def __call__(self, prompts, seeds):
        self.calls += 1
        if self.calls == self.die_at:
            raise Killed("in the middle of a shard")
        self.asked += list(zip(map(tuple, prompts), seeds, strict=True))
        return [((), "too_long") if tuple(prompt) in self.too_long else (list(str(seed).encode()), "stop")
                for prompt, seed in zip(prompts, seeds, strict=True)]


def run(tmp_path, sampler, samples=2, problems=PROBLEMS, progress=None, **changes):
    orders = [Order(problem, form, prompt_messages(problem, form, "Think first."), samples)
              for problem in problems for form in ("original", "reasoning")]
    return generate(orders, **{"sampler": sampler, "encode": encode, "decode": decode, "sampling": SAMPLING,
                               "checkpoint": "c", "log_path": tmp_path / "requests.jsonl", "shard_prompts": 4,
                               "seed": 0, "progress": progress or Quiet(), **changes})


def test_every_order_gives_its_samples_in_order_with_what_made_them(tmp_path):
    found = run(tmp_path, EchoSampler())
    assert [(s.problem_id, s.form) for s in found] == [
        (problem.id, form) for problem in PROBLEMS for form in ("original", "reasoning") for _ in range(2)]
    assert [json.loads(s.sampling)["index"] for s in found] == [0, 1] * 10
    assert json.loads(found[0].sampling) == {**SAMPLING, "index": 0, "seed": 0}
    assert len({s.id for s in found}) == 20 and all(s.checkpoint == "c" and s.verdict is None for s in found)
    assert all(s.tokens == len(s.completion) > 0 for s in found)


def test_every_sample_has_a_seed_of_its_own(tmp_path):
    sampler = EchoSampler()
    run(tmp_path, sampler)
    assert len({seed for _, seed in sampler.asked}) == 20
    assert all(0 <= seed < 2**31 for _, seed in sampler.asked)


def test_a_killed_generation_asks_again_for_no_finished_shard(tmp_path):
    whole = run(tmp_path / "whole", EchoSampler())
    with pytest.raises(Killed):
        run(tmp_path, EchoSampler(die_at=3))
    sampler, progress = EchoSampler(), Quiet()
    assert run(tmp_path, sampler, progress=progress) == whole
    assert len(sampler.asked) == 12 and progress.done == 20
    assert progress.notes == ["20 samples asked, 8 in the log, 12 left"]


def test_more_samples_a_problem_ask_for_the_new_ones_alone(tmp_path):
    before = run(tmp_path, EchoSampler(), samples=2)
    sampler = EchoSampler()
    after = run(tmp_path, sampler, samples=3)
    assert len(sampler.asked) == 10
    assert {s.id for s in before} < {s.id for s in after} and len(after) == 30


@pytest.mark.parametrize("change", [{"checkpoint": "d"}, {"sampling": {**SAMPLING, "temperature": 0.5}}, {"seed": 1}])
def test_another_checkpoint_temperature_or_seed_is_another_request(tmp_path, change):
    run(tmp_path, EchoSampler())
    sampler = EchoSampler()
    run(tmp_path, sampler, **change)
    assert len(sampler.asked) == 20


def test_a_prompt_too_long_gives_empty_samples_and_the_others_still_come(tmp_path):
    long = tuple(encode(prompt_messages(PROBLEMS[1], "original")))
    found = run(tmp_path, EchoSampler(too_long={long}))
    empty = [s for s in found if s.finish_reason == "too_long"]
    assert [(s.problem_id, s.form, s.completion, s.tokens) for s in empty] == [
        (PROBLEMS[1].id, "original", "", 0)] * 2
    assert len(found) == 20


def test_verdicts_are_joined_to_their_samples_chunk_by_chunk(tmp_path):
    samples, sizes = run(tmp_path, EchoSampler()), []

    def verify(problems, texts):
        sizes.append(len(texts))
        return [Verdict(Status.WRONG, 0.0, f"{problem.id}/{text}", "math", "1")
                for problem, text in zip(problems, texts, strict=True)]

    progress = Quiet()
    found = with_verdicts(samples, {problem.id: problem for problem in PROBLEMS}, verify, 8, progress)
    assert sizes == [8, 8, 4] and progress.done == 20
    assert [s.verdict.reason for s in found] == [f"{s.problem_id}/{s.completion}" for s in samples]
    assert [dataclasses.replace(s, verdict=None) for s in found] == samples
