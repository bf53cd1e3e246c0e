"""The teacher against a real HTTP server that misbehaves."""

import threading
import time
from email.utils import formatdate

import pytest
from openai_server import ChatServer, completion

from distill.generation import Answer
from distill.teacher import MOST_REFUSED, Account, Teacher, read_answer
from pipeline.recipe import TeacherConfig
from pipeline.stage import StageError

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 64}


def echo(body):
    return completion(f"{body['messages'][-1]['content']}/{body['seed']}")


def ask(server, questions=("a", "b", "c", "d"), notes=None, account=None, **config):
    """{question: answer} of one teacher, as far as they came, and its account."""
    config = TeacherConfig(**{"url": server.url, "model": "r1", "retries": 3, **config})
    account = account or Account(config)
    found = {}
    prompts = [[{"role": "user", "content": question}] for question in questions]
    with Teacher(config, SAMPLING, account, (notes if notes is not None else []).append, pause=0.01) as teacher:
        for lot in teacher.answers(prompts, range(len(prompts))):
            found |= {questions[place]: answer for place, answer in lot.items()}
    return found, account


def test_an_answer_is_asked_for_once_with_its_seed_and_sampling_and_paid_for():
    with ChatServer(echo) as server:
        found, account = ask(server, input_price=1.0, output_price=4.0)
    assert found["c"] == Answer("c/2", 5, "stop", 10)
    _, headers, body = min(server.requests, key=lambda row: row[2]["seed"])
    assert body == {"model": "r1", "messages": [{"role": "user", "content": "a"}], "seed": 0, **SAMPLING}
    assert "Authorization" not in headers
    assert account.counts() == {"requests": 4, "retries": 0, "prompt_tokens": 40, "completion_tokens": 20,
                                "usd": pytest.approx((40 + 4 * 20) / 1e6)}


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sesame")
    with ChatServer(echo) as server:
        ask(server, api_key_env="SOME_KEY")
        assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer sesame"}
        monkeypatch.delenv("SOME_KEY")
        with pytest.raises(StageError, match="the environment variable SOME_KEY .* is not set"):
            ask(server, api_key_env="SOME_KEY")


@pytest.mark.parametrize("trouble", [
    (429, {}, "slow down"), (500, {}, "oops"), (503, {}, "<html>"), (200, {}, "{\"choices\": [tor"), (200, {}, "{}"),
    (200, {}, '{"choices": []}'), (200, {}, "null"), (200, {"Content-Length": "900"}, "cut off"),
], ids=lambda trouble: f"{trouble[0]}-{trouble[2][:9]}")
def test_troubles_are_tried_again_and_counted(trouble):
    with ChatServer(echo, lambda number, body: trouble if number in (2, 3) else None) as server:
        found, account = ask(server, timeout=1)
    assert {question: answer.text for question, answer in found.items()} == {
        question: f"{question}/{place}" for place, question in enumerate("abcd")}
    assert (account.requests, account.retries) == (6, 2) == (len(server.requests), 2)


def test_a_slow_answer_is_given_up_and_asked_for_again():
    def slow_once(number, body):
        if number == 1:
            time.sleep(1.0)

    with ChatServer(echo, slow_once) as server:
        found, account = ask(server, timeout=0.3)
    assert len(found) == 4 and account.retries == 1


@pytest.mark.parametrize("wait", ["0.4", "a date"])
def test_retry_after_holds_back_every_request(wait):
    def limited(number, body):
        seconds = formatdate(time.time() + 1.6, usegmt=True) if wait == "a date" else wait
        return (429, {"Retry-After": seconds}, "") if number == 1 else None

    with ChatServer(echo, limited) as server:
        found, _ = ask(server, concurrency=1)
    first, second = (row[0] for row in server.requests[:2])
    assert len(found) == 4 and second - first >= 0.4


def test_no_more_are_sent_at_a_time_or_in_a_minute_than_allowed():
    with ChatServer(echo, seconds=0.05) as server:
        ask(server, "abcdefgh", concurrency=3)
    assert server.most_at_once == 3
    with ChatServer(echo) as server:
        ask(server, requests_per_minute=1200)
    times = sorted(row[0] for row in server.requests)
    assert times[-1] - times[0] >= 3 * 0.05 - 0.02


def test_a_request_that_fails_every_time_stops_the_run_after_what_was_answered():
    with ChatServer(echo, lambda number, body: (500, {}, "broken") if body["seed"] == 2 else None) as server:
        found = {}
        config = TeacherConfig(url=server.url, model="r1", retries=2, concurrency=4)
        with (Teacher(config, SAMPLING, Account(config), pause=0.01) as teacher,
              pytest.raises(StageError, match="gave no answer in 3 tries; the last: HTTP 500 broken.*goes on")):
            for lot in teacher.answers([[{"role": "user", "content": "x"}]] * 4, range(4)):
                found |= lot
    assert sorted(found) == [0, 1, 3]


@pytest.mark.parametrize(("status", "message"), [(401, "does not take the key: HTTP 401"),
                                                 (404, "cannot be asked: HTTP 404")])
def test_a_refused_key_or_an_unknown_model_stops_at_once(status, message):
    with ChatServer(echo, lambda number, body: (status, {}, "no")) as server, pytest.raises(StageError, match=message):
        ask(server, concurrency=1)
    assert len(server.requests) == 1


def test_a_request_that_is_refused_gives_an_empty_answer_and_the_others_come():
    notes = []
    with ChatServer(echo, lambda number, body: (400, {}, "context length") if body["seed"] == 1 else None) as server:
        found, account = ask(server, notes=notes)
    assert found["b"] == Answer("", 0, "refused")
    assert len(found) == 4 and account.retries == 0 and len(notes) == 1 and "context length" in notes[0]


def test_an_endpoint_that_refuses_everything_stops_the_run():
    with ChatServer(echo, lambda number, body: (400, {}, "temperature")) as server, \
            pytest.raises(StageError, match=f"refused its first {MOST_REFUSED} requests: HTTP 400 temperature"):
        ask(server, "x" * 60, concurrency=1)
    assert len(server.requests) == MOST_REFUSED


def test_nothing_is_asked_once_the_money_is_spent_and_what_was_spent_before_counts():
    with ChatServer(echo) as server:
        config = TeacherConfig(url=server.url, model="r1", concurrency=1, output_price=1e5, most_cost=1.0)
        account = Account(config)  # an answer costs half a dollar
        with pytest.raises(StageError, match=r"1\.00 USD of most_cost 1 are spent; its answers are kept"):
            ask(server, account=account, concurrency=1, output_price=1e5, most_cost=1.0)
        assert len(server.requests) == 2
        with pytest.raises(StageError, match="most_cost"):
            ask(server, account=account, concurrency=1, output_price=1e5, most_cost=1.0)
        assert len(server.requests) == 2


QUESTION = [{"role": "user", "content": "four plus four"}]


def test_reasoning_that_an_endpoint_reports_apart_stands_between_think_tags():
    assert read_answer(completion("8", "4 + 4\n"), QUESTION).text == "<think>\n4 + 4\n</think>\n8"
    cut = read_answer(completion("", "4 + ", "length"), QUESTION)
    assert (cut.text, cut.finish_reason) == ("<think>\n4 +", "length")
    newer = completion("8")
    newer["choices"][0]["message"]["reasoning"] = "sum"
    assert read_answer(newer, QUESTION).text == "<think>\nsum\n</think>\n8"


def test_tokens_that_an_endpoint_does_not_count_are_estimated():
    data = completion("8" * 10)
    del data["usage"]
    answer = read_answer(data, QUESTION)
    assert (answer.tokens, answer.prompt_tokens) == (3, 4)


def test_a_pause_ends_when_the_teacher_is_stopped():
    with ChatServer(echo, lambda number, body: (429, {"Retry-After": "900"}, "")) as server:
        config = TeacherConfig(url=server.url, model="r1", concurrency=2)
        with Teacher(config, SAMPLING, Account(config)) as teacher:
            answers = teacher.answers([[{"role": "user", "content": "x"}]] * 4, range(4))
            threading.Timer(0.3, teacher.stop).start()
            with pytest.raises(StageError, match="it was stopped"):
                next(answers)
