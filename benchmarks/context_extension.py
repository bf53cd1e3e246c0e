"""Retrieval beyond the length a model was trained for, before and after its context is extended four times by YaRN.

    python benchmarks/context_extension.py [--small] [--seed N] [--json FILE] [--table FILE]

A DeepSeek-V3-shaped model of two layers learns from nothing to find facts in contexts of 64 tokens. The `extend` stage
then makes it 256, in two phases as the paper's. Beside it stand YaRN without training, and as much training on the
same rows without YaRN. --small is the least training that shows the effect.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

from figures import Row, Silent, report

from distill.needles import needle
from pipeline.recipe import EngineConfig, ExtendConfig, ModelConfig, TinyModel, TrainConfig, YarnConfig
from pipeline.stage import StageContext
from policy.model import new_policy, save_policy
from policy.presets import tiny_config
from policy.tokenizer import train_tokenizer
from sft.trainer import train_sft
from workflows.context import extend, needle_rows, retrieval
from workflows.data import write_packs

SHORT, FACTOR = 64, 4
VOCAB = 400


def schedule(length: int, steps: int, tokens: int, learning_rate: float, muon: float) -> TrainConfig:
    return TrainConfig(max_steps=steps, pack_length=length, batch_tokens=tokens, packs_per_device=tokens // length,
                       learning_rate=learning_rate, min_learning_rate=2e-4, muon_learning_rate=muon, warmup_steps=10,
                       weight_decay=0.0, mtp_lambda=0.0, save_steps=steps)


def train_base(context: StageContext, train: TrainConfig, out: Path) -> None:
    """`out/checkpoint`: a model that finds facts in contexts of `train.pack_length` tokens."""
    rng = Random(context.seed)
    texts = [f"{messages[0]['content']}\n{answer}" for messages, answer in
             (needle(rng, 40, asked=3) for _ in range(200))]
    tokenizer = train_tokenizer(texts, VOCAB, train.pack_length)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = tiny_config(hidden_size=64, layers=2, routed_experts=8, vocab_size=len(tokenizer),
                         max_length=train.pack_length, token_ids=ids)
    save_policy(new_policy(config, context.seed), tokenizer, context.work / "untrained")
    rows = needle_rows(tokenizer, rng, train.pack_length, train.max_steps * train.batch_tokens // train.pack_length)
    write_packs(context, tokenizer, rows, train.pack_length, context.work / "base.parquet")
    train_sft(train, start=context.work / "untrained", packs=context.work / "base.parquet", out=out,
              work=context.work / "base", seed=context.seed, dtype="float32", progress=context.progress)


def unextended(base: Path, length: int, out: Path) -> Path:
    """The base with a longer length in its config and the rotary frequencies as they were."""
    shutil.copytree(base, out)
    config = json.loads((out / "config.json").read_text()) | {"max_position_embeddings": length}
    (out / "config.json").write_text(json.dumps(config))
    return out


def measure(small: bool, seed: int, folder: Path) -> dict:
    """Shares of facts found by length and depth for each model, the tokens each trained on and the seconds it took."""
    base_train = schedule(SHORT, 300, 2048, 2e-3, 0.02) if small else schedule(SHORT, 400, 4096, 2e-3, 0.01)
    phases = tuple(schedule(times * SHORT, 30 if small else 40, 4096, 1e-3, 0.005) for times in (2, FACTOR))
    model = ModelConfig(source=TinyModel(context_length=SHORT), dtype="float32", max_length=FACTOR * SHORT)
    config = {"model": model, "engine": EngineConfig(probe_checkpoints=False),
              "extend": ExtendConfig(yarn=YarnConfig(factor=FACTOR), phases=phases, needle_share=1.0,
                                     needles=20 if small else 40)}
    context = StageContext("extend", config, {"base": folder / "base"}, folder / "out", folder / "work", seed, Silent())
    context.out.mkdir()
    context.work.mkdir()
    began = time.perf_counter()
    train_base(context, base_train, folder / "base")
    seconds = {"base": time.perf_counter() - began}
    began = time.perf_counter()
    extend(context)
    seconds["extend"] = time.perf_counter() - began
    table = json.loads((context.out / "needles.json").read_text())
    plain = unextended(folder / "base/checkpoint", FACTOR * SHORT, folder / "plain")
    for index, phase in enumerate(phases, start=1):
        packs, out = context.work / f"phase-{index}/packs.parquet", folder / f"plain-{index}"
        train_sft(phase, start=plain, packs=packs, out=out, work=context.work / f"plain-{index}", seed=seed,
                  dtype="float32", progress=context.progress)
        plain = out / "checkpoint"
    others = {"YaRN, untrained": context.work / "extended", "plain, trained": plain}
    table |= retrieval(context, others | {"after": context.out / "checkpoint"}, SHORT, FACTOR * SHORT)
    return table | {"seconds": seconds, "tokens": {"base": base_train.max_steps * base_train.batch_tokens,
                                                   "extend": sum(phase.max_steps * phase.batch_tokens
                                                                 for phase in phases)}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="where to write every cell, by length and depth")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        table = measure(options.small, options.seed, Path(folder))
    rows: list[Row] = []
    for name in ("before", "YaRN, untrained", "plain, trained", "after"):
        rows += [(f"{name}: facts found at {length} tokens", 100 * sum(found) / len(found), "%")
                 for length, found in zip(table["lengths"], table[name], strict=True)]
    rows += [(f"{name}: time", seconds, "s") for name, seconds in table["seconds"].items()]
    report(rows, options.json)
    if options.table:
        options.table.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
