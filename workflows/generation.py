"""Stages that make the candidates of the SFT set, part by part: samples of each domain, and their verdicts.

A part is the samples of some problems: one Parquet file and one summary, written when it is finished and never made
again. What is finished of a part under way lies in its request log. Memory holds the parts under way and no more.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import write_atomically
from pipeline.parts import link
from pipeline.recipe import GenerateConfig, TeacherConfig
from pipeline.records import Sample, Status, read_table, write_table
from pipeline.request_log import RequestLog
from pipeline.stage import StageContext, StageResult
from workflows.data import load_problems
from workflows.inference import JUDGEMENT_TOKENS, check_infrastructure, open_replicas, open_verifier

if TYPE_CHECKING:
    from distill.generation import Generator
    from distill.teacher import Account

UNSOLVED = pa.schema([("problem_id", pa.string()), ("domain", pa.string()), ("attempts", pa.int64()),
                      ("statuses", pa.string())])  # JSON: {form: {status: samples}}
JUDGED_AT_ONCE = 512  # answers that an engine judges at a time
Summary = dict[str, Any]
T = TypeVar("T")


class Parts:
    """The finished parts of a stage, in its work folder, and the request logs of those under way."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        for name in ("samples", "parts", "requests"):
            (work / name).mkdir(exist_ok=True)
        for path in (work / "parts").glob("part-*.json"):  # killed between the summary and the end of its log
            (work / "requests" / f"{path.stem}.jsonl").unlink(missing_ok=True)

    def summary(self, index: int) -> Summary | None:
        path = self.work / "parts" / f"part-{index:05}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def log_path(self, index: int) -> Path:
        return self.work / "requests" / f"part-{index:05}.jsonl"

    def logged(self) -> Iterator[dict[str, Any]]:
        """The answers in the logs of parts under way."""
        for path in sorted((self.work / "requests").glob("part-*.jsonl")):
            with RequestLog(path) as log:
                yield from (record for key, record in log.done.items() if not key.startswith("verdict/"))

    def finish(self, index: int, make: Callable[[RequestLog], tuple[list[Sample], Summary]]) -> Summary:
        """The summary of a part: of its file, or of what `make` makes with its log."""
        if (done := self.summary(index)) is not None:
            return done
        with RequestLog(self.log_path(index)) as log:
            samples, summary = make(log)
        write_table(self.work / "samples" / f"part-{index:05}.parquet", samples, Sample)
        write_atomically(self.work / "parts" / f"part-{index:05}.json", json.dumps(summary))  # from here on it is done
        self.log_path(index).unlink()
        return summary

    def finish_all(self, parts: Sequence[T], make: Callable[[T, RequestLog], tuple[list[Sample], Summary]],
                   at_once: int, stop: Callable[[], None]) -> list[Summary]:
        """Summaries of all parts, `at_once` of them made at a time.

        The first failure calls `stop`, which ends the other parts at what they have under way, and is raised then.
        """
        def finish(index: int, part: T) -> Summary | None:
            if self._failure is not None:
                return None
            try:
                return self.finish(index, lambda log: make(part, log))
            except BaseException as error:
                with self._lock:
                    first, self._failure = self._failure is None, self._failure or error
                if first:
                    stop()
                return None

        with ThreadPoolExecutor(at_once, thread_name_prefix="part") as threads:
            found = list(threads.map(finish, range(len(parts)), parts))
        if self._failure is not None:
            raise self._failure
        return [summary for summary in found if summary is not None]

    def publish(self, out: Path) -> None:
        """The parts as out/samples; the work folder keeps them until the stage is committed."""
        shutil.copytree(self.work / "samples", out / "samples", copy_function=link)


def generate(context: StageContext, domain: str, replicas: int = 1, teacher: TeacherConfig | None = None
             ) -> StageResult:
    """Sample the domain's problems in its forms from its expert (section 5.1), or from a teacher's endpoint.

    Where rules give verdicts and `most_samples` allows, in rounds; samples then come with their verdicts.
    """
    from distill.generation import Meter, Order, Requests, announce, solve
    from distill.prompts import prompt_messages

    config, reflective = context.config["generate"], context.config["model"].reflective_prompt
    chosen = load_problems(context, "sft", domain)[:config.problems]
    parts = Parts(context.work)
    slices = [chosen[start:start + config.part_problems] for start in range(0, len(chosen), config.part_problems)]
    rounds = config.cap > config.samples
    with ExitStack() as stack:
        generator, account, errors = stack.enter_context(
            _generator(context, domain, _sampling(config), config.shard_prompts, replicas, teacher))
        verifier = stack.enter_context(open_verifier(None, chosen, context.config["isolation"])) if rounds else None
        done = [found for index in range(len(slices)) if (found := parts.summary(index)) is not None]
        logged = list(parts.logged())
        if account is not None:
            _charge(account, done)
            _charge(account, [_used(logged)])
        announce(context.progress, None if rounds else len(chosen) * len(config.forms) * config.samples,
                 sum(found["samples"] for found in done) + len(logged))
        meter = Meter(context.progress)

        def make(problems, log: RequestLog) -> tuple[list[Sample], Summary]:
            orders = [Order(problem, form, prompt_messages(problem, form, reflective), config.samples)
                      for problem in problems for form in config.forms]
            requests = Requests(generator, log, context.seed, meter.count)
            samples = solve(orders, requests, verifier.verify_batch, config.cap, config.wanted) if verifier else \
                requests.samples(orders)
            answers = [record for key, record in log.done.items() if not key.startswith("verdict/")]
            return samples, {"samples": len(samples), **_used(answers),
                             "finish_reasons": Counter(sample.finish_reason for sample in samples)}

        # two parts, so that engines have work while one ends and is verified; more where parts are small
        busy = replicas * config.shard_prompts if teacher is None else teacher.concurrency
        at_once = 1 + -(-busy // (config.part_problems * len(config.forms) * config.samples))
        summaries = parts.finish_all(slices, make, at_once, generator.stop)
    parts.publish(context.out)
    total = _added(summaries)
    samples, reasons = total["samples"], total["finish_reasons"]
    counts = {"problems": len(chosen), "samples": samples, "parts": len(slices),
              "tokens": total["tokens"], "prompt_tokens": total["prompt_tokens"], "finish_reasons": dict(reasons)}
    metrics = {"finished_share": reasons["stop"] / max(1, samples), "mean_tokens": total["tokens"] / max(1, samples)}
    if account is None:
        metrics["load_logprob_error"] = max(errors, default=None)
    else:
        counts["teacher"] = account.counts()
        metrics["usd"] = account.usd
    return StageResult(counts=counts, metrics=metrics, key_metric="finished_share")


def verify(context: StageContext, replicas: int = 1, teachers: dict[str, TeacherConfig] | None = None) -> StageResult:
    """Verdicts for samples without one: by rules, elsewhere by the domain's own expert, or teacher, as judge.

    What a verifier fails on is tried again, then set aside as an infrastructure error. Problems of which no sample is
    right go into `unsolved.parquet`.
    """
    parts, summaries, accounts = Parts(context.work), [], {}
    files = [(name.removeprefix("generate-"), path) for name in context.inputs if name.startswith("generate-")
             for path in sorted((context.inputs[name] / "samples").glob("part-*.parquet"))]
    places: dict[str, dict[int, Path]] = {}
    for index, (domain, path) in enumerate(files):
        places.setdefault(domain, {})[index] = path
    context.progress.start(sum(pq.read_metadata(path).num_rows for _, path in files), "verdicts")
    for domain, own in places.items():
        done = [found for index in own if (found := parts.summary(index)) is not None]
        context.progress.advance(sum(found["samples"] for found in done))
        if len(done) == len(own):
            summaries += done
        else:
            summaries += _verify_domain(context, domain, own, parts, summaries, replicas, (teachers or {}).get(domain))
    parts.publish(context.out)
    total = _added(summaries)
    unsolved = [row for summary in summaries for row in summary["unsolved"]]
    pq.write_table(pa.Table.from_pylist(unsolved, schema=UNSOLVED), context.out / "unsolved.parquet",
                   compression="zstd")
    counts = {"samples": total["samples"], "unsolved": len(unsolved), "problems": total["problems"],
              "statuses": dict(total["statuses"]), "reasons": dict(total["reasons"]),
              "unsolved_by_domain": dict(Counter(row["domain"] for row in unsolved))}
    for domain, config in (teachers or {}).items():
        account = _account(config)
        _charge(account, [summary for summary in summaries if summary["domain"] == domain])
        accounts[domain] = account.counts()
    if accounts:
        counts["teachers"] = accounts
    return StageResult(counts=counts, metrics={
        "correct_share": total["statuses"]["correct"] / max(1, total["samples"]),
        "mean_seconds": total["seconds"] / max(1, total["samples"])}, key_metric="correct_share")


def _verify_domain(context: StageContext, domain: str, own: dict[int, Path], parts: Parts, before: list[Summary],
                   replicas: int, teacher: TeacherConfig | None) -> list[Summary]:
    """The summaries of a domain's parts; `before`: those of the domains before it."""
    from distill.generation import VERIFIED_AT_ONCE, LoggedChat, with_verdicts
    from rewards.judge import Judge

    problems = {problem.id: problem for problem in load_problems(context, "sft", domain)}
    summaries: list[Summary] = []
    with ExitStack() as stack:
        chat, at_once = None, VERIFIED_AT_ONCE
        if domain in context.config["judged"]:
            sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": JUDGEMENT_TOKENS}
            generator, account, _ = stack.enter_context(
                _generator(context, domain, sampling, JUDGED_AT_ONCE, replicas, teacher))
            chat, at_once = LoggedChat(generator), replicas * JUDGED_AT_ONCE
            if account is not None:
                manifest = json.loads((context.inputs[f"generate-{domain}"] / "manifest.json").read_text())
                spent = manifest["counts"]["teacher"]
                account.add(spent["requests"] - spent["retries"], spent["requests"], spent["prompt_tokens"],
                            spent["completion_tokens"])
                _charge(account, [found for index in own if (found := parts.summary(index)) is not None])
                _charge(account, [_used(parts.logged())])
        verifier = stack.enter_context(open_verifier(chat and Judge(chat, seed=context.seed), list(problems.values()),
                                                     context.config["isolation"]))

        def make(path: Path, log: RequestLog) -> tuple[list[Sample], Summary]:
            if chat is not None:
                chat.log = log
            samples = with_verdicts(read_table(path, Sample), problems, verifier.verify_batch,
                                    context.progress.advance, at_once)
            total = _added([*before, *summaries])
            check_infrastructure([sample.verdict for sample in samples], context.name,
                                 total["statuses"]["infra_error"], total["samples"])
            return samples, {"domain": domain, **_judged(samples), **_used(log.done.values())}

        for index, path in own.items():
            summaries.append(parts.finish(index, lambda log, path=path: make(path, log)))
    return summaries


def _judged(samples: Iterable[Sample]) -> Summary:
    """Statuses and reasons of a part's verdicts, and its problems of which no sample is right."""
    by_problem: dict[str, list[Sample]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem_id, []).append(sample)
    unsolved = []
    for problem_id, own in by_problem.items():
        if not any(sample.verdict.status is Status.CORRECT for sample in own):
            statuses: dict[str, Counter[str]] = {}
            for sample in own:
                statuses.setdefault(sample.form, Counter())[sample.verdict.status.value] += 1
            unsolved.append({"problem_id": problem_id, "domain": own[0].domain, "attempts": len(own),
                             "statuses": json.dumps(statuses)})
    every = [sample for own in by_problem.values() for sample in own]
    return {"samples": len(every), "problems": len(by_problem), "unsolved": unsolved,
            "statuses": Counter(sample.verdict.status.value for sample in every),
            "reasons": Counter(sample.verdict.reason for sample in every),
            "seconds": sum(sample.verdict.seconds for sample in every)}


@contextmanager
def _generator(context: StageContext, domain: str, sampling: dict[str, Any], batch: int, replicas: int,
               teacher: TeacherConfig | None) -> Iterator[tuple[Generator, Account | None, list[float]]]:
    """Who answers for a domain: its teacher with the account, or its expert with the errors of its proofs."""
    if teacher is not None:
        from distill.teacher import Teacher

        account = _account(teacher)
        with Teacher(teacher, sampling, account, context.progress.note) as endpoint:
            yield endpoint, account, []
        return
    with open_replicas(context.inputs[f"expert-{domain}-rl"] / "checkpoint", context.config["model"],
                       context.config["engine"], context.seed, replicas, context.progress.note) as model:
        yield model.generator(sampling, batch), None, model.logprob_errors


def _sampling(config: GenerateConfig) -> dict[str, Any]:
    return {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}


def _account(config: TeacherConfig) -> Account:
    from distill.teacher import Account

    return Account(config)


def _used(answers: Iterable[dict[str, Any]]) -> Summary:
    """What answers of a log have taken, added up."""
    used = {"answers": 0, "tries": 0, "prompt_tokens": 0, "tokens": 0}
    for record in answers:
        used["answers"] += 1
        for name in ("tries", "prompt_tokens", "tokens"):
            used[name] += record[name]
    return used


def _charge(account: Account, used: Iterable[Summary]) -> None:
    for part in used:
        account.add(part["answers"], part["tries"], part["prompt_tokens"], part["tokens"])


def _added(summaries: Iterable[Summary]) -> Summary:
    """Numbers and counters of summaries, added up."""
    total: Summary = Counter()
    for name in ("statuses", "reasons", "finish_reasons"):
        total[name] = Counter()
    for summary in summaries:
        for name, value in summary.items():
            if isinstance(value, dict):
                total[name].update(value)
            elif isinstance(value, int | float):
                total[name] += value
    return total
