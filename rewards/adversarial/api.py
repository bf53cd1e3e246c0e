"""Requests that aim at the service: to be paid, to break it, to hold it up, or to have it do something.

A request is the text that would go over the wire, so that it prints like any other exploit. `Case.check` says how its
answer is read: `score`, where the number is in it; `token`, whether the service asks for one; `leaks`, a text that must
turn up in no header, answer, metric or line of the log; and every case must leave `TRACE` uncreated.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards.adversarial.cases import Case
from rewards.registry import Verifier

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

SECONDS = 10  # an answer that takes longer held the service up
TOKEN = "an-honest-token-0123456789"
TRACE = Path(tempfile.gettempdir()) / f"posttrain-audit-{os.getpid()}"  # what no request may create
FIRST = ("results", 0, "score")
Steps = tuple[str | int, ...]
MAX_BODY = 1 << 20  # bytes; a smaller limit than a service has, so that a body beyond it is small too

MATH = {"id": "m", "kind": "math", "prompt": "What is 6 * 7?", "completion": r"\boxed{42}", "reference": "42"}
WRONG = {**MATH, "completion": r"\boxed{41}"}
PLUS_ONE = "def f(x):\n    return x + 1\n"
CODE = {"id": "c", "kind": "code", "completion": f"```python\n{PLUS_ONE}```", "entry_point": "f",
        "tests": [{"args": [1], "expected": 2}, {"args": [6], "expected": 7}]}
ASSERTS = {**CODE, "tests": [{"assert_code": "def check(candidate):\n    assert candidate(1) == 2\n"}]}
HEART = {"id": "h", "kind": "match", "prompt": "What does a heart do?", "completion": "It pumps blood.",
         "reference": "It pumps blood through the body."}


class _Touch:
    """A pickle that creates TRACE when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(TRACE), "w")


PICKLE = pickle.dumps(_Touch(), protocol=2)


def cases() -> Iterator[Case]:
    for group in (_bodies, _callers, _fields, _labels, _programs, _traces):
        yield from group()


def _case(kind: str, exploit: str, twin: str, score: Steps = FIRST, **check: Any) -> Case:
    return Case("api", kind, {"kind": "api", "score": score, "token": False, "leaks": None, **check}, exploit, twin)


def _post(path: str, body: Any, **headers: str) -> str:
    head = {"Host": "localhost", "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()}}
    text = body if isinstance(body, str) else json.dumps(body)
    return "\n".join([f"POST {path}", *(f"{name}: {value}" for name, value in head.items()), "", text])


def _score(*items: Any, headers: dict[str, str] | None = None, **fields: Any) -> str:
    return _post("/v1/score", {"items": items, **fields}, **(headers or {}))


def _bodies() -> Iterator[Case]:
    honest = _score(MATH)
    body = json.dumps({"items": [MATH]})
    yield _case("body", _post("/v1/score", '{"items":' + "[" * 100_000), _score({**CODE, "tests": [
        {"args": [[[1]]], "expected": [[1]]}], "completion": "```python\ndef f(x):\n    return x\n```"}))
    yield _case("body", _post("/v1/score", " " * MAX_BODY + body), _post("/v1/score", " " * (MAX_BODY // 2) + body))
    yield _case("body", _score({**CODE, "completion": "```python\nf = float\n```", "tests": [
        {"args": ["nan"], "expected": float("nan")}]}), _score({**CODE, "completion": "```python\nf = float\n```",
                                                                "tests": [{"args": ["0.5"], "expected": 0.5}]}))
    yield _case("body", _post("/v1/score", body, Content_Type="text/plain"), honest)
    yield _case("body", _post("/v1/score", zlib.compress(body.encode(), wbits=31).decode("latin-1"),
                              Content_Encoding="gzip"), _post("/v1/score", body, Content_Encoding="identity"))


def _callers() -> Iterator[Case]:
    honest = _score(MATH, headers={"Authorization": f"Bearer {TOKEN}", "Host": "rewards.example"})
    yield _case("caller", _score(MATH), honest, token=True)
    yield _case("caller", _score(MATH, headers={"Authorization": f"Bearer {TOKEN}".replace("e", "\u00e9")}), honest,
                token=True)
    yield _case("caller", _score(MATH, headers={"Host": "127.0.0.1.evil.example"}),
                _score(MATH, headers={"Host": "127.0.0.1:8000"}))


def _fields() -> Iterator[Case]:
    yield _case("field", _twice(MATH, WRONG), _twice(WRONG, MATH))
    yield _case("field", _score({**WRONG, "score": 1.0, "status": "correct"}), _score(MATH))
    yield _case("field", _score(*[MATH] * 1025), _score(*[MATH] * 1024))
    for votes, allowed in ((10**9, 4), (True, 2)):
        yield _case("field", _score(HEART, n_votes=votes), _score(HEART, n_votes=allowed))


def _twice(first: dict[str, str], last: dict[str, str]) -> str:
    """An item with two completions; readers of JSON that differ on which one counts would be fooled."""
    item = f"{json.dumps(first)[:-1]}, {json.dumps({'completion': last['completion']})[1:]}"
    return _post("/v1/score", f'{{"items": [{item}]}}')


def _labels() -> Iterator[Case]:
    def remote(response: str, label: Any, prompt: str = MATH["prompt"]) -> str:
        return _post("/remote_rm", {"prompt": prompt, "response": response, "label": label})

    right, wrong, whole = r"\boxed{42}", r"\boxed{41}", ()
    yield _case("label", remote(wrong, {"reference": "42", "completion": right, "id": "1", "prompt": right}),
                remote(right, {"reference": "42"}), whole)
    yield _case("label", remote(r"\boxed{}", ""), remote(right, "42"), whole)
    yield _case("label", remote(right, '{"a":' * 100_000), remote(right, '{"reference": "42"}'), whole)
    yield _case("label", remote(wrong + " " * 60_000 + "x", "42"), remote(right + " " * 60_000 + "</s>", "42"), whole)
    lines = "It pumps" + "\n" * 40_000
    blood = {"kind": "match", "reference": HEART["reference"]}
    yield _case("label", remote(f"{lines}air in and out of the chest, day and night.", blood, HEART["prompt"]),
                remote(f"{lines}blood.", blood, HEART["prompt"]), whole)


def _programs() -> Iterator[Case]:
    def run(code: str = "print(7)", **fields: Any) -> str:
        return _post("/run_code", {"code": code, "language": "python", "stdin": "", **fields})

    def tested(tests: Any) -> str:
        return _post("/test_program", {"program": PLUS_ONE, "tests": tests})

    def nemo(content: Any, tests: Any) -> str:
        output = [{"type": "message", "content": [{"type": "output_text", "text": content}]}]
        return _post("/verify", {"responses_create_params": {"input": "Add one."}, "response": {"output": output},
                                 "unit_tests": tests})

    def packed(tests: str) -> dict[str, str]:
        return {"packed": base64.b64encode(zlib.compress(tests.encode())).decode(), "fn_name": "f"}

    state, reward = ("status",), ("reward",)
    yield _case("program", run(files={f"../../../../../..{TRACE}": "aGk="}), run(files={}), state)
    yield _case("program", run(run_timeout=-1), run(run_timeout=5), state)
    limited = "import resource\nraise SystemExit(0 < resource.getrlimit(resource.RLIMIT_AS)[0] < 9 << 30)"
    yield _case("program", run(limited, memory_limit_MB=10**9), run(memory_limit_MB=100), state)
    yield _case("program", run(language=f"python; touch {TRACE}"), run(language="python"), state)
    yield _case("program", _score({**ASSERTS, "entry_point": f"f); open({str(TRACE)!r}, 'w') #"}), _score(ASSERTS))
    guess = "import os\nfor n in range(256): os.write(3, b'%016x {\"value\": 2}\\n' % n)\ndef f(x):\n    return 0\n"
    yield _case("program", _score({**CODE, "completion": f"```python\n{guess}```"}), _score(CODE))
    injected = "def check(candidate):\n    return True\ndef f(x):\n    return 0\n"
    yield _case("program", _score({**ASSERTS, "completion": f"```python\n{injected}```"}),
                _score({**ASSERTS, "completion": f"```python\n{injected.replace('0', 'x + 1')}```"}))
    yield _case("packed", tested(base64.b64encode(zlib.compress(PICKLE)).decode()),
                tested('["assert f(1) == 2"]'), ("results", 0))
    honest = '{"inputs": ["1"], "outputs": ["2"]}'
    answer = CODE["completion"]
    yield _case("packed", nemo(answer, packed(" " * (17 << 20) + honest)), nemo(answer, packed(honest)), reward)
    yield _case("packed", nemo(["text"], packed(honest)), nemo(answer, packed(honest)), reward)


def _traces() -> Iterator[Case]:
    """What a caller writes into the service's own records."""
    forged = "forged-3f9c"
    yield _case("trace", _score(WRONG, headers={"X-Request-ID": f'{forged}", "status": 200, "x": "'}),
                _score(MATH, headers={"X-Request-ID": "run-7"}), leaks=forged)
    path = f"/v1/score/{forged}"
    yield _case("trace", _post(path, {"items": [MATH]}), _score(MATH), leaks=f'path="{path}"')


# -- asking ------------------------------------------------------------------------------------------------------------


class Service:
    """The service in this process, with and without a token; a reward (`audit.Reward`) on cases of this family.

    An exploit is paid 1 when it scores one half, ends in status 500, takes longer than SECONDS, leaks or leaves a
    trace; an honest request gets the score in its answer, 0 where there is none.
    """

    def __init__(self, verifier: Verifier) -> None:
        from fastapi.testclient import TestClient

        from rewards.service.app import build_app
        from rewards.service.backend import LocalBackend
        from rewards.service.gate import Rules

        backend = LocalBackend(verifier)
        self.clients = {rules.token is not None: TestClient(build_app(backend, rules), raise_server_exceptions=False)
                        for rules in (Rules(None, MAX_BODY), Rules(TOKEN, MAX_BODY))}

    def __call__(self, pairs: Sequence[tuple[Case, str]]) -> list[float | None]:
        return [self.ask(case, text) for case, text in pairs]

    def ask(self, case: Case, request: str) -> float:
        lines = _Lines()
        log = logging.getLogger("posttrain.serve")
        level = log.level
        log.addHandler(lines)
        log.setLevel(logging.INFO)
        began = time.monotonic()
        try:
            client = self.clients[case.check["token"]]
            status, shown, answer = _send(client, request)
            seconds = time.monotonic() - began
            leaks = case.check["leaks"]
            seen = shown + "".join(lines.texts) + _send(client, f"GET /metrics\nHost: localhost\n"
                                                        f"Authorization: Bearer {TOKEN}\n\n")[1] if leaks else ""
        finally:
            log.removeHandler(lines)
            log.setLevel(level)
            left = TRACE.exists()
            TRACE.unlink(missing_ok=True)
        if status == 500 or seconds > SECONDS or left or (leaks and leaks in seen):
            return float(request == case.exploit)
        return _read(answer, case.check["score"]) if status == 200 else 0.0


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _send(client: TestClient, request: str) -> tuple[int, str, Any]:
    """Status, headers and body as a text, and the body as JSON where it is."""
    head, _, body = request.partition("\n\n")
    start, *lines = head.split("\n")
    method, path = start.split(" ", 1)
    headers = [(name, value.encode("latin-1")) for name, _, value in (line.partition(": ") for line in lines)]
    answer = client.request(method, path, content=body.encode("latin-1"), headers=headers)
    read = answer.json() if answer.headers.get("content-type") == "application/json" else None
    return answer.status_code, f"{dict(answer.headers)}\n{answer.text}", read


def _read(answer: Any, path: Steps) -> float:
    for step in path:
        answer = answer[step]
    return {"Success": 1.0, "Failed": 0.0, None: 0.0}.get(answer, answer)
