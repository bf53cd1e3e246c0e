"""From verified candidates to packs: time, memory, what was found of what was planted, what 20 kills change.

    python benchmarks/sft_set.py [--rows 300000 1000000 3000000] [--kills 20] [--small] [--json FILE] [--folder DIR]

The stages reject, curate and pack run as in any run, on synthetic candidates: lognormal lengths with a mean of
1.6 kB, verdicts included, 5 % near duplicates (0.3 to 1 % of the words changed), 1 % with 13 words of a held-out
problem. On the fewest rows the same job is done with `datasets.map` and `filter` on 2 processes, and its reading,
filtering, sorting and writing alone by one polars script. Memory is the sum over all processes (PSS). Half of the
candidates become samples.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from figures import Row, report

from pipeline.records import SCHEMAS, Problem, Sample
from pipeline.stage import Stage, StageContext, StageResult

DOMAINS = {"math": 0.3, "code": 0.3, "logic": 0.15, "writing": 0.25}
SAMPLES = 4  # of a problem in one form
CORRECT = 0.75
MEAN_WORDS, SPREAD = 205, 0.8  # of the lognormal; words have 5.5 characters and a space
PROMPT_WORDS = 40
NEAR, CONTAMINATED = 0.05, 0.01
PART_ROWS = 25_000
HELDOUT = 2000
PACK_LENGTH = 4096


def vocabulary() -> np.ndarray:
    rng = np.random.default_rng(7)
    lengths = rng.integers(2, 10, 60_000)
    letters = rng.integers(97, 123, lengths.sum(), dtype=np.uint8).tobytes().decode()
    ends = np.cumsum(lengths)
    found = sorted({letters[end - n:end] for end, n in zip(ends, lengths, strict=True)})
    return rng.permutation(np.array(found, dtype=object))


def draw_words(rng: np.random.Generator, shape: int | tuple[int, int], count: int) -> np.ndarray:
    """Places in the vocabulary, few of them often and most seldom, as in language."""
    return (count * rng.random(shape) ** 6).astype(int)


def heldout_words() -> np.ndarray:
    return draw_words(np.random.default_rng(8), (HELDOUT, 60), 40_000)


def make_part(number: int, rows: int, folder: Path) -> dict[str, list]:
    """Write one part of candidates; returns its problems, and what was planted."""
    rng, words, held = np.random.default_rng(1000 + number), vocabulary(), heldout_words()
    groups = -(-rows // SAMPLES)
    names = list(DOMAINS)
    chosen = rng.choice(len(names), -(-groups // 2), p=list(DOMAINS.values()))
    problem_ids = [f"{value:016x}" for value in rng.integers(0, 2**64, len(chosen), dtype=np.uint64).tolist()]
    prompts = [" ".join(words[draw_words(rng, PROMPT_WORDS, len(words))]) for _ in chosen]
    lengths = np.clip(rng.lognormal(np.log(MEAN_WORDS) - SPREAD**2 / 2, SPREAD, rows), 5, 6000).astype(int)
    ids = rng.integers(0, 2**64, rows, dtype=np.uint64).tolist()
    correct, luck = rng.random(rows) < CORRECT, rng.random(rows)
    columns: dict[str, list] = {name: [] for name in SCHEMAS[Sample].names}
    kept_words: dict[tuple[int, int], list[tuple[str, str, np.ndarray]]] = {}
    planted: list[tuple[str, str, str]] = []  # id, kind, of what
    for row in range(rows):
        group, problem = row // SAMPLES, row // SAMPLES // 2
        form = group % 2
        name, domain = f"{ids[row]:016x}", int(chosen[problem])
        body = draw_words(rng, lengths[row], len(words))
        before, prompt = kept_words.setdefault((domain, form), []), prompts[problem]
        if luck[row] < NEAR and before:
            source, prompt, body = before[rng.integers(len(before))]
            body = body.copy()
            changes = round(len(body) * rng.uniform(0.003, 0.01))
            places = rng.integers(0, len(body), changes) if changes and len(body) > 120 else [len(body) - 1]
            body[places] = rng.integers(0, len(words), len(places))
            planted.append((name, "near", source))
        elif luck[row] < NEAR + CONTAMINATED:
            of = rng.integers(HELDOUT)
            start, at = rng.integers(0, 60 - 13), rng.integers(0, len(body))
            body = np.concatenate([body[:at], held[of, start:start + 13], body[at:]])
            planted.append((name, "contaminated", f"{of:016x}"))
        elif len(body) > 40 and len(before) < 200:
            before.append((name, prompt, body))
        text = " ".join(words[body])
        messages = [{"role": "user", "content": prompt}]
        if form:
            messages.insert(0, {"role": "system", "content": "Think step by step, check your work, then answer."})
            text = f"<think>\n{text}\n</think>\nThe answer is {row}."
        for key, value in (("id", name), ("problem_id", problem_ids[problem]), ("domain", names[domain]),
                           ("form", ("original", "reasoning")[form]), ("messages", messages), ("completion", text),
                           ("checkpoint", "c0ffee"), ("sampling", '{"temperature": 1.0}'), ("finish_reason", "stop"),
                           ("tokens", len(body) * 4 // 3), ("provenance", "{}"),
                           ("verdict", {"status": "correct" if correct[row] else "wrong", "score": float(correct[row]),
                                        "reason": "equal" if correct[row] else "different", "verifier": "math",
                                        "version": "1", "seconds": 0.01, "evidence": ""})):
            columns[key].append(value)
    file = folder / f"verify/samples/part-{number:05}.parquet"
    pq.write_table(pa.Table.from_pydict(columns, schema=SCHEMAS[Sample]), file, compression="zstd", compression_level=1)
    problems = [_problem(*row) for row in zip(problem_ids, (names[d] for d in chosen), prompts, strict=True)]
    pq.write_table(pa.Table.from_pylist(problems, schema=SCHEMAS[Problem]), folder / f"problems/{number:05}.parquet")
    return {"planted": planted}


def _problem(name: str, domain: str, prompt: str, split: str = "sft") -> dict:
    return {"id": name, "domain": domain, "skill": "synthetic", "messages": [{"role": "user", "content": prompt}],
            "check": {"kind": "math", "reference": "1", "principles": []}, "source": "synthetic", "split": split}


def make_candidates(folder: Path, rows: int) -> None:
    """folder/verify, folder/problem-table, folder/base with a tokenizer, folder/planted.parquet."""
    from policy.tokenizer import train_tokenizer

    shutil.rmtree(folder, ignore_errors=True)
    for name in ("verify/samples", "problems"):
        (folder / name).mkdir(parents=True)
    sizes = [min(PART_ROWS, rows - start) for start in range(0, rows, PART_ROWS)]
    with ProcessPoolExecutor(2) as pool:
        made = list(pool.map(make_part, range(len(sizes)), sizes, [folder] * len(sizes)))
    words = vocabulary()
    held = [_problem(f"{number:016x}", "math", " ".join(words[row]), "heldout")
            for number, row in enumerate(heldout_words())]
    (folder / "problem-table.tmp").mkdir()
    with pq.ParquetWriter(folder / "problem-table.tmp/problems.parquet", SCHEMAS[Problem]) as writer:
        writer.write_table(pa.Table.from_pylist(held, schema=SCHEMAS[Problem]))
        for file in sorted((folder / "problems").glob("*")):
            writer.write_table(pq.read_table(file))
    shutil.rmtree(folder / "problems")
    planted = [row for part in made for row in part["planted"]]
    pl.DataFrame(planted, schema=["id", "kind", "of"], orient="row").write_parquet(folder / "planted.parquet")
    rng = np.random.default_rng(0)
    texts = [" ".join(words[draw_words(rng, 200, len(words))]) for _ in range(2000)]
    train_tokenizer(texts, 16_000, 2**20).save_pretrained(folder / "base/checkpoint")
    (folder / "problem-table.tmp").rename(folder / "problem-table")  # last: all is there


def _linked(context: StageContext) -> StageResult:
    """The stages before rejection: what was made ready, linked into the run."""
    shutil.copytree(context.config["from"], context.out, copy_function=os.link, dirs_exist_ok=True)
    return StageResult(counts={})


def stages(candidates: Path, total: int) -> list[Stage]:
    from pipeline.recipe import CurateConfig, RejectConfig
    from workflows import sft_set

    ready = [Stage(name, _linked, {"from": str(candidates / folder)}) for name, folder in
             (("problems", "problem-table"), ("verify", "verify"), ("base", "base"))]
    return [
        *ready,
        Stage("reject", sft_set.reject, {"reject": RejectConfig(keep=3), "judged": [], "principled": []}, ("verify",)),
        Stage("curate", sft_set.curate, {"curate": CurateConfig(total=total, quotas=DOMAINS),
                                         "licenses": dict.fromkeys(DOMAINS, "cc0-1.0")}, ("problems", "reject")),
        Stage("pack", sft_set.pack, {"pack_length": PACK_LENGTH, "judged": []}, ("problems", "base", "curate"))]


def run_here(candidates: Path, run_dir: Path, total: int) -> None:
    """What the measured process does: the project's own runner on these stages."""
    from pipeline import runner
    from pipeline.recipe import Recipe

    recipe = Recipe.model_validate({
        "name": "sft-set", "model": {"source": {"type": "tiny"}, "dtype": "float32"},
        "domains": {"math": {"source": {"type": "generated", "generator": "math"}, "splits": {"sft": 4}}}})
    summary = runner.run(recipe, stages(candidates, total), run_dir)
    (run_dir / "seconds.json").write_text(json.dumps(summary.ran))


class PeakMemory(threading.Thread):
    """The most that a process and all it started held together, in bytes (PSS), looked at twice a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.running = psutil.Process(pid), 0, True
        self.start()

    def run(self) -> None:
        while self.running:
            total = 0
            try:
                for process in [self.process, *self.process.children(recursive=True)]:
                    try:
                        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                    except OSError:
                        continue
                    total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
            except psutil.Error:
                return
            self.peak = max(self.peak, total)
            time.sleep(0.5)

    def stop(self) -> int:
        self.running = False
        return self.peak


def command(*words: object) -> list[str]:
    return [sys.executable, __file__, *map(str, words)]


def measured(words: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of a command."""
    began = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL,
                               env=os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"})
    memory = PeakMemory(process.pid)
    if process.wait():
        raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}")
    return time.monotonic() - began, memory.stop() / 2**30


def artifact(run_dir: Path, stage: str) -> Path:
    return next((run_dir / "stages" / stage).iterdir())


def content_hash(run_dir: Path) -> str:
    """Of every file of the set and its packs."""
    digest = hashlib.sha256()
    for folder in (artifact(run_dir, "curate"), artifact(run_dir, "pack")):
        for path in sorted(folder.rglob("*.parquet")):
            digest.update(str(path.relative_to(folder)).encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def found_rows(candidates: Path, run_dir: Path, label: str) -> list[Row]:
    """Recall and precision of what was planted and came as far as curation."""
    planted = pl.read_parquet(candidates / "planted.parquet")
    arrived = pl.read_parquet(artifact(run_dir, "reject") / "samples/*.parquet", columns=["id"])["id"]
    dropped = pl.read_parquet(artifact(run_dir, "curate") / "dropped/*.parquet", columns=["id", "reason", "other"])
    overlap = set(dropped.filter(pl.col("reason").str.starts_with("heldout"))["id"])
    near_rows = dropped.filter(pl.col("reason") == "near_duplicate")
    arrived_ids = set(arrived)
    contaminated = {row for row in planted.filter(pl.col("kind") == "contaminated")["id"] if row in arrived_ids}
    copies = planted.filter(pl.col("kind") == "near")
    family = dict(zip(copies["id"], copies["of"], strict=True))  # copies of one text are copies of each other
    members: dict[str, int] = {}
    for row in [*family, *set(family.values())]:
        if row in arrived_ids and row not in overlap:
            members[family.get(row, row)] = members.get(family.get(row, row), 0) + 1
    wanted = sum(count - 1 for count in members.values())
    right = sum(family.get(row, row) == family.get(other, other)
                for row, other in zip(near_rows["id"], near_rows["other"], strict=True))
    return [(f"{label}: near duplicates found", 100 * right / max(1, wanted), f"% of {wanted:,}"),
            (f"{label}: right among those found", 100 * right / max(1, len(near_rows)), f"% of {len(near_rows):,}"),
            (f"{label}: contaminated found", 100 * len(contaminated & overlap) / max(1, len(contaminated)),
             f"% of {len(contaminated):,}"),
            (f"{label}: clean taken for contaminated", len(overlap - contaminated), "samples")]


def our_rows(candidates: Path, run_dir: Path, rows: int, label: str) -> list[Row]:
    shutil.rmtree(run_dir, ignore_errors=True)
    seconds, memory = measured(command("--run", candidates, run_dir, rows // 2))
    each = json.loads((run_dir / "seconds.json").read_text())
    counts = {stage: json.loads((artifact(run_dir, stage) / "manifest.json").read_text())
              for stage in ("curate", "pack")}
    return [(f"{label}: in all", seconds, "s"), (f"{label}: a row", 1e6 * seconds / rows, "us"),
            *((f"{label}: {stage}", each[stage], "s") for stage in ("reject", "curate", "pack")),
            (f"{label}: peak memory of all processes", memory, "GiB"),
            (f"{label}: samples", counts["curate"]["counts"]["out"], ""),
            (f"{label}: fill of packs", 100 * counts["pack"]["metrics"]["fill"], "%"),
            *found_rows(candidates, run_dir, label)]


def killed_rows(candidates: Path, run_dir: Path, rows: int, kills: int, seconds: float, label: str) -> list[Row]:
    """The same with `kills` kills -9 at random moments, of the driver and of processes that work for it in turn."""
    rng = random.Random(0)
    unbroken, killed = content_hash(run_dir), run_dir.with_name("killed")
    shutil.rmtree(killed, ignore_errors=True)
    began, done, process = time.monotonic(), 0, None
    while True:
        if process is None:
            process = subprocess.Popen(command("--run", candidates, killed, rows // 2), stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            while process.poll() is None and not any((killed / "work").glob("*/work")):
                time.sleep(0.05)  # Ray is starting
        try:
            code = process.wait(rng.uniform(0, 0.1) * seconds if done < kills else None)
        except subprocess.TimeoutExpired:
            workers = [child for child in psutil.Process(process.pid).children(recursive=True) if _works(child)]
            victim = rng.choice(workers) if done % 2 and workers else process
            victim.kill()
            done += 1
            if victim is not process:
                continue
            code = process.wait()
        if code == 0:
            break
        process = None
    return [(f"{label}: kills", done, "times"), (f"{label}: in all with kills", time.monotonic() - began, "s"),
            (f"{label}: same set and packs", float(content_hash(killed) == unbroken), "")]


def _works(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith(("ray::_unit", "ray::StageWorker"))
    except (psutil.Error, IndexError):
        return False


def planning_rows(count: int) -> list[Row]:
    """The plan of packs, on one core, beside TRL's on the same lengths."""
    from datasets import Dataset
    from trl import pack_dataset

    from sft.packing import shuffled_plan

    rows: list[Row] = []
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(430) - 0.32, 0.8, count), 8, 40_000).astype(int)
    for length in (4096, 8192, 32768):
        label, fitting = f"plan of {count:,}, {length}", lengths[lengths <= length]
        began = time.process_time()
        packs = shuffled_plan(lengths.tolist(), length, 0)
        rows += [(f"{label}: time", time.process_time() - began, "s"),
                 (f"{label}: fill", 100 * fitting.sum() / (len(packs) * length), "%"),
                 (f"{label}: too long, counted", len(lengths) - len(fitting), "samples")]
    few = lengths[:max(2000, count // 15)]
    table = pa.table({"input_ids": pa.ListArray.from_arrays(
        np.concatenate([[0], np.cumsum(few)]).astype(np.int32), pa.array(np.zeros(few.sum(), dtype=np.int32)))})
    began = time.process_time()
    packed = pack_dataset(Dataset(table), 4096, "bfd")
    rows += [(f"TRL's packs of {len(few):,}, 4096: time", time.process_time() - began, "s"),
             (f"TRL's packs of {len(few):,}, 4096: fill", 100 * sum(map(len, packed["input_ids"])) /
              (len(packed) * 4096), "%"),
             (f"TRL's packs of {len(few):,}, 4096: cut in silence", int((few > 4096).sum()), "samples")]
    return rows


def with_datasets(candidates: Path, out: Path, total: int) -> None:
    """The same job as one would write it with datasets: rules, shortest, MinHash, 13-grams, quotas, tokens, packs."""
    from datasets import load_dataset
    from rensa import RMinHashDeduplicator
    from trl import pack_dataset

    from policy.tokenizer import load_tokenizer

    table = load_dataset("parquet", data_files=str(candidates / "verify/samples/*.parquet"), split="train",
                         cache_dir=str(out / "cache"))
    table = table.filter(_is_fit, num_proc=2)
    keys = table.select_columns(["problem_id", "form", "tokens", "id"]).to_pandas()
    best = keys.sort_values(["problem_id", "form", "tokens", "id"]).groupby(["problem_id", "form"]).head(3)
    table = table.select(sorted(best.index))
    held = pq.read_table(candidates / "problem-table/problems.parquet", filters=[("split", "=", "heldout")])
    marked = {gram for row in held["messages"].to_pylist() for gram in _grams(row[0]["content"], 13)}
    table = table.filter(partial(_is_clean, marked=marked), num_proc=2)
    near = {(domain, form): RMinHashDeduplicator(threshold=0.85, num_perm=128, use_lsh=True)
            for domain in DOMAINS for form in ("original", "reasoning")}
    table = table.filter(lambda row: near[row["domain"], row["form"]].add_pairs(
        [(row["id"], _grams(_text(row), 5))])[0])
    table, shares = table.shuffle(seed=0), {name: int(total * share) for name, share in DOMAINS.items()}
    chosen = []
    for row, domain in enumerate(table["domain"]):
        if shares[domain]:
            shares[domain] -= 1
            chosen.append(row)
    table = table.select(chosen)
    table.to_parquet(out / "set.parquet")
    tokens = table.map(partial(_tokens, tokenizer=load_tokenizer(candidates / "base/checkpoint")), num_proc=2,
                       remove_columns=table.column_names)
    tokens = tokens.filter(lambda row: len(row["input_ids"]) <= PACK_LENGTH, num_proc=2)
    pack_dataset(tokens, PACK_LENGTH, "bfd").to_parquet(out / "packs.parquet")


def _is_fit(row: dict) -> bool:
    from distill.rejection import _unreadable

    return (row["verdict"]["status"] == "correct" and row["finish_reason"] == "stop" and row["tokens"] <= 8192
            and _unreadable(row["form"], row["messages"], row["completion"]) is None)


def _text(row: dict) -> str:
    return f"{row['messages'][-1]['content']} {row['completion']}".lower()


def _grams(text: str, n: int) -> list[str]:
    words = text.split()
    return [" ".join(words[start:start + n]) for start in range(len(words) - n + 1)]


def _is_clean(row: dict, marked: set[str]) -> bool:
    return marked.isdisjoint(_grams(_text(row), 13))


def _tokens(row: dict, tokenizer) -> dict:
    from policy.tokenizer import completion_ids, prompt_ids

    prompt, completion = prompt_ids(tokenizer, row["messages"]), completion_ids(tokenizer, row["completion"])
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def with_polars(candidates: Path, out: Path, total: int) -> None:
    """The floor: read, filter by columns, shortest, distinct, quotas, write. Nothing that looks into a text."""
    verdict = pl.col("verdict").struct.field("status")
    table = pl.scan_parquet(candidates / "verify/samples/*.parquet").filter(
        verdict == "correct", pl.col("finish_reason") == "stop", pl.col("tokens") <= 8192)
    best = (table.select("id", "problem_id", "form", "tokens", "domain", pl.col("completion").hash()).collect()
            .sort("tokens", "id").unique(["problem_id", "form", "completion"], keep="first", maintain_order=True)
            .group_by("problem_id", "form", maintain_order=True).head(3))
    chosen = pl.concat([best.filter(pl.col("domain") == name).sample(fraction=1, shuffle=True, seed=0)
                        .head(int(total * share)) for name, share in DOMAINS.items()])
    table.join(chosen.lazy().select("id"), on="id", how="semi").sink_parquet(out / "set.parquet",
                                                                              compression="zstd", compression_level=1)


def peer_rows(candidates: Path, folder: Path, rows: int, label: str) -> list[Row]:
    found: list[Row] = []
    for name, option in (("datasets, 2 processes", "--with-datasets"), ("one polars script, the floor",
                                                                       "--with-polars")):
        out = folder / option.strip("-")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        seconds, memory = measured(command(option, candidates, out, rows // 2))
        found += [(f"{label}: {name}", seconds, "s"), (f"{label}: {name}, memory", memory, "GiB")]
        shutil.rmtree(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[300_000, 1_000_000, 3_000_000])
    parser.add_argument("--kills", type=int, default=20, help="in a second run of the most rows")
    parser.add_argument("--small", action="store_true", help="4,000 rows, 1 kill")
    parser.add_argument("--no-peers", action="store_true", help="without the same job in datasets and polars")
    parser.add_argument("--folder", type=Path, help="for candidates and runs, kept; a temporary one by default")
    parser.add_argument("--json", type=Path)
    for name in ("--run", "--with-datasets", "--with-polars"):
        parser.add_argument(name, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for function, words in ((run_here, arguments.run), (with_datasets, arguments.with_datasets),
                            (with_polars, arguments.with_polars)):
        if words:
            function(Path(words[0]), Path(words[1]), int(words[2]))
            return
    sizes, kills = ([4000], 1) if arguments.small else (arguments.rows, arguments.kills)
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.folder or Path(name)
        rows = planning_rows(30_000 if arguments.small else 1_500_000)
        for size in sizes:
            candidates, run_dir, label = folder / f"candidates-{size}", folder / "run", f"{size:,} candidates"
            if not (candidates / "problem-table").is_dir():
                make_candidates(candidates, size)
            rows += our_rows(candidates, run_dir, size, label)
            if size == min(sizes) and not arguments.no_peers:
                rows += peer_rows(candidates, folder, size, label)
            if size == max(sizes) and kills:
                seconds = next(figure for what, figure, _ in rows if what == f"{label}: in all")
                rows += killed_rows(candidates, run_dir, size, kills, seconds, label)
        report(rows, arguments.json)


if __name__ == "__main__":
    main()
