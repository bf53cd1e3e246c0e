"""Stages and helpers around the data: problems, the start of post-training, packs of any rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.records import Problem, read_table, write_table
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
    wanted = [(column, "=", value) for column, value in (("split", split), ("domain", domain)) if value is not None]
    return read_table(context.inputs["problems"] / "problems.parquet", Problem, wanted or None)


def base_checkpoint(context: StageContext) -> Path:
    """The model that post-training starts from: with its context extended, where the recipe says so."""
    return context.inputs["extend" if "extend" in context.inputs else "base"] / "checkpoint"


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
