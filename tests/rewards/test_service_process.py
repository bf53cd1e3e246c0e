"""`posttrain serve` as a user starts it: a process of its own, Ray Serve, HTTP, and parts of it killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from posttrain_command import left_behind, posttrain, start, wait_until_gone

from rewards.client import RewardClient, RewardServiceError, ServiceUnreachable, posttrain_reward

ROOT = Path(__file__).parents[2]
PORT = 8271
URL = f"http://127.0.0.1:{PORT}"
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    (folder / "token").write_text(TOKEN)
    process = start("serve", "--math", "--code", "--port", str(PORT), "--token-file", "token", folder=folder,
                    output=folder / "output")
    deadline = time.monotonic() + 120
    while "/v1/score" not in (folder / "output").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "output").read_text()
        time.sleep(0.5)
    children = psutil.Process(process.pid).children(recursive=True)
    yield folder
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, (folder / "output").read_text()
    wait_until_gone(children)


@pytest.fixture(scope="module")
def client(service):
    with RewardClient(URL, TOKEN, patience=60) as client:
        yield client


MATH = {"id": "m", "kind": "math", "completion": r"\boxed{\sqrt{8}}", "reference": r"2\sqrt{2}"}
CODE = {"id": "c", "kind": "code", "completion": "```python\ndef f(x):\n    return x + 1\n```", "entry_point": "f",
        "tests": [{"args": [1], "expected": 2}]}


def test_the_client_sends_long_lists_in_batches_and_keeps_their_order(client):
    items = [{**(CODE if number % 100 == 0 else MATH), "id": str(number)} for number in range(600)]
    results = client.score(items)
    assert [result.id for result in results] == [str(number) for number in range(600)]
    assert {result.status for result in results} == {"correct"}


def test_a_wrong_token_is_an_error_and_not_a_score(service):
    with RewardClient(URL, "another", patience=5) as client, pytest.raises(RewardServiceError, match="401"):
        client.score([MATH])


def test_trl_trains_with_the_service_as_its_reward_function(service):
    reward = posttrain_reward(URL, "math", TOKEN, reference="solution")
    chat = [[{"role": "user", "content": "Root of 8?"}]] * 3
    completions = [[{"role": "assistant", "content": rf"\boxed{{{box}}}"}] for box in (r"\sqrt{8}", "3", r"2\sqrt{2}")]
    assert reward(prompts=chat, completions=completions, solution=[r"2\sqrt{2}"] * 3, completion_ids=[[1]] * 3,
                  trainer_state=None, log_metric=print) == [1.0, 0.0, 1.0]
    assert reward(prompts=["?"], completions=[CODE["completion"]], solution=[None], kind=["code"], entry_point=["f"],
                  tests=[CODE["tests"]]) == [1.0]
    assert reward.__name__ == "posttrain_math"


def test_a_service_that_is_not_there_gives_none_and_no_zero():
    gone = posttrain_reward("http://127.0.0.1:9", patience=1.0)
    assert gone(prompts=["?"] * 2, completions=[r"\boxed{4}"] * 2, reference=["4", "5"]) == [None, None]
    with RewardClient("http://127.0.0.1:9", patience=1) as client, pytest.raises(ServiceUnreachable, match="1 s"):
        client.score([MATH])


def test_the_log_has_a_line_for_each_request(client, service):
    client.score([MATH, CODE])
    last = json.loads((service / "posttrain-serve.log").read_text().splitlines()[-1].partition("{")[2].join(["{", ""]))
    assert (last["path"], last["status"], last["items"]) == ("/v1/score", 200, 2) and last["request_id"]


def test_under_load_with_parts_killed_nothing_is_lost_and_no_right_answer_gets_a_zero(tmp_path):
    words = ["benchmarks/reward_service.py", "--small", "--json", str(tmp_path / "f.json")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = {row["what"]: row["figure"] for row in json.loads((tmp_path / "f.json").read_text())}
    killed = [name for name in figures if "killed" in name]
    assert len(killed) == 4 and all(figures[name] for name in killed)
    for name in ("math alone: false scores", "math alone: lost or untold", "mixed load: false scores",
                 "mixed load: lost"):
        assert figures[name] == 0, (name, done.stdout)
    assert figures["mixed load: requests"] > 20


@pytest.mark.parametrize(("words", "remedy"), [
    ((), "give --math, --code, --judge MODEL_DIR or --recipe"), (("--math", "--host", "0.0.0.0"), "give --token-file"),
    (("--math", "--token-file", "nowhere"), "nowhere"), (("--judge", "."), "no config.json"),
    (("--recipe", "tiny"), "has judged domains: give --judge"),
    (("--math", "--host", "203.0.113.7", "--token-file", "t"), "cannot listen"),
])
def test_a_service_that_cannot_be_started_says_why(tmp_path, words, remedy):
    (tmp_path / "t").write_text("t" * 32)
    done = posttrain("serve", *words, folder=tmp_path)
    assert done.code == 2 and remedy in done.both and "Traceback" not in done.both
    assert not left_behind(tmp_path)
