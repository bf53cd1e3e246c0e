"""Sampling many completions so that a killed run loses at most the batch under way.

Every request is keyed by the hash of who answers, prompt, sampling parameters and sample index; a finished one is read
from the log. Going from n to n + k samples a problem makes only the k new ones, and so do the rounds of adaptive
sampling: easy problems stop after the first, hard ones get as many again up to a cap.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.records import Message, Problem, Sample, Status, Verdict, content_id
from pipeline.request_log import RequestLog
from pipeline.stage import Progress

VERIFIED_AT_ONCE = 256
HOPELESS = frozenset({"too_long", "refused"})  # finish reasons that another try would meet as well
Verify = Callable[[list[Problem], list[str]], list[Verdict]]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Answer:
    """What came back for one request. finish_reason: "stop", "length", "too_long", or "refused" by an endpoint.

    tries: how often it was sent until an endpoint answered.
    """

    text: str
    tokens: int
    finish_reason: str
    prompt_tokens: int = 0
    tries: int = 1


class Generator(Protocol):
    """Who answers: a checkpoint in engines, or an endpoint. Safe to call from several threads.

    name: what samples say made them. sampling: temperature, top_p, max_tokens; written into every sample.
    """

    name: str
    sampling: dict[str, Any]

    def prompt(self, messages: Conversation) -> Any:
        """What is sent for a conversation, as JSON data: token ids or messages."""

    def answers(self, prompts: Sequence[Any], seeds: Sequence[int]) -> Iterator[dict[int, Answer]]:
        """Answers by position among `prompts`, in any order, each lot as soon as it is there."""

    def stop(self) -> None:
        """Ask for nothing more: what is under way still comes, then `answers` raises StageError."""


@dataclass(frozen=True)
class Order:
    """`samples` completions of one problem under one prompt."""

    problem: Problem
    form: str
    messages: tuple[Message, ...]
    samples: int


class Meter:
    """Counts answers of all threads into a progress, with the tokens per second since it was made."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._began, self._tokens, self._lock = progress, time.monotonic(), 0, threading.Lock()

    def count(self, answers: Iterable[Answer]) -> None:
        with self._lock:
            answers = list(answers)
            self._tokens += sum(answer.tokens for answer in answers)
            self._progress.advance(len(answers), **{"tokens/s": self._tokens / (time.monotonic() - self._began)})


class Requests:
    """The requests of one log: asked once each, whatever becomes of the process."""

    def __init__(self, generator: Generator, log: RequestLog, seed: int,
                 count: Callable[[Iterable[Answer]], None] = lambda answers: None) -> None:
        self.generator, self.log, self.seed, self.count = generator, log, seed, count

    def key(self, prompt: Any, index: int) -> str:
        return content_id(self.generator.name, prompt, self.generator.sampling, self.seed, index)

    def answer(self, wanted: Sequence[tuple[str, Any]]) -> list[Answer]:
        """The answers to (key, prompt) pairs, in order; those not in the log are asked for."""
        waiting = list({key: prompt for key, prompt in wanted if key not in self.log}.items())
        seeds = [int(key[:8], 16) % 2**31 for key, _ in waiting]
        if waiting:
            for lot in self.generator.answers([prompt for _, prompt in waiting], seeds):
                self.log.append({waiting[place][0]: vars(answer) for place, answer in lot.items()})
                self.count(lot.values())
        return [Answer(**self.log.done[key]) for key, _ in wanted]

    def samples(self, orders: Sequence[Order]) -> list[Sample]:
        """The samples of all orders, in order."""
        prompts = [self.generator.prompt(order.messages) for order in orders]
        wanted = [(order, index, self.key(prompt, index), prompt)
                  for order, prompt in zip(orders, prompts, strict=True) for index in range(order.samples)]
        answers = self.answer([(key, prompt) for _, _, key, prompt in wanted])
        return [self._sample(order, index, answer)
                for (order, index, _, _), answer in zip(wanted, answers, strict=True)]

    def _sample(self, order: Order, index: int, answer: Answer) -> Sample:
        parameters = json.dumps({**self.generator.sampling, "index": index, "seed": self.seed}, sort_keys=True)
        problem, name = order.problem, self.generator.name
        return Sample(id=Sample.make_id(problem.id, order.form, name, parameters, answer.text), problem_id=problem.id,
                      domain=problem.domain, form=order.form, messages=order.messages, completion=answer.text,
                      checkpoint=name, sampling=parameters, finish_reason=answer.finish_reason, tokens=answer.tokens)


def samples_of(orders: Sequence[Order], *, generator: Generator, log_path: Path, seed: int,
               progress: Progress) -> list[Sample]:
    """The samples of all orders, in order; finished ones come from the log at `log_path`.

    A prompt too long for the engine gives a sample with finish reason "too_long" and no text, never an exception.
    """
    with RequestLog(log_path) as log:
        requests = Requests(generator, log, seed, Meter(progress).count)
        keys = {requests.key(prompt, index) for order in orders
                for prompt in [generator.prompt(order.messages)] for index in range(order.samples)}
        announce(progress, len(keys), sum(key in log for key in keys))
        return requests.samples(orders)


def announce(progress: Progress, asked: int | None, done: int) -> None:
    """Start the count of samples; asked: None where verdicts decide how many there will be."""
    progress.start(asked, "samples", done=done)
    if done:
        progress.note(f"{done} samples were made before" if asked is None else
                      f"{asked} samples asked, {done} made before, {asked - done} left")


def solve(orders: Sequence[Order], requests: Requests, verify: Verify, most: int, wanted: int) -> list[Sample]:
    """Samples with verdicts, in rounds: an order with fewer than `wanted` right ones gets as many again, up to `most`.

    Right: correct and finished. A sample that the verifier failed on may be right, so it asks for no other. Verdicts
    go into the log too, so that a killed run decides as it had decided.
    """
    orders = list(orders)
    while True:
        samples = _verified(requests.samples(orders), orders, requests.log, verify)
        short, place = [], 0
        for at, order in enumerate(orders):
            own = samples[place:place + order.samples]
            place += order.samples
            right = sum(_may_be_right(sample) for sample in own)
            if right < wanted and order.samples < most and not any(s.finish_reason in HOPELESS for s in own):
                short.append(at)
        if not short:
            return samples
        for at in short:
            orders[at] = dataclasses.replace(orders[at], samples=min(2 * orders[at].samples, most))


def _may_be_right(sample: Sample) -> bool:
    assert sample.verdict is not None
    return sample.verdict.status is Status.INFRA_ERROR or (
        sample.verdict.status is Status.CORRECT and sample.finish_reason == "stop")


def _verified(samples: list[Sample], orders: Sequence[Order], log: RequestLog, verify: Verify) -> list[Sample]:
    """Samples with the verdicts of the log, and new ones, which it gets; an infra error is not kept there."""
    known = [dataclasses.replace(sample, verdict=_verdict(log.done[f"verdict/{sample.id}"]))
             if f"verdict/{sample.id}" in log else sample for sample in samples]
    found = with_verdicts(known, {order.problem.id: order.problem for order in orders}, verify)
    log.append({f"verdict/{sample.id}": dataclasses.asdict(sample.verdict)
                for before, sample in zip(known, found, strict=True)
                if before.verdict is None and sample.verdict.status is not Status.INFRA_ERROR})
    return found


def _verdict(record: dict[str, Any]) -> Verdict:
    return Verdict(**{**record, "status": Status(record["status"])})


def with_verdicts(samples: Sequence[Sample], problems: dict[str, Problem], verify: Verify,
                  advance: Callable[[int], None] = lambda count: None, at_once: int = VERIFIED_AT_ONCE) -> list[Sample]:
    """Samples with their verdicts, verified `at_once` at a time.

    One that has a verdict keeps it, but for infrastructure errors: those are tried again, and new ones once more at
    the end. What fails then stays an infrastructure error.
    """
    found = list(samples)
    waiting = [place for place, sample in enumerate(found) if _unverified(sample)]
    advance(len(found) - len(waiting))
    for first in (True, False):
        for start in range(0, len(waiting), at_once):
            chunk = waiting[start:start + at_once]
            verdicts = verify([problems[found[place].problem_id] for place in chunk],
                              [found[place].completion for place in chunk])
            for place, verdict in zip(chunk, verdicts, strict=True):
                found[place] = dataclasses.replace(found[place], verdict=verdict)
            advance(len(chunk) if first else 0)
        waiting = [place for place in waiting if _unverified(found[place])]
    return found


def _unverified(sample: Sample) -> bool:
    return sample.verdict is None or sample.verdict.status is Status.INFRA_ERROR


class LoggedChat:
    """`generate(conversations, n, seed)`, the form `rewards.judge.Judge` asks for, answered through a log.

    `log` is the one of the part being judged.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.log: RequestLog | None = None

    def __call__(self, conversations: Sequence[Conversation], n: int, seed: int) -> list[list[str]]:
        if self.log is None:
            raise ValueError("no log to answer from: set `log` before judging")
        requests = Requests(self.generator, self.log, seed)
        prompts = [self.generator.prompt(messages) for messages in conversations]
        texts = [answer.text for answer in requests.answer(
            [(requests.key(prompt, vote), prompt) for prompt in prompts for vote in range(n)])]
        return [texts[start:start + n] for start in range(0, len(texts), n)]
