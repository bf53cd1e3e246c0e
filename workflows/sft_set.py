"""Stages that make the SFT set of verified samples: rejection, curation, packs; part by part, whatever its size."""

from __future__ import annotations

import json
import os
import resource
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from distill import curation, rejection, review
from distill.card import dataset_card
from distill.sources import evaluation_texts
from pipeline.parts import PART, map_parts, parts, publish
from pipeline.recipe import RejectConfig
from pipeline.records import SCHEMAS, Problem, Sample
from pipeline.stage import StageContext, StageError, StageResult
from workflows.data import base_checkpoint, load_problems, packed

TOKENS_PER_PART = 2**22
TOKENIZED_ROWS = 2000  # texts whose tokens are held as Python numbers at a time


def reject(context: StageContext) -> StageResult:
    """Best of n: correct, well-formed, concise."""
    config, principled = context.config["reject"], context.config["principled"]
    decisions = review.read_decisions(Path(config.reviews)) if config.reviews else {}
    sources = parts(context.inputs["verify"] / "samples")
    read = map_parts(judge_part, sources, context.work / "reasons", context.progress, config, principled,
                     decisions)
    tables = [pl.read_parquet(folder / "narrow.parquet") for folder in read]
    samples = pl.concat(tables)
    reasons = rejection.choose(samples, config.keep)
    if unknown := len(decisions) - samples["reviewed"].sum():
        context.progress.note(f"{unknown} of {len(decisions)} decisions of {config.reviews} are about samples that are "
                              "not here: they were generated anew")
    funnel = rejection.funnel(samples["domain"], reasons)
    rejection.stop_when_empty(funnel, "rejection", "train the expert longer, sample more or relax reject.max_tokens")
    sizes = [len(table) for table in tables]
    _write_fates(context.work / "fates", sources, sizes, reasons.to_frame("reason").with_columns(
        split=pl.when(pl.col("reason").is_null()).then(pl.lit("samples")).otherwise(pl.lit("rejected"))))
    del tables, samples
    folders = map_parts(split_part, sources, context.work / "split", context.progress, context.work / "fates",
                        ("samples",), "rejected", decisions)
    kept = publish(folders, "samples.parquet", context.out / "samples")
    lost = publish(folders, "rejected.parquet", context.out / "rejected")
    (context.out / "review").mkdir()
    pq.write_table(_review_queue(context, decisions), context.out / "review/queue.parquet")
    return StageResult(counts={"in": kept + lost, "out": kept, "funnel": funnel},
                       metrics={"kept_share": kept / max(1, kept + lost)}, key_metric="kept_share")


def _review_queue(context: StageContext, decisions: dict[str, review.Decision]) -> pa.Table:
    """What a person should look at, of the domains that a judge decides."""
    judged = context.config["judged"]
    if not judged:
        return review.QUEUE.empty_table()
    lost = pl.scan_parquet(context.out / "rejected/*.parquet").filter(pl.col("domain").is_in(judged)).collect()
    return review.queue(context.inputs["verify"] / "samples", lost, context.config["reject"],
                        context.config["principled"], decisions)


def judge_part(part: Path, out: Path, config: RejectConfig, principled: list[str],
               decisions: dict[str, review.Decision]) -> None:
    """Which samples of a part are unfit by themselves, and what deciding about the others takes."""
    frames = []
    for frame in _frames(part, SCHEMAS[Sample].names if decisions else [
            "id", "problem_id", "domain", "form", "messages", "completion", "tokens", "finish_reason", "verdict"]):
        frame = review.apply(frame, decisions)
        frames.append(rejection.narrow(frame, rejection.unfit(frame, config, principled), principled))
    pl.concat(frames).write_parquet(out / "narrow.parquet", compression="lz4")


def _frames(part: Path, columns: list[str], rows: int = 10_000) -> Iterator[pl.DataFrame]:
    """A part in frames of at most `rows` rows; one empty frame of an empty part."""
    file = pq.ParquetFile(part)
    if not file.metadata.num_rows:
        yield pl.DataFrame(pl.from_arrow(file.schema_arrow.empty_table().select(columns)))
    for batch in file.iter_batches(rows, columns=columns):
        yield pl.DataFrame(pl.from_arrow(batch))


def _write_fates(folder: Path, sources: list[Path], sizes: list[int], fates: pl.DataFrame) -> None:
    """A table of (split, reason, ...) for each part, written anew: it follows from what is durable."""
    folder.mkdir(exist_ok=True)
    start = 0
    for source, size in zip(sources, sizes, strict=True):
        fates.slice(start, size).write_parquet(folder / source.name)
        start += size


def split_part(part: Path, out: Path, fates: Path, kept: tuple[str, ...], lost: str,
               decisions: dict[str, review.Decision]) -> None:
    """Rows of a part into the tables that fates/NAME says: whole ones, and of those lost id, domain, form and why."""
    decided = pl.read_parquet(fates / part.name)
    why = [name for name in decided.columns if name != "split"]
    file, start = pq.ParquetFile(part), 0
    writers = {name: pq.ParquetWriter(out / f"{name}.parquet", SCHEMAS[Sample], compression="zstd", compression_level=1)
               for name in kept}
    gone = []
    for batch in file.iter_batches(10_000):
        here = decided.slice(start, len(batch))
        start += len(batch)
        if decisions:
            batch = review.apply(pl.DataFrame(pl.from_arrow(batch)), decisions).to_arrow().cast(
                SCHEMAS[Sample]).combine_chunks().to_batches()[0]
        for name, writer in writers.items():
            writer.write_batch(batch.filter(pa.array((here["split"] == name).to_numpy())))
        rows = pl.DataFrame(pl.from_arrow(batch.select(["id", "domain", "form"]))).with_columns(here.select(why))
        gone.append(rows.filter(here["split"] == lost))
    for writer in writers.values():
        writer.close()
    empty = pl.DataFrame(schema={"id": pl.String, "domain": pl.String, "form": pl.String}).with_columns(
        decided.clear().select(why))
    pl.concat([empty, *gone]).write_parquet(out / f"{lost}.parquet")


def curate(context: StageContext) -> StageResult:
    """Decontaminate against evaluation sets, deduplicate, mix to quotas."""
    config = context.config["curate"]
    sources = parts(context.inputs["reject"] / "samples")
    forbidden = curation.Forbidden.of(load_problems(context, "heldout"), evaluation_texts(config.evaluation_files))
    sketches = map_parts(curation.sketch, sources, context.work / "sketches", context.progress, forbidden)
    choice = curation.Choice([folder / "sketch.parquet" for folder in sketches], config, context.seed)
    decided, quota = choice.decide()
    fates = pl.concat(decided)
    funnel = rejection.funnel(choice.samples["domain"], fates["reason"])
    for domain in quota:
        funnel.setdefault(domain, {"in": 0, "out": 0, "lost": {}})["quota"] = quota[domain]
    needed = {domain: row for domain, row in funnel.items() if row["quota"]["wanted"] or row["out"]}
    rejection.stop_when_empty(needed, "curation", "generate more for it, raise curate.total or set its quota to 0")
    _write_fates(context.work / "fates", sources, choice.sizes, fates)
    del choice, decided, fates
    folders = map_parts(split_part, sources, context.work / "split", context.progress, context.work / "fates",
                        ("train", "validation"), "dropped", {})
    counts = {name: publish(folders, f"{name}.parquet", context.out / "dataset" / name)
              for name in ("train", "validation")}
    publish(folders, "dropped.parquet", context.out / "dropped")
    forms = _count(context.out / "dataset", "form")
    (context.out / "dataset/README.md").write_text(dataset_card(
        context.out / "dataset", context.inputs["problems"] / "problems.parquet",
        _counts(context.inputs["reject"])["funnel"], funnel, context.config["licenses"]))
    return StageResult(counts={"in": sum(row["in"] for row in funnel.values()), "out": sum(counts.values()), **counts,
                               "funnel": funnel, "forms": forms},
                       metrics={"samples": sum(counts.values())}, key_metric="samples")


def _counts(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())["counts"]


def _count(dataset: Path, column: str) -> dict[str, int]:
    return dict(pl.scan_parquet(dataset / "**/*.parquet").group_by(column).len().sort(column).collect().iter_rows())


def pack(context: StageContext) -> StageResult:
    """Tokenise the curated samples, and the judge demonstrations of the corpus, into packs."""
    from distill.judging import judge_demonstrations
    from sft.packing import shuffled_plan

    pack_length = context.config["pack_length"]
    judged: list[Problem] = []
    for domain in context.config["judged"]:
        judged += load_problems(context, "sft", domain)
    demonstrations = judge_demonstrations(judged, context.seed)
    sources = parts(context.inputs["curate"] / "dataset/train")
    samples = sum(pq.read_metadata(source).num_rows for source in sources)
    if demonstrations:
        sources.append(context.work / "demonstrations.parquet")
        pq.write_table(pa.Table.from_pylist(
            [{"id": name, "messages": messages, "completion": text} for name, messages, text in demonstrations],
            schema=pa.schema([SCHEMAS[Sample].field(name) for name in ("id", "messages", "completion")])), sources[-1])
    checkpoint = base_checkpoint(context)
    tokenized = map_parts(tokenize_part, sources, context.work / "tokens", context.progress, checkpoint)
    index = pl.concat([pl.read_parquet(folder / "index.parquet").with_columns(
        file=pl.lit(number, pl.Int32)) for number, folder in enumerate(tokenized)])
    too_long = index.filter(pl.col("length") > pack_length).select("id", "length")
    too_long.write_parquet(context.out / "too_long.parquet")
    plan = shuffled_plan(index["length"].to_numpy(), pack_length, context.seed)
    if not plan:
        raise StageError(f"pack: none of {len(index)} samples fits sft.pack_length {pack_length}; raise it")
    per_part = max(1, TOKENS_PER_PART // pack_length)
    plans = context.work / "plans"
    plans.mkdir(exist_ok=True)
    places = []
    for number, start in enumerate(range(0, len(plan), per_part)):
        chosen = plan[start:start + per_part]
        rows = np.fromiter((row for pack in chosen for row in pack), dtype=np.int64)
        numbers = np.repeat(np.arange(len(chosen)), [len(pack) for pack in chosen])
        places.append(plans / PART.format(number))
        index[rows].with_columns(pack=pl.Series(numbers)).write_parquet(places[-1])
    tokens = int(index["length"].sum() - too_long["length"].sum())
    count = len(plan)
    del index, plan
    folders = map_parts(fill_part, places, context.work / "packs", context.progress, tokenized, checkpoint, pack_length,
                        size=4 * tokens)
    publish(folders, "packs.parquet", context.out / "packs")
    result = packed(context, count, tokens, len(too_long), pack_length)
    result.counts |= {"samples": samples, "judge_demonstrations": len(demonstrations)}
    return result


@lru_cache(1)
def _tokenizer(checkpoint: Path):
    from policy.tokenizer import load_tokenizer

    return load_tokenizer(checkpoint)


def tokenize_part(part: Path, out: Path, checkpoint: Path) -> None:
    """tokens.bin: int32 of all samples, prompt and completion; index.parquet: id, start, length, prompt of each."""
    from policy.tokenizer import encode_samples

    rows, start = [], 0
    with open(out / "tokens.bin", "wb") as file:
        for frame in _frames(part, ["id", "messages", "completion"], TOKENIZED_ROWS):
            encoded = encode_samples(_tokenizer(checkpoint), frame["messages"].to_list(), frame["completion"].to_list())
            for name, (prompt, completion) in zip(frame["id"], encoded, strict=True):
                file.write(array("i", prompt + completion))
                rows.append((name, start, len(prompt) + len(completion), len(prompt)))
                start += rows[-1][2]
    pl.DataFrame(rows, schema={"id": pl.String, "start": pl.Int64, "length": pl.Int32, "prompt": pl.Int32},
                 orient="row").write_parquet(out / "index.parquet")


def fill_part(part: Path, out: Path, tokenized: list[Path], checkpoint: Path, pack_length: int) -> None:
    """packs.parquet of one part of the plan."""
    from sft.packing import TokenizedSample, fill_packs

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a pack may hold samples of any part
    files = [os.open(folder / "tokens.bin", os.O_RDONLY) for folder in tokenized]
    try:
        packs: list[list[TokenizedSample]] = []
        columns = ("pack", "file", "start", "length", "prompt", "id")
        for number, file, start, length, prompt, name in pl.read_parquet(part).select(columns).iter_rows():
            if number == len(packs):
                packs.append([])
            # read, not mapped: pages of a map would count as this process's memory
            raw = os.pread(files[file], 4 * length, 4 * start)
            packs[-1].append(TokenizedSample(name, np.frombuffer(raw, dtype=np.int32), prompt))
        table = fill_packs(packs, pack_length, _tokenizer(checkpoint).pad_token_id)
        pq.write_table(table, out / "packs.parquet", compression="zstd", compression_level=1,
                       row_group_size=max(1, 2**20 // pack_length))
    finally:
        for file in files:
            os.close(file)
