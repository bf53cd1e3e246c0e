"""The teacher against vLLM's own OpenAI server, which a person would put a teacher behind."""

import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from tiny_models import save_tiny, tiny_tokenizer

from distill.teacher import Account, Teacher
from pipeline.recipe import TeacherConfig
from pipeline.stage import StageError

LENGTH = 128
START_SECONDS = 300
CPU_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_MLA_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class VllmServer:
    def __init__(self, folder, log) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/v1", log
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1",
                 "--port", str(self.port), "--served-model-name", "tiny", "--dtype", "float32",
                 "--max-model-len", str(LENGTH), "--enforce-eager", "--no-enable-chunked-prefill",
                 "--max-num-batched-tokens", "8192", "--compilation-config", '{"custom_ops": ["none"]}',
                 "--generation-config", "vllm"],
                env=os.environ | CPU_SETTINGS, stdout=out, stderr=out, start_new_session=True)

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/models").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """The server and its engine's process at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    running = VllmServer(save_tiny(folder / "policy", max_length=LENGTH), folder / "log")
    try:
        running.wait()
        yield running
    finally:
        running.kill()


def conversation(text):
    return [{"role": "user", "content": text}]


def ask(server, prompts, notes=None, **config):
    config = TeacherConfig(**{"url": server.url, "model": "tiny", "output_price": 2.0, "retries": 0, **config})
    account, found = Account(config), {}
    with Teacher(config, {"temperature": 1.0, "top_p": 1.0, "max_tokens": 20}, account,
                 (notes if notes is not None else []).append, pause=0.05) as teacher:
        for lot in teacher.answers(prompts, range(len(prompts))):
            found |= lot
    return found, account


def test_answers_come_with_their_tokens_counted_and_the_same_seeds_give_them_again(server):
    prompts = [conversation(f"What is {number} + 25?") for number in range(6)]
    found, account = ask(server, prompts)
    tokenizer = tiny_tokenizer(LENGTH)
    for place, prompt in enumerate(prompts):
        answer, asked = found[place], tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        assert 0 < answer.tokens <= 20 and answer.finish_reason == ("length" if answer.tokens == 20 else "stop")
        assert answer.prompt_tokens == len(asked)
    assert len({answer.text for answer in found.values()}) == 6
    tokens = sum(answer.tokens for answer in found.values())
    assert account.counts()["completion_tokens"] == tokens and account.usd == pytest.approx(2e-6 * tokens)
    again, _ = ask(server, prompts, concurrency=2)
    assert {place: answer.text for place, answer in again.items()} == {
        place: answer.text for place, answer in found.items()}


def test_a_prompt_that_does_not_fit_is_an_empty_sample_and_the_others_are_answered(server):
    notes = []
    found, account = ask(server, [conversation("What is 1 + 25?"), conversation("sum " * 400)], notes)
    assert found[0].tokens and (found[1].text, found[1].finish_reason) == ("", "refused")
    assert "refused a request" in notes[0] and account.counts()["requests"] == 2


def test_a_model_it_does_not_serve_is_named(server):
    with pytest.raises(StageError, match="r1.* cannot be asked: HTTP 404"):
        ask(server, [conversation("What is 1 + 25?")], model="r1")


def test_a_server_killed_under_way_ends_the_run_and_keeps_what_was_answered(server):
    """The last test: it kills the server."""
    config = TeacherConfig(url=server.url, model="tiny", retries=1, concurrency=1)
    found, account = {}, Account(config)
    with Teacher(config, {"max_tokens": 60}, account, print, pause=0.05) as teacher, \
            pytest.raises(StageError, match=r"gave no answer in 2 tries.*the same command goes on"):
        for lot in teacher.answers([conversation("What is 17 + 25?")] * 40, range(40)):
            found |= lot
            server.kill()
    assert 0 < len(found) < 40 and account.counts()["completion_tokens"] >= sum(a.tokens for a in found.values()) > 0
