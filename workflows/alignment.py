"""Stages that train the policy on the curated set: SFT, preference data, reward model, GRPO on all domains."""

from __future__ import annotations

import json
import random

from pipeline.stage import StageContext, StageError, StageResult
from workflows.data import load_problems, write_packs
from workflows.expert import run_grpo
from workflows.inference import open_model


def sft(context: StageContext) -> StageResult:
    """2 epochs over the packed set, cosine schedule (section 5.1)."""
    from rl.engine import make_room
    from sft.trainer import train_sft

    start = context.inputs["base"] / "checkpoint"
    make_room(start)
    metrics = train_sft(context.config["sft"], start=start,
                        packs=context.inputs["pack"] / "packs.parquet", out=context.out, work=context.work,
                        seed=context.seed, dtype=context.config["model"].dtype, progress=context.progress)
    return StageResult(metrics=metrics, key_metric="loss")


def preference(context: StageContext) -> StageResult:
    """Two answers a problem from the SFT model, judged by it in both orders; clear cases become training data."""
    from distill.generation import Order, generate
    from distill.preference import keep_pair, pairs_of
    from distill.prompts import prompt_messages

    config = context.config["preference"]
    model = open_model(context.inputs["sft"] / "checkpoint", context.config["model"], context.config["engine"],
                       context.seed)
    problems = [p for p in load_problems(context, "preference") if p.check.kind == "principles"]
    problems = problems[:config.pairs + config.heldout_pairs]
    if len(problems) < 2:
        raise StageError("preference: no judged problems in the preference split (domains.NAME.splits.preference)")
    samples = generate([Order(p, "original", prompt_messages(p, "original"), 2) for p in problems],
                       sampler=model.sampler(config.temperature, config.max_tokens), encode=model.encode,
                       decode=model.decode, checkpoint=model.digest, log_path=context.work / "requests.jsonl",
                       sampling={"temperature": config.temperature, "max_tokens": config.max_tokens},
                       shard_prompts=512, seed=context.seed, progress=context.progress)
    pairs, lost = pairs_of(problems, samples)
    judge = model.judge(context.seed, temperature=config.temperature)
    context.progress.start(len(pairs), "pairs")
    # a random subset is held out before anything is known of the judgements
    heldout = set(random.Random(context.seed).sample(range(len(pairs)), min(config.heldout_pairs, len(pairs) // 2)))
    kept, rows = 0, []
    for start in range(0, len(pairs), 64):
        part = pairs[start:start + 64]
        compared = judge.compare([pair.problem for pair in part], [pair.a for pair in part],
                                 [pair.b for pair in part], config.votes)
        for offset, (pair, comparison) in enumerate(zip(part, compared, strict=True)):
            reason = keep_pair(pair, comparison, config.min_gap)
            split = "heldout" if start + offset in heldout else "train"
            kept += reason is None and split == "train"
            lost[reason or "kept"] = lost.get(reason or "kept", 0) + 1
            rows.append({"problem_id": pair.problem.id, "a": pair.a, "b": pair.b, "split": split, "reason": reason,
                         "score_a": comparison.score_a, "score_b": comparison.score_b,
                         "consistent": comparison.consistent, "outputs": list(comparison.outputs)})
        context.progress.advance(len(part))
    if not kept:
        raise StageError(f"preference: no pair was judged clearly ({lost}); lower preference.min_gap, or train the SFT "
                         "model to judge (its share of judged samples)")
    (context.out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parsed = sum(row["score_a"] is not None for row in rows)
    return StageResult(counts={"pairs": len(rows), "train_kept": kept, "heldout": len(heldout), "by_reason": lost},
                       metrics={"kept_share": kept / max(1, len(rows) - len(heldout)),
                                "consistency": sum(row["consistent"] for row in rows) / max(1, parsed),
                                "load_logprob_error": model.logprob_error}, key_metric="kept_share")


def reward_model(context: StageContext) -> StageResult:
    """Train the judge from the SFT checkpoint on judgements with their reasoning, then calibrate it."""
    from distill.preference import labelled, training_rows
    from evaluation.calibration import calibrate
    from policy.tokenizer import load_tokenizer
    from rl.engine import make_room
    from sft.trainer import train_sft

    config = context.config["reward_model"]
    start = context.inputs["sft"] / "checkpoint"
    make_room(start)
    problems = {problem.id: problem for problem in load_problems(context, "preference")}
    pairs = [json.loads(line) for line in (context.inputs["preference"] / "pairs.jsonl").read_text().splitlines()]
    rows = training_rows([pair for pair in pairs if pair["split"] == "train" and pair["reason"] is None], problems)
    packed = write_packs(context, load_tokenizer(start), rows, config.train.pack_length, context.work / "packs.parquet")
    metrics = train_sft(config.train, start=start, packs=context.work / "packs.parquet", out=context.out,
                        work=context.work, seed=context.seed, dtype=context.config["model"].dtype,
                        progress=context.progress)
    model = open_model(context.out / "checkpoint", context.config["model"], context.config["engine"], context.seed)
    judge = model.judge(context.seed)
    calibration = calibrate(judge, *labelled([pair for pair in pairs if pair["split"] == "heldout"], problems))
    (context.out / "calibration.json").write_text(json.dumps(calibration, indent=2))
    return StageResult(counts={"judgements": len(rows), **packed.counts, "heldout_pairs": calibration["n"]},
                       metrics={**metrics, **{f"calibration_{key}": value for key, value in calibration.items()
                                              if isinstance(value, int | float)}},
                       key_metric="calibration_accuracy")


def rl(context: StageContext) -> StageResult:
    """GRPO on all domains: rule rewards where checkable, the generative reward model elsewhere (section 5.2)."""
    judge = None
    if "reward-model" in context.inputs:
        folder, config = context.inputs["reward-model"], context.config["reward_model"]
        calibration = json.loads((folder / "calibration.json").read_text())
        if calibration["accuracy"] is None or calibration["accuracy"] < config.min_accuracy:
            raise StageError(f"rl: the reward model ranks {calibration['accuracy']} of {calibration['n']} held-out "
                             f"pairs right, below reward_model.min_accuracy {config.min_accuracy:g}; a weak judge is "
                             "rewarded noise. Train it longer or on more pairs, or lower the bound")
        model = open_model(folder / "checkpoint", context.config["model"], context.config["engine"], context.seed,
                           role="judge")
        judge = model.judge(context.seed, votes=config.votes, max_tokens=config.max_tokens,
                            temperature=0.0 if config.votes == 1 else 1.0)
    return run_grpo(context, context.inputs["sft"] / "checkpoint", load_problems(context, "rl"), judge)
