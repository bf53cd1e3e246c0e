"""Stages at the beginning of the data: problems, expert samples, verdicts; and what makes packs of any rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.records import Problem, Sample, read_table, write_table
from pipeline.stage import StageContext, StageResult


def problems(context: StageContext) -> StageResult:
    """Load every domain, keep what can be read, split so that no two splits share a problem."""
    from distill.sources import load_domain
    from distill.splits import assign

    domains = context.config["domains"]
    loaded, broken = {}, []
    context.progress.start(len(domains), "domains")
    for name, config in domains.items():
        loaded[name], bad_rows = load_domain(name, config, context.seed)
        broken += bad_rows
        if bad_rows:
            context.progress.note(f"{name}: {len(bad_rows)} broken rows left out, the first at "
                                  f"{bad_rows[0]['path']}, line {bad_rows[0]['line']}: {bad_rows[0]['error']}")
        context.progress.advance(1)
    assigned = assign(loaded, domains, context.seed)
    write_table(context.out / "problems.parquet", assigned, Problem)
    (context.out / "bad_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
    splits = {name: dict(Counter(p.split for p in assigned if p.domain == name)) for name in domains}
    return StageResult(counts={"problems": len(assigned), "bad_rows": len(broken), "splits": splits},
                       metrics={"problems": len(assigned)}, key_metric="problems")


def load_problems(context: StageContext, split: str | None = None, domain: str | None = None) -> list[Problem]:
    """Problems of the input stage, of one split and domain if given."""
    where = [(name, "=", value) for name, value in (("split", split), ("domain", domain)) if value is not None]
    return read_table(context.inputs["problems"] / "problems.parquet", Problem, where or None)


def base_checkpoint(context: StageContext) -> Path:
    """The model that post-training starts from: with its context extended, where the recipe says so."""
    return context.inputs["extend" if "extend" in context.inputs else "base"] / "checkpoint"


def generate(context: StageContext, domain: str) -> StageResult:
    """Sample both forms from the domain's expert (section 5.1), continuing from the request log."""
    from distill.generation import Order
    from distill.generation import generate as sample
    from distill.prompts import FORMS, prompt_messages
    from workflows.inference import open_model

    config = context.config["generate"]
    model = open_model(context.inputs[f"expert-{domain}-rl"] / "checkpoint", context.config["model"],
                       context.config["engine"], context.seed)
    chosen = load_problems(context, "sft", domain)[:config.problems]
    reflective = context.config["model"].reflective_prompt
    orders = [Order(problem, form, prompt_messages(problem, form, reflective), config.samples)
              for problem in chosen for form in FORMS]
    samples = sample(orders, sampler=model.sampler(config.temperature, config.max_tokens, config.top_p),
                     encode=model.encode, decode=model.decode, checkpoint=model.digest,
                     sampling={"temperature": config.temperature, "top_p": config.top_p,
                               "max_tokens": config.max_tokens},
                     log_path=context.work / "requests.jsonl", shard_prompts=config.shard_prompts, seed=context.seed,
                     progress=context.progress)
    write_table(context.out / "samples/part-00000.parquet", samples, Sample)
    finished = sum(sample.finish_reason == "stop" for sample in samples)
    return StageResult(counts={"problems": len(chosen), "samples": len(samples)},
                       metrics={"finished_share": finished / max(1, len(samples)),
                                "mean_tokens": sum(s.tokens for s in samples) / max(1, len(samples)),
                                "load_logprob_error": model.logprob_error}, key_metric="finished_share")


def verify(context: StageContext) -> StageResult:
    """Verdicts: rules where answers can be checked, the domain's own expert as judge elsewhere."""
    from distill.generation import with_verdicts
    from workflows.inference import check_infrastructure, open_model, open_verifier

    by_id = {problem.id: problem for problem in load_problems(context)}
    verified: list[Sample] = []
    judged = context.config["judged"]
    names = [name for name in context.inputs if name.startswith("generate-")]
    for name in names:
        domain = name.removeprefix("generate-")
        samples = read_table(context.inputs[name] / "samples", Sample)
        judge = None
        if domain in judged:
            expert = open_model(context.inputs[f"expert-{domain}-rl"] / "checkpoint", context.config["model"],
                                context.config["engine"], context.seed)
            judge = expert.judge(context.seed)
        sampled = [by_id[sample.problem_id] for sample in samples]
        with open_verifier(judge, sampled, context.config["isolation"]) as verifier:
            verified += with_verdicts(samples, by_id, verifier.verify_batch, 256, context.progress)
    check_infrastructure([sample.verdict for sample in verified], context.name)
    write_table(context.out / "samples/part-00000.parquet", verified, Sample)
    statuses = Counter(sample.verdict.status.value for sample in verified)
    reasons = Counter(sample.verdict.reason for sample in verified)
    return StageResult(counts={"samples": len(verified), "statuses": dict(statuses), "reasons": dict(reasons)},
                       metrics={"correct_share": statuses["correct"] / max(1, len(verified)),
                                "mean_seconds": sum(s.verdict.seconds for s in verified) / max(1, len(verified))},
                       key_metric="correct_share")


def write_packs(context: StageContext, tokenizer, rows, pack_length: int, path) -> StageResult:
    """Pack (id, messages, completion) rows; the loss is on completions. A row without messages is plain text."""
    from policy.tokenizer import encode_samples
    from sft.packing import TokenizedSample, pack_samples

    context.progress.start(len(rows), "samples")
    encoded = encode_samples(tokenizer, [messages for _, messages, _ in rows], [text for _, _, text in rows])
    samples = [TokenizedSample(row[0], prompt + completion, len(prompt))
               for row, (prompt, completion) in zip(rows, encoded, strict=True)]
    packs, too_long = pack_samples(samples, pack_length, tokenizer.pad_token_id, context.seed)
    pq.write_table(packs, path, compression="zstd")
    context.progress.advance(len(rows))
    tokens = sum(len(sample.input_ids) for sample in samples if len(sample.input_ids) <= pack_length)
    return packed(context, len(packs), tokens, len(too_long), pack_length)


def packed(context: StageContext, packs: int, tokens: int, too_long: int, pack_length: int) -> StageResult:
    """What a stage says of its packs."""
    if too_long:
        context.progress.note(f"{too_long} samples are longer than pack_length {pack_length} and were left out")
    return StageResult(counts={"packs": packs, "tokens": tokens, "too_long": too_long},
                       metrics={"fill": tokens / max(1, packs * pack_length)}, key_metric="fill")
