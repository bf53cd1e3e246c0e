"""Stages that make and shape the SFT set: problems, expert samples, verdicts, rejection, curation, packs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.records import Problem, Sample, read_table, write_table
from pipeline.stage import StageContext, StageResult

PACKS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())),
                   ("position_ids", pa.list_(pa.int32())), ("sample_ids", pa.list_(pa.string()))])


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
    rows = read_table(context.inputs["problems"] / "problems.parquet", Problem)
    return [p for p in rows if split in (None, p.split) and domain in (None, p.domain)]


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
    write_table(context.out / "samples.parquet", samples, Sample)
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
        samples = read_table(context.inputs[name] / "samples.parquet", Sample)
        judge = None
        if domain in judged:
            expert = open_model(context.inputs[f"expert-{domain}-rl"] / "checkpoint", context.config["model"],
                                context.config["engine"], context.seed)
            judge = expert.judge(context.seed)
        sampled = [by_id[sample.problem_id] for sample in samples]
        with open_verifier(judge, sampled, context.config["isolation"]) as verifier:
            verified += with_verdicts(samples, by_id, verifier.verify_batch, 256, context.progress)
    check_infrastructure([sample.verdict for sample in verified], context.name)
    write_table(context.out / "samples.parquet", verified, Sample)
    statuses = Counter(sample.verdict.status.value for sample in verified)
    reasons = Counter(sample.verdict.reason for sample in verified)
    return StageResult(counts={"samples": len(verified), "statuses": dict(statuses), "reasons": dict(reasons)},
                       metrics={"correct_share": statuses["correct"] / max(1, len(verified)),
                                "mean_seconds": sum(s.verdict.seconds for s in verified) / max(1, len(verified))},
                       key_metric="correct_share")


def reject(context: StageContext) -> StageResult:
    """Best of n: correct, well-formed, concise."""
    from distill import rejection, review

    config, verified = context.config["reject"], context.inputs["verify"] / "samples.parquet"
    decisions = review.read_decisions(Path(config.reviews)) if config.reviews else {}
    samples = [review.revised(sample, decisions[sample.id]) if sample.id in decisions else sample
               for sample in read_table(verified, Sample)]
    if unknown := len(decisions) - sum(sample.verdict is not None and sample.verdict.verifier == review.REVIEWER
                                       for sample in samples):
        context.progress.note(f"{unknown} of {len(decisions)} decisions of {config.reviews} are about samples that are "
                              "not here: they were generated anew")
    problems = load_problems(context)
    kept, rejected, funnel = rejection.reject(samples, problems, config)
    lost = pl.DataFrame([(sample.id, reason) for sample, reason in rejected], ["id", "reason"], orient="row")
    principled = {problem.domain for problem in problems if problem.check.kind == "principles"}
    (context.out / "review").mkdir()
    pq.write_table(review.queue(verified, lost, config, principled, decisions), context.out / "review/queue.parquet")
    write_table(context.out / "samples.parquet", kept, Sample)
    write_table(context.out / "rejected.parquet", _marked(rejected), Sample)
    return StageResult(counts={"in": len(samples), "out": len(kept), "funnel": funnel},
                       metrics={"kept_share": len(kept) / max(1, len(samples))}, key_metric="kept_share")


def curate(context: StageContext) -> StageResult:
    """Deduplicate, decontaminate against the held-out split, mix to quotas."""
    from distill import curation

    samples = read_table(context.inputs["reject"] / "samples.parquet", Sample)
    kept, dropped, funnel = curation.curate(samples, load_problems(context), context.config["curate"], context.seed)
    write_table(context.out / "samples.parquet", kept, Sample)
    write_table(context.out / "dropped.parquet", _marked(dropped), Sample)
    return StageResult(counts={"in": len(samples), "out": len(kept), "funnel": funnel,
                               "forms": dict(Counter(sample.form for sample in kept))},
                       metrics={"samples": len(kept)}, key_metric="samples")


def _marked(lost) -> list[Sample]:
    """Lost samples with the reason in their provenance, where `lineage` finds it."""
    import dataclasses

    return [dataclasses.replace(sample, provenance=json.dumps({**json.loads(sample.provenance), "reason": reason}))
            for sample, reason in lost]


def pack(context: StageContext) -> StageResult:
    """Tokenise the curated samples, and the judge demonstrations of the corpus, into packs."""
    from distill.judging import judge_demonstrations
    from policy.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(base_checkpoint(context))
    samples = read_table(context.inputs["curate"] / "samples.parquet", Sample)
    demonstrations = judge_demonstrations(load_problems(context, "sft"), context.seed)
    rows = [(sample.id, list(sample.messages), sample.completion) for sample in samples] + demonstrations
    result = write_packs(context, tokenizer, rows, context.config["pack_length"], context.out / "packs.parquet")
    result.counts |= {"samples": len(samples), "judge_demonstrations": len(demonstrations)}
    return result


def write_packs(context: StageContext, tokenizer, rows, pack_length: int, path) -> StageResult:
    """Pack (id, messages, completion) rows; the loss is on completions. A row without messages is plain text."""
    from policy.tokenizer import completion_ids, prompt_ids
    from sft.packing import TokenizedSample, pack_samples

    tokenized = []
    context.progress.start(len(rows), "samples")
    for row_id, messages, completion in rows:
        prompt = prompt_ids(tokenizer, messages) if messages else [tokenizer.bos_token_id]
        tokenized.append(TokenizedSample(row_id, [*prompt, *completion_ids(tokenizer, completion)],
                                         len(prompt)))
        context.progress.advance(1)
    packs, too_long = pack_samples(tokenized, pack_length, tokenizer.pad_token_id, context.seed)
    pq.write_table(pa.Table.from_pylist([vars(p) for p in packs], schema=PACKS), path, compression="zstd")
    tokens = sum(len(sample.input_ids) for sample in tokenized if len(sample.input_ids) <= pack_length)
    if too_long:
        context.progress.note(f"{len(too_long)} of {len(rows)} samples are longer than pack_length {pack_length} "
                              "and were left out")
    fill = tokens / max(1, len(packs) * pack_length)
    return StageResult(counts={"packs": len(packs), "tokens": tokens, "too_long": len(too_long)},
                       metrics={"fill": fill}, key_metric="fill")
