"""Speculative decoding with the MTP module: how many drafts are accepted, and tokens a second with and without.

    python benchmarks/mtp_drafting.py RUN_OR_CHECKPOINT ... [--batches 1 8 128] [--temperatures 0 0.7] [--small]
                                      [--json FILE]

A run directory stands for its SFT and RL checkpoints, asked its held-out problems; a checkpoint folder is asked
generated ones. Two engines, one of which drafts, answer the same requests in turn; speeds are medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import ray
from figures import Row, report

from pipeline.recipe import EngineConfig
from pipeline.records import Problem, read_table
from policy.tokenizer import load_tokenizer, prompt_ids
from rl.engine import Request, RolloutEngine, Sampling, open_engine


def checkpoints(path: Path) -> list[tuple[str, Path]]:
    """(label, folder) of what to measure under `path`. Raises SystemExit when there is nothing."""
    if (path / "config.json").exists():
        return [(path.name, path)]
    found = [(f"{path.name} {stage}", folder) for stage in ("sft", "rl")
             for folder in sorted(path.glob(f"stages/{stage}/*/checkpoint"))]
    if not found:
        raise SystemExit(f"{path}: neither a checkpoint (config.json) nor a run with stages/sft or stages/rl in it")
    return found


def requests(path: Path, folder: Path, count: int) -> list[Request]:
    """Problems of the run's held-out split, or generated ones, as prompts of the checkpoint's tokenizer."""
    tables = sorted(path.glob("stages/problems/*/problems.parquet"))
    if tables:
        problems = [problem for problem in read_table(tables[-1], Problem) if problem.split == "heldout"]
    else:
        from distill.problems import GENERATORS

        problems = list(GENERATORS["math"](count, 0, None))
    random.Random(0).shuffle(problems)
    tokenizer = load_tokenizer(folder)
    return [Request(tuple(prompt_ids(tokenizer, problem.messages)), seed)
            for seed, problem in enumerate(problems[:count])]


def answer(engine: RolloutEngine, asked: Sequence[Request], batch: int, sampling: Sampling) -> tuple[int, float]:
    """Tokens sampled and seconds taken, `batch` requests at a time."""
    began, tokens = time.perf_counter(), 0
    for start in range(0, len(asked), batch):
        tokens += sum(len(found.token_ids) for found in engine.generate(asked[start:start + batch], sampling))
    return tokens, time.perf_counter() - began


def measure(label: str, plain: RolloutEngine, drafting: RolloutEngine, asked: Sequence[Request], batch: int,
            sampling: Sampling, rounds: int) -> list[Row]:
    """Both engines on the same requests, in turn, after a round that is not counted."""
    speeds: tuple[list[float], list[float]] = ([], [])
    before = drafting.draft_counts()
    for turn in range(rounds + 1):
        for engine, side in zip((plain, drafting), speeds, strict=True):
            tokens, seconds = answer(engine, asked, batch, sampling)
            if turn:
                side.append(tokens / seconds)
    drafted, accepted = (now - then for now, then in zip(drafting.draft_counts(), before, strict=True))
    name = f"{label}, temperature {sampling.temperature:g}, batch {batch}"
    without, with_drafts = map(statistics.median, speeds)
    return [(f"{name}: drafts accepted", 100 * accepted / max(1, drafted), "%"),
            (f"{name}: without drafts", without, "tokens/s"), (f"{name}: with drafts", with_drafts, "tokens/s"),
            (f"{name}: with / without", with_drafts / without, "x")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 128], help="requests at a time")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--small", action="store_true", help="the smallest size at which everything runs")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args(arguments)
    rounds, count = (1, 4) if options.small else (3, 128)
    paths = [path.resolve() for path in options.paths]
    found = [(path, *one) for path in paths for one in checkpoints(path)]
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
             runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(["."] + [os.environ.get("PYTHONPATH", "")])}})
    rows: list[Row] = []
    for path, label, folder in found:
        length = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
        plain, drafting = (open_engine(folder, EngineConfig(draft=draft), dtype="float32", max_length=length, seed=0,
                                       role=f"drafts-{draft}") for draft in (False, True))
        asked = requests(path, folder, count)
        for temperature in options.temperatures:
            for batch in options.batches:
                # few at a time take long: a part of the requests is enough
                rows += measure(label, plain, drafting, asked[:max(4, 2 * batch)], batch,
                                Sampling(temperature, length), rounds)
    report(rows, options.json)
    ray.shutdown()


if __name__ == "__main__":
    main()
