"""Sampling many completions so that a killed run loses at most one shard.

Every request is keyed by the hash of checkpoint, prompt tokens, sampling parameters and sample index; a finished
one is read from the log. Going from n to n + k samples a problem makes only the k new ones.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.records import Message, Problem, Sample, content_id
from pipeline.request_log import RequestLog
from pipeline.stage import Progress


class Sampler(Protocol):
    """What generates: prompts as token ids with a seed each -> (token ids, finish reason) each, in order."""

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
                 ) -> list[tuple[Sequence[int], str]]: ...


@dataclass(frozen=True)
class Order:
    """`samples` completions of one problem under one prompt."""

    problem: Problem
    form: str
    messages: tuple[Message, ...]
    samples: int


def generate(orders: Sequence[Order], *, sampler: Sampler, encode: Callable[[Sequence[Message]], Sequence[int]],
             decode: Callable[[Sequence[int]], str], sampling: dict[str, Any], checkpoint: str, log_path: Path,
             shard_prompts: int, seed: int, progress: Progress) -> list[Sample]:
    """The samples of all orders, in order; finished ones come from the log at `log_path`.

    sampling: temperature, top_p, max_tokens; written into every sample. A prompt too long for the engine gives a
    sample with finish reason "too_long" and no text, never an exception.
    """
    requests = [(order, index) for order in orders for index in range(order.samples)]
    encoded = [tuple(encode(order.messages)) for order in orders]
    keys = [content_id(checkpoint, ids, sampling, seed, index)
            for order, ids in zip(orders, encoded, strict=True) for index in range(order.samples)]
    prompts = [ids for order, ids in zip(orders, encoded, strict=True) for _ in range(order.samples)]
    with RequestLog(log_path) as log:
        waiting = [position for position, key in enumerate(keys) if key not in log]
        progress.start(len(keys), "samples", done=len(keys) - len(waiting))
        if len(waiting) < len(keys):
            progress.note(f"{len(keys)} samples asked, {len(keys) - len(waiting)} in the log, {len(waiting)} left")
        for shard in _shards(waiting, shard_prompts):
            began = time.monotonic()
            results = sampler([prompts[position] for position in shard],
                              [int(keys[position][:8], 16) % 2**31 for position in shard])
            log.append({keys[position]: {"token_ids": list(token_ids), "finish_reason": reason}
                        for position, (token_ids, reason) in zip(shard, results, strict=True)})
            tokens = sum(len(token_ids) for token_ids, _ in results)
            progress.advance(len(shard), **{"tokens/s": tokens / (time.monotonic() - began)})
        records = [log.done[key] for key in keys]
    samples = []
    for (order, index), record in zip(requests, records, strict=True):
        parameters = json.dumps({**sampling, "index": index, "seed": seed}, sort_keys=True)
        completion = decode(record["token_ids"])
        samples.append(Sample(
            id=Sample.make_id(order.problem.id, order.form, checkpoint, parameters, completion),
            problem_id=order.problem.id, domain=order.problem.domain, form=order.form, messages=order.messages,
            completion=completion, checkpoint=checkpoint, sampling=parameters,
            finish_reason=record["finish_reason"], tokens=len(record["token_ids"])))
    return samples


def with_verdicts(samples: Sequence[Sample], problems: dict[str, Problem],
                  verify: Callable[[list[Problem], list[str]], list[Any]], chunk: int,
                  progress: Progress) -> list[Sample]:
    """Samples with their verdicts, verified `chunk` at a time."""
    progress.start(len(samples), "verdicts")
    verified = []
    for start in range(0, len(samples), chunk):
        part = samples[start:start + chunk]
        verdicts = verify([problems[sample.problem_id] for sample in part], [sample.completion for sample in part])
        verified += [dataclasses.replace(sample, verdict=verdict)
                     for sample, verdict in zip(part, verdicts, strict=True)]
        progress.advance(len(part))
    return verified


def _shards(positions: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(positions), size):
        yield positions[start:start + size]
