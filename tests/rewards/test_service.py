import asyncio
import json
import logging

import pytest
from fastapi.testclient import TestClient

from pipeline.records import Status
from rewards.judge import Judge
from rewards.reasons import Reason, verdict
from rewards.registry import Verifier
from rewards.scoring import ScoringError
from rewards.service.app import MAX_ITEMS, build_app
from rewards.service.backend import LocalBackend, Overloaded, Unavailable
from rewards.service.deploy import ServeBackend
from rewards.service.gate import Rules

MATH = {"id": "m", "kind": "math", "completion": r"<think>t</think>\boxed{\frac{1}{2}}", "reference": "0.5"}
CODE = {"id": "c", "kind": "code", "completion": "```python\ndef f(x):\n    return x + 1\n```", "entry_point": "f",
        "tests": [{"args": [1], "expected": 2}]}
KIND = {"id": "k", "kind": "principles", "completion": "Good morning!", "prompt": "Greet.",
        "principles": ["It is kind."]}
MATCH = {"id": "r", "kind": "match", "completion": "It pumps blood.", "prompt": "What does a heart do?",
         "reference": "It pumps blood through the body."}


def judge_that_sees_good(conversations, n, seed):
    """Three votes at most: good answers get 9, 8, 3, others 2; a match is what mentions blood twice."""
    outputs = []
    for (message,) in conversations:
        text = message["content"]
        if text.startswith("Match"):
            outputs.append(["same\nMatch: yes" if text.count("blood") == 2 else "other\nMatch: no"] * n)
        else:
            scores = (9, 8, 3) if "Good" in text else (2, 2, 2)
            outputs.append([f"ok\nScore: {score}" for score in scores[:n]])
    return outputs


@pytest.fixture(scope="module")
def judged():
    with Verifier(Judge(judge_that_sees_good)) as verifier:
        yield verifier


def client(backend, **rules):
    return TestClient(build_app(backend, Rules(**rules)), base_url="http://localhost", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def api(judged):
    return client(LocalBackend(judged))


def test_a_batch_of_all_kinds_comes_back_in_order(api):
    items = [KIND, MATH, CODE, MATCH, {**MATH, "completion": r"\boxed{2}"}, {**CODE, "tests": [{"args": [1]}]}]
    answer = api.post("/v1/score", json={"items": items, "n_votes": 3})
    results = answer.json()["results"]
    assert answer.status_code == 200 and [found["id"] for found in results] == ["k", "m", "c", "r", "m", "c"]
    assert [(found["status"], found["score"]) for found in results] == [
        ("correct", pytest.approx(20 / 30)), ("correct", 1), ("correct", 1), ("correct", 1), ("wrong", 0),
        ("infra_error", None)]
    assert results[0]["votes"] == [0.9, 0.8, 0.3] and results[0]["agreement"] == pytest.approx(2 / 3)
    assert results[0]["critique"] == "ok\nScore: 9" and results[1]["votes"] is None


@pytest.mark.parametrize(("body", "where", "what"), [
    ({"items": [{**MATH, "reference": None}]}, ["body", "items", 0], "an item of kind math needs reference"),
    ({"items": [{**MATH, "kind": "poetry"}]}, ["body", "items", 0, "kind"], "Input should be 'math'"),
    ({"items": [{**MATH, "refrence": "1"}]}, ["body", "items", 0, "refrence"], "Extra inputs"),
    ({"items": [MATH] * (MAX_ITEMS + 1)}, ["body", "items"], f"at most {MAX_ITEMS}"),
    ({"items": [KIND], "n_votes": 1000}, ["body", "n_votes"], "less than or equal to 64"),
    ({"items": [KIND], "n_votes": True}, ["body", "n_votes"], "valid integer"),
])
def test_what_is_wrong_with_a_request_is_named_by_place(api, body, where, what):
    answer = api.post("/v1/score", json=body)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == where and what in answer.json()["detail"][0]["msg"]
    assert len(answer.text) < 1000, "the input is not sent back"


def test_a_part_that_was_not_started_is_named_with_its_option(verifier):
    answer = client(LocalBackend(verifier)).post("/v1/score", json={"items": [MATCH]})
    assert answer.status_code == 422 and "posttrain serve --judge MODEL_DIR" in answer.json()["detail"]


def test_a_token_is_asked_for_everywhere_but_at_health_and_documentation(judged):
    api = client(LocalBackend(judged), token="s3cret-s3cret-s3cret")
    refused = [api.post("/v1/score", json={"items": [MATH]}, headers=headers) for headers in (
        {}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret-s3cret-s3cret"}, {"Authorization": "Bearer "},
        {"Authorization": b"Bearer \xff"})]
    assert [answer.status_code for answer in refused] == [401] * 5
    assert api.get("/metrics").status_code == 401 and api.get("/healthz").status_code == 200
    headers = {"Authorization": "Bearer s3cret-s3cret-s3cret", "Host": "rewards.example"}
    assert api.post("/v1/score", json={"items": [MATH]}, headers=headers).json()["results"][0]["score"] == 1


def test_without_a_token_no_other_name_than_localhost_is_answered(api):
    for host, code in (("evil.example", 403), ("127.0.0.1.evil.example", 403), ("127.0.0.1:8000", 200),
                       ("[::1]:80", 200)):
        assert api.post("/v1/score", json={"items": []}, headers={"Host": host}).status_code == code, host


@pytest.mark.parametrize(("body", "headers", "code"), [
    (b"[" * 300 + b"]" * 300, {}, 400), (b'{"items": [', {}, 400), (b'{"items": NaN}', {}, 400), (b"\xff\xfe", {}, 400),
    (b"\x80\x04]q\x00.", {"Content-Type": "application/octet-stream"}, 415),
    (b"items=1", {"Content-Type": "text/plain"}, 415), (b"\x1f\x8b\x08", {"Content-Encoding": "gzip"}, 415),
    (b" " * 5000, {}, 413),
])
def test_bodies_that_are_no_small_shallow_json_are_refused_before_they_are_read(judged, body, headers, code):
    api = client(LocalBackend(judged), max_body_bytes=4000)
    answer = api.post("/v1/score", content=body, headers={"Content-Type": "application/json", **headers})
    assert answer.status_code == code and answer.json()["detail"]


def test_a_body_longer_than_it_says_is_cut_off_while_it_arrives(judged):
    sent = []

    def endless():
        for _ in range(1000):
            sent.append(1)
            yield b" " * 1000

    async def scenario():
        """The gate alone, as a test client would gather the whole body first."""
        parts = iter(endless())

        async def receive():
            return {"type": "http.request", "body": next(parts), "more_body": True}

        answers = []

        async def send(message):
            answers.append(message)

        app = build_app(LocalBackend(judged), Rules(max_body_bytes=4000))
        await app({"type": "http", "method": "POST", "path": "/v1/score", "raw_path": b"/v1/score", "query_string": b"",
                   "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "scheme": "http",
                   "http_version": "1.1", "server": ("localhost", 80), "client": ("localhost", 1), "root_path": ""},
                  receive, send)
        return answers[0]["status"]

    assert asyncio.run(scenario()) == 413 and len(sent) == 5


def test_every_request_has_an_id_in_its_answer_and_in_the_log(api, caplog):
    with caplog.at_level(logging.INFO, "posttrain.serve"):
        given = api.post("/v1/score", json={"items": [MATH]}, headers={"X-Request-ID": "run-7.step_3"})
        forged = api.post("/v1/score", json={"items": []}, headers={"X-Request-ID": 'x" , "status": 200'})
    lines = [json.loads(record.message) for record in caplog.records]
    assert given.headers["x-request-id"] == "run-7.step_3" == lines[0]["request_id"]
    assert lines[0] | {"ms": 0} == {"request_id": "run-7.step_3", "method": "POST", "path": "/v1/score", "status": 200,
                                    "items": 1, "unscored": 0, "ms": 0}
    assert forged.headers["x-request-id"] == lines[1]["request_id"] and len(lines[1]["request_id"]) == 16


def test_metrics_count_items_by_what_was_found(judged):
    api = client(LocalBackend(judged))
    api.post("/v1/score", json={"items": [MATH, MATH, {**MATH, "completion": "?"}]})
    api.get("/made/up/path")
    text = api.get("/metrics").text
    assert 'posttrain_items_total{kind="math",reason="equal_exact",status="correct"} 2.0' in text
    assert 'posttrain_items_total{kind="math",reason="no_box",status="malformed"} 1.0' in text
    assert 'posttrain_request_seconds_count{code="200",path="/v1/score"} 1.0' in text
    assert "made/up" not in text, "anyone could fill the memory with such names"


def test_the_documentation_lists_every_contract(api):
    paths = api.get("/openapi.json").json()["paths"]
    assert {"/v1/score", "/healthz", "/metrics", "/get_reward", "/remote_rm", "/classify", "/run_code", "/test_program",
            "/test_program_stdio", "/verify", "/seed_session"} == set(paths)
    page = api.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "openapi.json" in page.text
    assert "http://" not in page.text and "https://" not in page.text, "it is read where there is no internet"


class Failing:
    """A backend in trouble of one kind."""

    groups = frozenset({"math", "code", "judge"})

    def __init__(self, error):
        self.error = error

    async def score(self, items, n_votes=None):
        raise self.error

    async def run(self, jobs, limits):
        raise self.error


def test_trouble_has_the_status_upon_which_each_caller_tries_again():
    full, gone = client(Failing(Overloaded("full"))), client(Failing(Unavailable("gone")))
    for api, code in ((full, 429), (gone, 503)):
        answer = api.post("/v1/score", json={"items": [MATH]})
        assert answer.status_code == code and int(answer.headers["retry-after"]) > 0
        # verl's sandbox client repeats a request upon 504 alone, and scores any other trouble as a failed program
        assert api.post("/run_code", json={"code": "1", "language": "python"}).status_code == 504


def test_too_many_requests_under_way_are_told_to_come_again(judged):
    class Slow(LocalBackend):
        async def score(self, items, n_votes=None):
            await asyncio.sleep(0.5)
            return await super().score(items, n_votes)

    import httpx

    app = build_app(Slow(judged), Rules(max_requests=3))

    async def burst():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return await asyncio.gather(*(http.post("/v1/score", json={"items": [MATH]}) for _ in range(8)))

    answers = asyncio.run(burst())
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 3 + [429] * 5
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)


def test_an_unscored_answer_is_no_number_to_callers_that_know_no_null():
    class Untold:
        groups = frozenset({"math"})

        async def score(self, items, n_votes=None):
            from rewards.scoring import Item, _result

            assert isinstance(items[0], Item)
            return [_result(item, verdict(Status.INFRA_ERROR, Reason.VERIFIER_FAILED, "math", 0.0)) for item in items]

        async def run(self, jobs, limits):
            raise ScoringError("nothing runs here")

    api = client(Untold())
    assert api.post("/get_reward", json={"query": ["q"], "prompts": ["q"], "labels": ["1"]}).status_code == 503
    assert api.post("/remote_rm", json={"prompt": "p", "response": "r", "label": "1"}).status_code == 503
    masked = api.post("/verify", json={"responses_create_params": {}, "response": {}, "expected_answer": "1"}).json()
    assert (masked["reward"], masked["mask_sample"], masked["failure_kind"]) == (0.0, True, "posttrain:infra_error")
    assert api.post("/v1/score", json={"items": [MATH]}).json()["results"][0]["score"] is None


def test_requests_are_cut_for_the_parts_and_put_together_in_order():
    class Part:
        def __init__(self):
            self.sizes = []

        class Method:
            def __init__(self, part):
                self.part = part

            async def remote(self, items, n_votes):
                self.part.sizes.append(len(items))
                return [{"id": item["id"], "score": 1.0} for item in items]

        @property
        def score(self):
            return self.Method(self)

    from rewards.scoring import Item

    parts = {"math": Part(), "code": Part()}
    items = [Item.model_validate({**(MATH if number % 3 else CODE), "id": str(number)}) for number in range(300)]
    results = asyncio.run(ServeBackend(parts).score(items))
    assert [found.id for found in results] == [str(number) for number in range(300)]
    assert parts["math"].sizes == [128, 72] and parts["code"].sizes == [32, 32, 32, 4]
