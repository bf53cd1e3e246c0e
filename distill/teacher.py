"""A model behind an OpenAI-compatible endpoint as the generator: DeepSeek-R1 was one (DeepSeek-V3, section 5.1).

Requests are retried with growing pauses, kept under a rate, and paid for: the account counts what every answer says it
used. Answers are logged one by one, so that none is paid for twice.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from distill.generation import Answer, Conversation
from pipeline.recipe import TeacherConfig
from pipeline.stage import StageError
from pipeline.threads import as_finished

RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
REFUSED = frozenset({400, 413, 422})  # this request, not the others: a prompt too long, or content it will not take
MOST_REFUSED = 20  # from the start and with no answer among them: then it is the recipe, not a request
LONGEST_PAUSE = 60.0  # seconds
BYTES_PER_TOKEN = 4  # of an endpoint that reports no usage


@dataclass
class Account:
    """What a teacher's answers have used. USD at the prices of the recipe."""

    config: TeacherConfig
    requests: int = 0  # sent, retries included
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answers: int, tries: int, prompt_tokens: int, completion_tokens: int) -> None:
        self.requests += tries
        self.retries += tries - answers
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    @property
    def usd(self) -> float:
        return (self.prompt_tokens * self.config.input_price
                + self.completion_tokens * self.config.output_price) / 1e6

    def check(self) -> None:
        """Raises StageError when the money is spent."""
        if self.config.most_cost is not None and self.usd >= self.config.most_cost:
            raise StageError(f"teacher {self.config.model}: {self.usd:.2f} USD of most_cost {self.config.most_cost:g} "
                             "are spent; its answers are kept. Raise most_cost and give the same command to go on")

    def counts(self) -> dict[str, int | float]:
        return {"requests": self.requests, "retries": self.retries, "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens, "usd": round(self.usd, 6)}


class Teacher:
    """A `Generator` over HTTP; use `with`, or `close` it.

    sampling: temperature, top_p, max_tokens. account: what was spent before is in it; it goes on from there.
    pause: seconds before the first retry, doubled for each after it. Raises StageError at once for a missing key, and
    from `answers` for a refused key, a wrong address, a spent budget, or when all retries of a request failed.
    """

    def __init__(self, config: TeacherConfig, sampling: dict[str, Any], account: Account,
                 note: Callable[[str], None] = print, pause: float = 1.0) -> None:
        self.config, self.sampling, self.account, self.note, self.pause = config, sampling, account, note, pause
        self.name = f"teacher:{config.model}"
        headers = {}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env, "").strip()
            if not key:
                raise StageError(f"teacher {config.model}: the environment variable {config.api_key_env} "
                                 "(teacher.api_key_env) is not set; set it and give the same command again")
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(config.timeout, connect=30.0, pool=None),
                                  limits=httpx.Limits(max_connections=config.concurrency))
        self._threads = ThreadPoolExecutor(config.concurrency, thread_name_prefix="teacher")
        self._lock = threading.Lock()
        self._next = 0.0  # when the next request may be sent
        self._answered = self._refused = 0
        self._failed: StageError | None = None
        self._stopped = threading.Event()  # set with it: pauses end then

    def prompt(self, messages: Conversation) -> list[dict[str, str]]:
        return list(messages)

    def answers(self, prompts: Sequence[Any], seeds: Sequence[int]) -> Iterator[dict[int, Answer]]:
        """One at a time, as they come. When one fails, those under way still come before the error is raised."""
        futures = {self._threads.submit(self._ask, messages, seed): place
                   for place, (messages, seed) in enumerate(zip(prompts, seeds, strict=True))}
        for place, answer in as_finished(futures):
            yield {place: answer}

    def _ask(self, messages: Conversation, seed: int) -> Answer:
        pause = self.pause
        for tries in range(1, self.config.retries + 2):
            self._wait_for_turn()
            found, wait = self._try(messages, seed, tries)
            if isinstance(found, Answer):
                with self._lock:
                    self.account.add(1, tries, found.prompt_tokens, found.tokens)
                return found
            if tries <= self.config.retries:
                self._stopped.wait(max(wait, pause * random.uniform(0.5, 1.5)))
                pause = min(2 * pause, LONGEST_PAUSE)
        raise self._fail(f"{self.config.url} gave no answer in {self.config.retries + 1} tries; the last: {found}. "
                         "What it had answered is kept: the same command goes on")

    def _wait_for_turn(self) -> None:
        """Keeps to the rate and the money; after a failure nothing more is sent."""
        with self._lock:
            self.account.check()
            turn = max(time.monotonic(), self._next)
            if self.config.requests_per_minute is not None:
                self._next = turn + 60 / self.config.requests_per_minute
        self._stopped.wait(max(0.0, turn - time.monotonic()))
        if self._failed is not None:
            raise self._failed

    def _try(self, messages: Conversation, seed: int, tries: int) -> tuple[Answer | str, float]:
        """An answer, or what was wrong and the seconds to wait before another try."""
        body = {"model": self.config.model, "messages": list(messages), "seed": seed, **self.sampling}
        try:
            response = self._http.post(f"{self.config.url.rstrip('/')}/chat/completions", json=body)
        except httpx.TransportError as error:
            return f"{type(error).__name__}: {error}", 0.0
        problem = f"HTTP {response.status_code} {response.text[:300]}"
        if response.status_code in RETRIED:
            wait = _seconds(response.headers.get("Retry-After"))
            with self._lock:  # the limit is the account's: no other request is let through before it ends either
                self._next = max(self._next, time.monotonic() + wait)
            return problem, wait
        if response.status_code in REFUSED:
            return self._refuse(problem, tries), 0.0
        if response.status_code != 200:
            what = "does not take the key" if response.status_code in (401, 403) else "cannot be asked"
            raise self._fail(f"{self.config.url} {what}: {problem}. Mend teacher.url, model or api_key_env; the same "
                             "command goes on")
        try:
            answer = read_answer(response.json(), messages, tries)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            return f"an answer that cannot be read ({type(error).__name__}: {error}): {response.text[:200]!r}", 0.0
        with self._lock:
            self._answered += 1
        return answer, 0.0

    def _refuse(self, problem: str, tries: int) -> Answer:
        with self._lock:
            self._refused += 1
            first, hopeless = self._refused == 1, not self._answered and self._refused >= MOST_REFUSED
        if first:
            self.note(f"teacher {self.config.model} refused a request, which gives an empty sample: {problem}")
        if hopeless:
            raise self._fail(f"{self.config.url} refused its first {MOST_REFUSED} requests: {problem}")
        return Answer("", 0, "refused", tries=tries)

    def _fail(self, message: str) -> StageError:
        with self._lock:
            self._failed = self._failed or StageError(f"teacher {self.config.model}: {message}")
            self._stopped.set()
            return self._failed

    def stop(self) -> None:
        """Send no other request; whoever waits for one gets a StageError."""
        self._fail("it was stopped")

    def close(self) -> None:
        """Waits for the requests under way."""
        self.stop()
        self._threads.shutdown(cancel_futures=True)
        self._http.close()

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_answer(data: dict[str, Any], messages: Conversation, tries: int = 1) -> Answer:
    """The first choice of a chat completion; what an R1-like endpoint reports as its reasoning stands in <think>.

    Raises ValueError, KeyError, IndexError, TypeError or AttributeError for data of another shape.
    """
    choice = data["choices"][0]
    message, finish_reason = choice["message"], choice["finish_reason"] or "stop"
    text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(text, str):
        raise ValueError("its content is no text")
    if reasoning:
        closed = f"\n</think>\n{text.lstrip()}" if text or finish_reason == "stop" else ""
        text = f"<think>\n{reasoning.strip()}{closed}"
    usage = data.get("usage") or {}
    return Answer(text, int(usage.get("completion_tokens") or -(-len(text.encode()) // BYTES_PER_TOKEN)), finish_reason,
                  int(usage.get("prompt_tokens") or
                      -(-sum(len(message["content"].encode()) for message in messages) // BYTES_PER_TOKEN)), tries)


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, a number or a date, as seconds from now; 0 for none."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        try:
            return max(0.0, parsedate_to_datetime(str(retry_after)).timestamp() - time.time())
        except ValueError:
            return 0.0
