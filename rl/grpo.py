"""Run one GRPO training to its end, from its last checkpoint when there is one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from transformers import TrainerCallback

from pipeline.recipe import GrpoConfig, Precision
from pipeline.records import Rollout, read_table, write_table
from pipeline.stage import Progress, StageError
from policy.adamw import LowPrecisionAdamW, adamw_class
from policy.model import load_policy
from policy.precision import apply_precision
from policy.recompute import recompute
from policy.tokenizer import load_tokenizer
from policy.training import read_curve, torch_threads
from rl.engine import RolloutEngine
from rl.trainer import LEDGER, ROLLOUTS, Prompt, Scorer, VerifiedGRPOTrainer


def train_grpo(config: GrpoConfig, *, start: Path, prompts: Sequence[Prompt], engine: RolloutEngine, scorer: Scorer,
               out: Path, work: Path, seed: int, dtype: str, max_logprob_error: float, progress: Progress,
               precision: Precision = "dtype") -> tuple[dict[str, float], dict[str, int]]:
    """Train the policy in `start`; the same folder is the KL reference.

    Writes `out/checkpoint`, with `ema_decay` `out/checkpoint-ema`, `curve.jsonl`, `rollouts.parquet`, `ledger.jsonl`;
    returns metrics and the count of prompts by what became of them. Raises StageError when sync, drift or
    infrastructure gates close.
    """
    if not prompts:
        raise StageError("rl: no prompts; give the domains rows in the rl split (domains.NAME.splits.rl)")
    torch_threads()
    tokenizer = load_tokenizer(start)
    model = apply_precision(load_policy(start, dtype), precision)
    recompute(model, config.recompute)
    trainer = VerifiedGRPOTrainer(config, prompts, engine, scorer, model, tokenizer, work, seed, max_logprob_error)
    if trainer.ref_model is not None:
        apply_precision(trainer.ref_model, precision)  # so that the KL of an unchanged policy is 0
    if adamw_class(dtype, precision) is LowPrecisionAdamW:
        trainer.optimizer_cls_and_kwargs = (LowPrecisionAdamW, {"lr": config.learning_rate})
    curve = work / "curve.jsonl"
    trainer.watch(progress, curve, config.bias_gamma, ema_decay=config.ema_decay)
    trainer.add_callback(_ReplaceReference(trainer, config.reference_steps * config.mini_batches))
    trainer.train_to_the_end(work)
    trainer.save_result(out)
    rows = read_curve(curve)
    (out / "curve.jsonl").write_text(curve.read_text())
    (out / LEDGER).write_text("".join(file.read_text() for file in sorted((work / ROLLOUTS).glob("*.jsonl"))))
    rollouts = [rollout for file in sorted((work / ROLLOUTS).glob("*.parquet"))
                for rollout in read_table(file, Rollout)]
    write_table(out / "rollouts.parquet", rollouts, Rollout)
    metrics: dict[str, float] = {"steps": len(rows)}
    for key in ("rollout_reward", "rollout_accuracy", "kl", "completions/mean_length"):
        found = [row[key] for row in rows if key in row]
        if found:
            tenth = max(1, len(found) // 10)
            metrics |= {f"{key}_first": mean(found[:tenth]), f"{key}_last": mean(found[-tenth:])}
    for key, name, of_all in (("sampling/sampling_logp_difference/mean", "drift_mean", mean),
                              ("sampling/sampling_logp_difference/max", "drift_max", max),
                              ("sync_logprob_error", "sync_logprob_error_max", max)):
        found = [row[key] for row in rows if key in row]
        if found:
            metrics[name] = of_all(found)
    states = Counter(json.loads(line)["state"] for line in (out / LEDGER).read_text().splitlines())
    return metrics, dict(states)


class _ReplaceReference(TrainerCallback):
    def __init__(self, trainer: VerifiedGRPOTrainer, every: int):
        self.trainer, self.every = trainer, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.trainer.replace_reference()
