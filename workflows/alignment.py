"""Stages that train the policy on the curated set: SFT, preference data, reward model, GRPO on all domains."""

from __future__ import annotations

import json
import random

from pipeline.records import Problem, Sample, Status, content_id, read_table
from pipeline.stage import StageContext, StageError, StageResult
from workflows.data import base_checkpoint, load_problems, write_packs
from workflows.expert import run_grpo, self_judge
from workflows.inference import open_model

HELDOUT_SHARE = 10  # one problem in so many calibrates the judge's matching and is not trained on
MATCHES_CALIBRATED = 1000


def sft(context: StageContext) -> StageResult:
    """2 epochs over the packed set, cosine schedule (section 5.1)."""
    from rl.engine import make_room
    from sft.trainer import train_sft

    start = base_checkpoint(context)
    make_room(start)
    metrics = train_sft(context.config["sft"], start=start,
                        packs=context.inputs["pack"] / "packs", out=context.out, work=context.work,
                        seed=context.seed, dtype=context.config["model"].dtype,
                        precision=context.config["model"].precision, progress=context.progress)
    return StageResult(metrics=metrics, key_metric="loss")


def preference(context: StageContext) -> StageResult:
    """Two answers a problem from the SFT model, judged by it in both orders; clear cases become training data."""
    from distill.generation import Order, samples_of
    from distill.preference import keep_pair, pairs_of
    from distill.prompts import prompt_messages

    config = context.config["preference"]
    model = open_model(context.inputs["sft"] / "checkpoint", context.config["model"], context.config["engine"],
                       context.seed)
    problems = [p for p in load_problems(context, "preference") if p.check.kind == "principles"]
    problems = problems[:config.pairs + config.heldout_pairs]
    samples = samples_of([Order(p, "original", prompt_messages(p, "original"), 2) for p in problems],
                         generator=model.generator({"temperature": config.temperature,
                                                    "max_tokens": config.max_tokens}),
                         log_path=context.work / "requests.jsonl", seed=context.seed, progress=context.progress)
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
    from distill.matching import match_demonstration
    from distill.preference import labelled, training_rows
    from evaluation.calibration import calibrate, calibrate_match, clear_cases
    from policy.tokenizer import load_tokenizer
    from rl.engine import make_room
    from sft.trainer import train_sft

    config = context.config["reward_model"]
    start = context.inputs["sft"] / "checkpoint"
    make_room(start)
    problems = {problem.id: problem for problem in load_problems(context)}
    pairs = _pairs(context)
    rows = training_rows([pair for pair in pairs if pair["split"] == "train" and pair["reason"] is None], problems)
    cases, heldout_cases = _match_cases(context, problems)
    rows += [match_demonstration(*case) for case in cases]
    packed = write_packs(context, load_tokenizer(start), rows, config.train.pack_length, context.work / "packs.parquet")
    metrics = train_sft(config.train, start=start, packs=context.work / "packs.parquet", out=context.out,
                        work=context.work, seed=context.seed, dtype=context.config["model"].dtype,
                        precision=context.config["model"].precision, progress=context.progress)
    model = open_model(context.out / "checkpoint", context.config["model"], context.config["engine"], context.seed)
    judge = model.judge(context.seed)
    calibration, canaries = {}, []
    if "preference" in context.inputs:
        heldout, truth = labelled([pair for pair in pairs if pair["split"] == "heldout"], problems)
        calibration |= calibrate(judge, heldout, truth)
        canaries = clear_cases(judge, heldout)
    if heldout_cases:
        calibration |= calibrate_match(judge, heldout_cases)
    (context.out / "calibration.json").write_text(json.dumps(calibration, indent=2))
    (context.out / "canaries.json").write_text(json.dumps([[problem.id, text, status] for problem, text, status in
                                                           canaries], indent=2))
    return StageResult(counts={"judgements": len(rows), **packed.counts, "heldout_pairs": calibration.get("n", 0)},
                       metrics={**metrics, **{f"calibration_{key}": value for key, value in calibration.items()
                                              if isinstance(value, int | float)}},
                       key_metric="calibration_accuracy" if "accuracy" in calibration else "calibration_match_accuracy")


def _pairs(context: StageContext) -> list[dict]:
    """The judged pairs; none where no domain is judged by principles."""
    if "preference" not in context.inputs:
        return []
    return [json.loads(line) for line in (context.inputs["preference"] / "pairs.jsonl").read_text().splitlines()]


def _match_cases(context: StageContext, problems: dict[str, Problem]) -> tuple[list, list]:
    """Comparisons to train on and, of other problems, to calibrate with; none where no problem is judged by match."""
    from distill.matching import verified_cases, worked_cases

    if not any(problem.check.kind == "match" for problem in problems.values()):
        return [], []
    samples = read_table(context.inputs["verify"] / "samples", Sample)
    worked = [problem for problem in problems.values() if problem.split == "sft"]
    heldout = {id_ for id_ in problems if int(content_id(id_, "match")[:8], 16) % HELDOUT_SHARE == 0}
    sides = []
    for side, count in ((False, context.config["reward_model"].match_rows // 2), (True, MATCHES_CALIBRATED // 2)):
        verified = [sample for sample in samples if (sample.problem_id in heldout) == side]
        own = worked_cases([problem for problem in worked if (problem.id in heldout) == side])
        sides.append(verified_cases(verified, problems, count, context.seed) + own[:count])
    if not all(sides):
        raise StageError("reward-model: a domain is judged by match, and there is nothing to learn matching from; give "
                         "its rows worked answers, or add a domain with references that a rule checks")
    return sides[0], sides[1]


def rl(context: StageContext) -> StageResult:
    """GRPO on all domains: rule rewards where checkable, a judge elsewhere (section 5.2, 5.4.2)."""
    from rewards.judge import Judges

    start, feedback = context.inputs["sft"] / "checkpoint", context.config["feedback"]
    problems = load_problems(context, "rl")
    by_feedback = {}
    if "reward_model" in feedback.values():
        _refuse_weak(context, {problem.check.kind for problem in problems
                               if feedback.get(problem.domain) == "reward_model"})
        config = context.config["reward_model"]
        model = open_model(context.inputs["reward-model"] / "checkpoint", context.config["model"],
                           context.config["engine"], context.seed, role="judge")
        by_id = {problem.id: problem for problem in load_problems(context, "preference")}
        rows = json.loads((context.inputs["reward-model"] / "canaries.json").read_text())
        # as it was calibrated: one greedy vote
        model.judge(context.seed).run_canaries([(by_id[id_], text, Status(status)) for id_, text, status in rows])
        by_feedback["reward_model"] = model.judge(context.seed, votes=config.votes, max_tokens=config.max_tokens)
    if "self" in feedback.values():
        by_feedback["self"] = self_judge(context, start, "self")
    judges = Judges({domain: by_feedback[kind] for domain, kind in feedback.items()}) if feedback else None
    return run_grpo(context, start, problems, judges)


def _refuse_weak(context: StageContext, kinds: set[str]) -> None:
    """Raises StageError where the reward model does worse on held-out judgements than a reward may."""
    calibration = json.loads((context.inputs["reward-model"] / "calibration.json").read_text())
    floor = context.config["reward_model"].min_accuracy
    for kind, key, count in (("principles", "accuracy", "n"), ("match", "match_accuracy", "match_n")):
        found = calibration.get(key)
        if kind in kinds and (found is None or found < floor):
            raise StageError(f"rl: the reward model judges {found} of {calibration.get(count, 0)} held-out cases right "
                             f"({kind}), below reward_model.min_accuracy {floor:g}; a weak judge is rewarded noise. "
                             "Train it longer or on more cases, or lower the bound")
