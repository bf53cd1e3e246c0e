"""Requests as other trainers send them, and their answers read as those trainers read them."""

import base64
import json
import pickle
import time
import zlib

import pytest
from fastapi.testclient import TestClient

from rewards.judge import Judge
from rewards.registry import Verifier
from rewards.service.answers import response_of
from rewards.service.app import build_app
from rewards.service.backend import LocalBackend

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def api():
    def generate(conversations, n, seed):
        return [["fine\nScore: 8" if "Paris" in message["content"] else "no\nScore: 1"] * n
                for (message,) in conversations]

    with Verifier(Judge(generate)) as verifier:
        yield TestClient(build_app(LocalBackend(verifier)), base_url="http://localhost")


# -- OpenRLHF ----------------------------------------------------------------------------------------------------------

CHAT = "<|im_start|>user\nWhat is 6*7?<|im_end|>\n<|im_start|>assistant\n"


def openrlhf(api, responses, labels, path="/get_reward"):
    """aiohttp's json=, then rewards, scores and extra_logs out of the object."""
    body = {"query": [CHAT + response for response in responses], "prompts": [CHAT] * len(responses), "labels": labels}
    answer = api.post(path, content=json.dumps(body), headers=JSON)
    assert answer.headers["content-type"] == "application/json"
    return answer


def test_openrlhf_reads_rewards_of_a_query_that_holds_prompt_and_response(api):
    found = openrlhf(api, [r"<think>t</think>\boxed{42}<|im_end|>"], ["42"]).json()
    assert found["rewards"] == [1.0] == found["scores"]
    assert all(isinstance(value, float) for values in found["extra_logs"].values() for value in values)
    several = openrlhf(api, [r"\boxed{42}", r"\boxed{41}", "I do not know"], ["42", 42, {"reference": "42"}]).json()
    assert several["rewards"] == [1.0, 0.0, 0.0] and several["extra_logs"] == {"malformed": [0.0, 0.0, 1.0]}


def test_openrlhf_sends_empty_lists_to_all_urls_but_one(api):
    assert openrlhf(api, [], []).json() == {"rewards": [], "scores": [], "extra_logs": {}}


def test_openrlhf_labels_may_bring_a_check_of_their_own(api):
    program = "```python\ndef f(x):\n    return x + 1\n```"
    label = {"kind": "code", "entry_point": "f", "tests": [{"args": [1], "expected": 2}]}
    assert openrlhf(api, [program] * 2, [label, json.dumps(label)]).json()["rewards"] == [1.0, 1.0]
    assert openrlhf(api, ["It pumps.", "ann"], ["Ann"] * 2, "/get_reward?kind=exact").json()["rewards"] == [0.0, 0.0]


def test_openrlhf_without_labels_is_told_the_option(api):
    answer = openrlhf(api, [r"\boxed{42}"], [""])
    assert answer.status_code == 422 and "label is empty" in answer.json()["detail"]


@pytest.mark.parametrize("label", ['{"a":' * 10_000, '{"reference": NaN}', '{"reference": "\\ud800"}',
                                   '{"\\ud800": 1}', '{"kind": "code", "tests": [{"stdin": "\\ud800"}]}'])
def test_a_label_that_begins_like_an_object_and_is_none_is_refused(api, label):
    answer = openrlhf(api, [r"\boxed{1}"], [label])
    assert answer.status_code == 422 and "JSON object" in answer.json()["detail"]
    assert openrlhf(api, [r"\boxed{\{1, 2\}}"], ["{1, 2}"]).json()["rewards"] == [1.0]


def test_a_label_too_large_for_a_number_is_refused(api):
    body = json.dumps({"prompt": "p", "response": r"\boxed{\infty}", "label": 7}).replace("7", "1e999")
    assert api.post("/remote_rm", content=body, headers=JSON).status_code == 422


@pytest.mark.parametrize(("transcript", "response"), [
    ("hi<|im_end|>\n", "hi"), ("hi \n</s> <eos>", "hi"), ("hi \n", "hi \n"), ("</s>", ""), ("a</s>b", "a</s>b"),
    ("x" + " " * 300_000 + "y", "x" + " " * 300_000 + "y"), ("hi" + "</s>\n" * 100_000, "hi"),
])
def test_end_tokens_are_taken_off_in_linear_time(transcript, response):
    began = time.process_time()
    assert response_of(transcript) == response
    assert time.process_time() - began < 2


def test_openrlhf_prompts_cut_on_the_left_do_not_hide_the_response(api):
    body = {"query": [CHAT[15:] + r"\boxed{42}</s>"], "prompts": [CHAT], "labels": ["42"]}
    assert api.post("/get_reward", json=body).json()["rewards"] == [1.0]


# -- slime -------------------------------------------------------------------------------------------------------------


def test_slime_takes_the_whole_body_as_the_reward(api):
    body = {"prompt": CHAT, "response": r"The answer is \boxed{42}<|im_end|>", "label": "42"}
    assert api.post("/remote_rm", json=body).json() == 1.0
    chat = {**body, "prompt": [{"role": "user", "content": "What is 6*7?"}], "response": r"\boxed{40}"}
    assert api.post("/remote_rm", json=chat).json() == 0.0
    keyed = api.post("/remote_rm?key=score", json=body).json()
    assert keyed == {"score": 1.0, "status": "correct", "reason": "equal_exact"}
    assert api.post("/remote_rm", json={**body, "label": None}).status_code == 422


# -- verl --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [{"use_activation": False}, {"activation": False}])
def test_verl_reads_the_last_probability_of_the_last_entry(api, activation):
    def ask(response):
        chat = f"<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
        answer = api.post("/classify", json={"model": "judge", "input": chat, **activation})
        return answer.json()["data"][-1]["probs"][-1]

    assert ask("It is Paris.") == pytest.approx(0.8) and ask("It is Rome.") == pytest.approx(0.1)
    assert ask("Solution:") == 0.0


def sandbox_fusion(api, code, stdin="", language="python", **more):
    """requests' data=json.dumps(...), as verl's client orders the keys; its verdict: True, False or a negative code."""
    body = {"compile_timeout": 10, "run_timeout": 5, "code": code, "stdin": stdin, "memory_limit_MB": 1024,
            "language": language, "files": {}, "fetch_files": [], **more}
    answer = api.post("/run_code", content=json.dumps(body), headers=JSON | {"Accept": "application/json"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if found["status"] == "Success":
        assert found["run_result"]["status"] == "Finished"
        return found["run_result"]["stdout"].rstrip("\n")
    compiled, ran = found["compile_result"], found["run_result"]
    if compiled and compiled["return_code"] != 0:
        return -4
    return -3 if ran["status"] == "TimeLimitExceeded" else -2


def test_verl_runs_programs_in_its_sandbox_and_tells_ends_apart(api):
    assert sandbox_fusion(api, "n=int(input())\nprint(n*n)\n\n\n", "5\n") == "25"
    assert sandbox_fusion(api, "print(open('/etc/shadow').read())") == -2
    assert sandbox_fusion(api, "while True: pass", run_timeout=1) == -3
    assert sandbox_fusion(api, "import time; time.sleep(60)", run_timeout=1) == -3
    assert sandbox_fusion(api, "raise SystemExit(3)") == -2
    assert sandbox_fusion(api, "print('x' * 2 * 10**6)") == -2, "more output than allowed"


@pytest.mark.parametrize(("language", "tool", "right", "broken"), [
    ("cpp", "g++", '#include <iostream>\nint main() { int n; std::cin >> n; std::cout << n * n; }',
     "int main() { return }"),
    ("nodejs", "node", "console.log(Number(require('fs').readFileSync(0)) ** 2)", None),
    ("java", "javac", "import java.util.*; public class Main { public static void main(String[] a) { "
     "int n = new Scanner(System.in).nextInt(); System.out.println(n * n); } }", "class Main {"),
])
def test_verl_runs_compiled_languages_too(api, language, tool, right, broken):
    import shutil

    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    assert sandbox_fusion(api, right, "5\n", language) == "25"
    if broken:
        assert sandbox_fusion(api, broken, "5\n", language) == -4


def test_files_for_a_program_are_refused(api):
    answer = api.post("/run_code", json={"code": "1", "language": "python", "files": {"../x": "aGk="}})
    assert answer.status_code == 422


# -- open-instruct -----------------------------------------------------------------------------------------------------


def open_instruct(api, program, tests, path="/test_program", seconds=1.0):
    answer = api.post(path, json={"program": program, "tests": tests, "max_execution_time": seconds})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert len(found["results"]) == len(found["runtimes"])
    assert all((seconds == -1.0) == (passed == 0) for passed, seconds in zip(*found.values(), strict=True))
    return found["results"]


def test_open_instruct_gets_a_result_for_each_assert(api):
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 1", "assert sorted([add(2, 1)]) == [3]"]
    assert open_instruct(api, "def add(a, b): return a + b", tests) == [1, 0, 1]
    assert open_instruct(api, "def add(a, b): return a + b", json.dumps(tests)) == [1, 0, 1]
    assert open_instruct(api, "def add(a, b): return", ["assert add(1, 2) == 3"]) == [0]
    assert open_instruct(api, "not python", tests) == [0, 0, 0]
    assert open_instruct(api, "def other(): pass", tests) == [0, 0, 0]
    assert open_instruct(api, "def add(a, b):\n    while True: pass", tests[:1]) == [0]
    assert open_instruct(api, "def add(a, b): return a + b", []) == []


@pytest.mark.parametrize("program", [
    "import os\ndef add(a, b): os._exit(0)", "class A:\n    __eq__ = lambda *_: True\ndef add(a, b): return A()",
    "import builtins\nbuiltins.AssertionError = Exception\ndef add(a, b): return 0",
])
def test_open_instruct_pays_no_program_that_aims_at_the_asserts(api, program):
    assert open_instruct(api, program, ["assert add(1, 2) == 3"]) == [0]


def test_open_instruct_programs_of_stdin_and_stdout(api):
    tests = [{"input": "1\n", "output": "2\n"}, {"input": "100\n", "output": "102\n"}]
    assert open_instruct(api, "print(int(input())+1)", tests, "/test_program_stdio") == [1, 0]


def test_a_pickle_is_never_read(api, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "read"), "w"))

    packed = base64.b64encode(zlib.compress(pickle.dumps(Payload()))).decode()
    answer = api.post("/test_program", json={"program": "def f(): pass", "tests": packed})
    assert answer.status_code == 422 and "reading one runs code" in answer.json()["detail"]
    assert not (tmp_path / "read").exists()


# -- NeMo Gym ----------------------------------------------------------------------------------------------------------


def nemo_gym(api, text, prefix="", **row):
    """The run row with the model's response; the reply must hold both again, and a number."""
    question = {"role": "user", "content": "6*7?", "type": "message"}
    request = {"responses_create_params": {"input": [question], "tools": []},
               "response": {"id": "resp", "created_at": 0.0, "object": "response", "output": [
                   {"id": "rs", "type": "reasoning", "summary": [{"type": "summary_text", "text": r"\boxed{1}"}]},
                   {"id": "msg", "type": "message", "role": "assistant", "status": "completed",
                    "content": [{"type": "output_text", "annotations": [], "text": text, "logprobs": None}]}]},
               "agent_ref": {"name": "simple_agent"}, "_ng_rollout_index": 0, **row}
    assert api.post(f"{prefix}/seed_session", json=row).status_code == 200
    answer = api.post(f"{prefix}/verify", json=request)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert {key: found[key] for key in request} == request
    assert found["mask_sample"] is False
    return found["reward"]


def test_nemo_gym_gets_its_row_back_with_a_reward(api):
    assert nemo_gym(api, r"It is \boxed{42}.", expected_answer="42", question="6*7?") == 1.0
    assert nemo_gym(api, r"It is \boxed{43}.", "/ng-rollout/0-3", expected_answer="42") == 0.0


def test_nemo_gym_unit_tests_run(api):
    reads = {"inputs": ["2 3\n", "1 1\n"], "outputs": ["5\n", "2\n"], "fn_name": None}
    program = "```python\nprint(sum(map(int, input().split())))\n```"
    assert nemo_gym(api, program, verifier_metadata={"unit_tests": reads}) == 1.0
    calls = {"inputs": ["2\n3", "1\n1"], "outputs": ["5", "3"], "fn_name": "add"}
    added = "```python\ndef add(a, b):\n    return a + b\n```"
    assert nemo_gym(api, added, verifier_metadata={"unit_tests": calls}) == 0.0
    packed = base64.b64encode(zlib.compress(json.dumps(reads).encode())).decode()
    assert nemo_gym(api, program, unit_tests={"packed": packed, "fn_name": None}) == 1.0


@pytest.mark.parametrize("output", [5, {"type": "message"}, ["text"], [{"type": "message", "content": "text"}], [
    {"type": "message", "content": [{"type": "output_text", "text": None}]}]])
def test_a_response_of_another_shape_is_refused_by_name(api, output):
    answer = api.post("/verify", json={"responses_create_params": {}, "response": {"output": output},
                                       "expected_answer": "1"})
    assert answer.status_code == 422 and "response.output" in answer.json()["detail"]


@pytest.mark.parametrize("tests", [
    {"packed": "not base64!"}, {"packed": base64.b64encode(b"plain").decode()}, {"inputs": ["1"], "outputs": []},
    {"packed": base64.b64encode(zlib.compress(b" " * (17 << 20))).decode()}, 3, {"packed": [1]},
])
def test_unit_tests_that_cannot_be_read_are_refused_by_name(api, tests):
    answer = api.post("/verify", json={"responses_create_params": {}, "response": {}, "unit_tests": tests})
    assert answer.status_code == 422 and "unit_tests" in answer.json()["detail"]
