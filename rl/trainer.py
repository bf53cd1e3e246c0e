"""GRPO: TRL's GRPOTrainer with our engine, verdicts and ledger.

GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1): per prompt a group of G completions, advantage
(r - mean) / std inside the group, clipped ratio, k3 KL to a frozen reference, mean over a completion's tokens.
TRL computes the loss; the overrides below decide what is rolled out, what is scored and what is worth
training on.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer

from pipeline.recipe import GrpoConfig
from pipeline.records import Message, Problem, Rollout, Status, Verdict, content_id, write_table
from pipeline.stage import StageError
from policy.kernels.experts import use_fast_experts
from policy.kernels.logprob import add_logprob_head
from policy.replay import OWN, RouteReplay, stack_routes
from policy.training import PolicyTrainer
from rl.engine import Generation, Request, RolloutEngine, Sampling
from rl.routes import engine_routes
from rl.sync import SyncProof, sync_weights

ROLLOUTS, LEDGER, REFERENCE = "rollouts", "ledger.jsonl", "reference.safetensors"


@dataclass(frozen=True)
class Prompt:
    """A problem and the messages it is asked with (`form` says whether the reflective prompt stands before)."""

    problem: Problem
    form: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Score:
    """reward: the weighted sum, or None when the verdict is unscored; parts: its terms by name."""

    verdict: Verdict
    reward: float | None
    parts: dict[str, float]


Scorer = Callable[[Sequence[Prompt], Sequence[str], int], list[Score]]  # prompts, completions, step -> scores


def prompt_schedule(prompts: Sequence[Prompt], rows: int, seed: int) -> list[int]:
    """`rows` indices into `prompts`: reshuffled passes, so that every prompt comes before any comes again."""
    rng, order = random.Random(seed), []
    while len(order) < rows:
        once = list(range(len(prompts)))
        rng.shuffle(once)
        order += once
    return order[:rows]


class VerifiedGRPOTrainer(PolicyTrainer, GRPOTrainer):
    """One step: sync weights with proof, roll out, verify, drop groups without variance, let TRL train on the rest.

    `work/rollouts/STEP.parquet` and `STEP.jsonl` keep every rollout and what became of every prompt.
    """

    def __init__(self, config: GrpoConfig, prompts: Sequence[Prompt], engine: RolloutEngine, scorer: Scorer,
                 model: Any, tokenizer: Any, work: Path, seed: int, max_logprob_error: float):
        self.policy_config, self.prompts, self.engine, self.scorer = config, prompts, engine, scorer
        self.work, self.run_seed, self.max_logprob_error = work, seed, max_logprob_error
        self.proof: SyncProof | None = None
        self.unscored = Counter()
        self._kept: list[tuple[list[int], Generation, Score]] = []
        self._reference_replaced = False
        self._routes: torch.Tensor | None = None  # [rows, tokens, layers, top_k] of the kept rows
        (work / ROLLOUTS).mkdir(parents=True, exist_ok=True)
        batch = config.prompts_per_step * config.group_size
        schedule = prompt_schedule(prompts, config.steps * config.prompts_per_step, seed)
        dataset = Dataset.from_dict({"prompt": [list(prompts[index].messages) for index in schedule],
                                     "index": schedule})
        args = TRLConfig(
            output_dir=str(work), seed=seed, max_steps=config.steps * config.mini_batches,
            per_device_train_batch_size=config.device_batch,
            gradient_accumulation_steps=batch // config.device_batch // config.mini_batches,
            steps_per_generation=batch // config.device_batch, num_generations=config.group_size,
            max_completion_length=config.max_completion_length, temperature=config.temperature,
            beta=config.kl_coef, epsilon=config.clip_epsilon, loss_type="grpo", scale_rewards="group",
            learning_rate=config.learning_rate, lr_scheduler_type="constant_with_warmup",
            warmup_steps=config.warmup_steps, max_grad_norm=config.max_grad_norm, weight_decay=0.0,
            shuffle_dataset=False, remove_unused_columns=False, use_vllm=False,
            vllm_importance_sampling_correction=True, vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=config.importance_cap, vllm_importance_sampling_clip_min=None,
            save_steps=config.save_steps * config.mini_batches, logging_steps=config.mini_batches,
            logging_nan_inf_filter=False, report_to="none", disable_tqdm=True, bf16=False,
            gradient_checkpointing=False, dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available())
        # TRL wants reward functions; `_calculate_rewards` below answers in their place
        super().__init__(model=model, reward_funcs=[verified_reward], args=args, train_dataset=dataset,
                         processing_class=tokenizer)
        for scored in filter(None, (self.model, self.ref_model)):
            add_logprob_head(scored, self.temperature)
        if self.ref_model is not None:
            use_fast_experts(self.ref_model)  # TRL loaded it, not load_policy
        if config.mtp_lambda and not self.trains_mtp:
            raise StageError(f"rl.mtp_lambda {config.mtp_lambda:g} needs a model with an MTP module; leave it out")
        if self.accelerator.num_processes > 1:
            raise StageError("rl: the GRPO trainer runs in one process; groups are dropped per process")
        if config.routing_replay:
            try:
                self.replay = RouteReplay(self.accelerator.unwrap_model(self.model))
            except ValueError as error:
                raise StageError(f"rl.routing_replay: {error}") from None
        # From here on TRL takes engine log-probs for what they are (importance correction, drift metrics). Set
        # after construction, because with `use_vllm=True` TRL would start an engine of its own.
        self.use_vllm = True

    # -- what is rolled out ------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Override: roll out and verify first, then let TRL prepare only the groups worth training on.

        Returns None when no group is. TRL's own order would spend reference and old-policy passes on all.
        """
        step = self.state.global_step // self.policy_config.mini_batches
        self.proof = sync_weights(self.accelerator.unwrap_model(self.model), self.engine, self.state.global_step,
                                  self.max_logprob_error)
        indices = [row["index"] for row in inputs]
        before = self.engine.draft_counts() if self.engine.drafts else (0, 0)
        rows = self._roll_out(indices, step)
        kept = self._trainable_groups(rows, indices, step)
        self._kept = [rows[index] for index in kept]
        metrics = self._metrics["train"]
        metrics["sync_logprob_error"].append(self.proof.max_logprob_error)
        metrics["trained_share"].append(len(kept) / len(rows))
        if self.engine.drafts:
            drafted, accepted = (now - then for now, then in zip(self.engine.draft_counts(), before, strict=True))
            metrics["draft_acceptance"].append(accepted / max(1, drafted))
        if not kept:
            return None
        prepared = super()._generate_and_score_completions([inputs[index] for index in kept])
        if self.replay is not None:
            prepared["routes"], self._routes = self._routes, None
        drift = metrics["sampling/sampling_logp_difference/mean"][-1]
        if drift > self.policy_config.max_drift:
            raise StageError(f"rl step {step}: trainer and engine log-probs of the rollouts differ by {drift:.3g} on "
                             f"average, above max_drift {self.policy_config.max_drift:g}")
        return prepared

    def _roll_out(self, indices: list[int], step: int) -> list[tuple[list[int], Generation, Score]]:
        """Generate, verify, and record one batch: (prompt ids, generation, score) per row, in order."""
        prompts = [self.prompts[index] for index in indices]
        encoded = self._tokenize_prompts([list(prompt.messages) for prompt in prompts])[0]
        requests = [Request(tuple(ids), random.Random(f"{self.run_seed}/{step}/{row}").getrandbits(31))
                    for row, ids in enumerate(encoded)]
        config = self.policy_config
        generations = self.engine.generate(requests, Sampling(config.temperature, config.max_completion_length,
                                                              routes=config.routing_replay))
        texts = self.processing_class.batch_decode([g.token_ids for g in generations], skip_special_tokens=True)
        scores = self.scorer(prompts, texts, step)
        self._gate_infrastructure(scores)
        self._log_rewards(prompts, scores)
        advantages = group_advantages([score.reward for score in scores], config.group_size)
        write_table(self.work / ROLLOUTS / f"{step:06d}.parquet", [
            Rollout(id=content_id(prompt.problem.id, step, row), problem_id=prompt.problem.id,
                    domain=prompt.problem.domain, step=step, sample_index=row % config.group_size,
                    prompt_ids=tuple(ids), completion_ids=generation.token_ids, logprobs=generation.logprobs,
                    policy_version=self.state.global_step, text=text, reward=score.reward, parts=score.parts,
                    advantage=advantage, verdict=score.verdict,
                    routes=None if generation.routes is None else generation.routes.astype("<i2").tobytes())
            for row, (prompt, ids, generation, text, score, advantage) in enumerate(
                zip(prompts, encoded, generations, texts, scores, advantages, strict=True))], Rollout)
        return list(zip(encoded, generations, scores, strict=True))

    def _trainable_groups(self, rows: Sequence[tuple[list[int], Generation, Score]], indices: Sequence[int],
                          step: int) -> list[int]:
        """Row indices of groups whose scored rewards differ; writes the ledger line of every prompt."""
        size, kept, lines = self.policy_config.group_size, [], []
        for start in range(0, len(rows), size):
            members = rows[start:start + size]
            rewards = [score.reward for _, _, score in members if score.reward is not None]
            if any(not generation.token_ids for _, generation, _ in members):
                state = "prompt_too_long"
            elif len(rewards) < 2:
                state = "infra_error" if any(score.verdict.status == Status.INFRA_ERROR for _, _, score in members) \
                    else "abstain"
            elif max(rewards) - min(rewards) < 1e-6:
                state = "zero_variance"
            else:
                state = "trained"
                kept += range(start, start + size)
            prompt = self.prompts[indices[start]]
            lines.append({"step": step, "prompt_id": prompt.problem.id, "form": prompt.form, "state": state})
        (self.work / ROLLOUTS / f"{step:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return kept

    def _gate_infrastructure(self, scores: Sequence[Score]) -> None:
        """Stop when verifiers failed more often than the budget allows; those rows never score 0."""
        self.unscored["seen"] += len(scores)
        failed = [score.verdict for score in scores if score.verdict.status == Status.INFRA_ERROR]
        self.unscored["infra_error"] += len(failed)
        budget = self.policy_config.infra_error_budget
        # over at least a thousand verdicts, so that one early failure does not end a run
        if failed and self.unscored["infra_error"] > budget * max(self.unscored["seen"], 1000):
            raise StageError(f"rl: {self.unscored['infra_error']} of {self.unscored['seen']} verdicts are "
                             f"infrastructure errors, above infra_error_budget {budget:g}; the last came from "
                             f"{failed[-1].verifier}: {failed[-1].reason} {failed[-1].evidence}")

    def _log_rewards(self, prompts: Sequence[Prompt], scores: Sequence[Score]) -> None:
        """Reward means over everything rolled out; TRL's own cover the trained groups alone."""
        metrics, by_domain = self._metrics["train"], {}
        for prompt, score in zip(prompts, scores, strict=True):
            if score.reward is not None:
                by_domain.setdefault(prompt.problem.domain, []).append(score)
        for domain, scored in by_domain.items():
            metrics[f"accuracy/{domain}"].append(sum(s.verdict.score for s in scored) / len(scored))
        everything = [score for scored in by_domain.values() for score in scored]
        for name in sorted({name for score in everything for name in score.parts}):
            metrics[f"part/{name}"].append(sum(score.parts[name] for score in everything) / len(everything))
        if everything:
            metrics["rollout_reward"].append(sum(s.reward for s in everything) / len(everything))
            metrics["rollout_accuracy"].append(sum(s.verdict.score for s in everything) / len(everything))

    # -- what TRL asks while it prepares the kept rows ----------------------------------------------------------

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        """Override: the completions were sampled already; log-probs are the engine's."""
        generations = [generation for _, generation, _ in self._kept]
        return [list(g.token_ids) for g in generations], [list(g.logprobs) for g in generations]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Override: rewards [rows, 1]; NaN marks a row without a verdict, which TRL leaves out of the baseline."""
        rewards = [float("nan") if score.reward is None else score.reward for _, _, score in self._kept]
        return torch.tensor(rewards, device=self.accelerator.device).unsqueeze(1)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any] | None:
        """Override: hand out the kept rows in slots of `device_batch`; a slot may be empty (None).

        TRL cuts the batch evenly into `steps_per_generation` slots, which after dropping groups would need a
        divisible count. Rows without a reward have served their group's ledger line and go no further. Rows are sorted
        by length inside a mini-batch and each slot is cut to its own width.
        """
        slots = self.args.steps_per_generation
        if self._step % slots == 0 or self._buffered_inputs is None:
            prepared = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = self._cut(prepared, slots)
        return self._buffered_inputs[self._step % slots]

    def _cut(self, prepared: dict[str, Any] | None, slots: int) -> list[dict[str, Any] | None]:
        if prepared is None:
            return [None] * slots
        config, rows = self.policy_config, prepared["completion_ids"].shape[0]
        groups = [[row for row in range(start, start + config.group_size) if self._kept[row][2].reward is not None]
                  for start in range(0, rows, config.group_size)]
        lengths = prepared["completion_mask"].sum(1).tolist()
        result: list[dict[str, Any] | None] = []
        for mini_batch in range(config.mini_batches):
            members = [row for group in groups[mini_batch::config.mini_batches] for row in group]
            members.sort(key=lambda row: lengths[row])
            parts = [members[start:start + config.device_batch]
                     for start in range(0, len(members), config.device_batch)]
            parts += [[]] * (slots // config.mini_batches - len(parts))
            result += [_select(prepared, part) if part else None for part in parts]
        return result

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None,
                                           **options):
        """Override: passes without gradient go shortest rows first, each part cut to its widest row.

        TRL pads every part to the width of the whole batch. Log-probs behind a row's last token are 0.
        With routing replay, the policy's own pass takes the engine's routes or, where it returns none, records the
        routes that these weights choose; the gradient passes replay them.
        """
        rows, prompt = input_ids.shape[0], input_ids.shape[1] - logits_to_keep
        if torch.is_grad_enabled() or batch_size is None:
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep,
                                                              batch_size, **options)
        prompts, lengths = attention_mask[:, :prompt].sum(1), attention_mask[:, prompt:].sum(1)
        logps = torch.zeros(rows, logits_to_keep, device=input_ids.device)
        replay, given = self.replay if model is self.model else None, None  # the reference keeps its own routes
        if replay is not None:
            layers, top_k = replay.shape
            given = engine_routes([row[:2] for row in self._kept], prompt, input_ids.shape[1], replay.layers, top_k)
            self._routes = torch.full((*input_ids.shape, layers, top_k), OWN, dtype=torch.int16) \
                if given is None else given
            self._routes = self._routes.to(input_ids.device)
        for part in lengths.argsort().split(batch_size):
            keep = int(lengths[part].max())
            cut = slice(prompt - int(prompts[part].max()), prompt + keep)
            if given is not None:
                replay.start(self._routes[part, cut])
            with replay.recording() if replay is not None and given is None else nullcontext() as recorded:
                logps[part, :keep], _, _ = super()._get_per_token_logps_and_entropies(
                    model, input_ids[part, cut], attention_mask[part, cut], keep, **options)
            if recorded:
                self._routes[part, cut] = stack_routes(recorded, len(part))
        if given is not None:
            replay.stop()
        return logps, None, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Override: nothing to compute for an empty slot; a partly filled one weighs by its rows.

        TRL takes the mean over a slot's rows and divides by the number of slots. Scaling by
        rows / device_batch makes the sum over slots the mean over all rows rolled out for the optimizer step, as
        if the dropped rows had been trained on with an advantage of zero and no KL.
        """
        if inputs is None:
            return next(parameter for parameter in model.parameters() if parameter.requires_grad).sum() * 0.0
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool()
        self.probe.begin(mask)
        if self.replay is not None:
            self.replay.start(inputs["routes"])
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.replay is not None:
            self.replay.count(mask)
        if self.trains_mtp:
            loss = loss + self.policy_config.mtp_lambda * self._mtp_loss(model, inputs)
        return loss * (inputs["completion_ids"].shape[0] / self.policy_config.device_batch)

    def training_step(self, model, inputs, num_items_in_batch):
        """Override: routes are replayed until the backward pass is over, as checkpointed layers run again in it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.replay is not None:
            self.replay.stop()
        return loss

    def _mtp_loss(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy of the MTP modules on the slot's completions, averaged as TRL averages: tokens, rows, slots.

        Prompts are padded on the left: positions start at 0 with the first real token, and each pad stands alone.
        """
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        positions = (mask.cumsum(1) - 1) * mask
        learned = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], dim=1)
        found = self.mtp_predictions(model, input_ids, positions, input_ids.masked_fill(learned == 0, -100))
        loss = sum((one.losses.sum(1) / one.labelled.sum(1).clamp(min=1)).mean() for one in found) / len(found)
        self._metrics["train"]["mtp_loss"].append(loss.item())
        return loss / self.current_gradient_accumulation_steps

    # -- the reference policy --------------------------------------------------------------------------------------

    def replace_reference(self) -> None:
        """Make the current policy the KL reference (DeepSeek-R1: every 400 steps)."""
        if self.ref_model is None:
            return
        names = set(self.ref_model.state_dict())
        state = self.accelerator.unwrap_model(self.model).state_dict()
        self.ref_model.load_state_dict({name: tensor for name, tensor in state.items() if name in names})
        self._reference_replaced = True

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._reference_replaced:
            save_file({name: tensor.clone() for name, tensor in self.ref_model.state_dict().items()},
                      Path(output_dir or self.args.output_dir) / REFERENCE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        reference = Path(resume_from_checkpoint) / REFERENCE
        if reference.exists():
            self.ref_model.load_state_dict(load_file(reference))
            self._reference_replaced = True


def verified_reward(**_columns: Any) -> list[float]:
    """The name TRL logs; `VerifiedGRPOTrainer._calculate_rewards` never calls it."""
    raise AssertionError("rewards come from VerifiedGRPOTrainer._calculate_rewards")


def group_advantages(rewards: Sequence[float | None], group_size: int) -> list[float | None]:
    """(r - mean) / (std + 1e-4) inside each group over scored rewards; None where there is no reward.

    The sample standard deviation, as TRL uses it; for the rollout log alone.
    """
    result: list[float | None] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start:start + group_size]
        scored = torch.tensor([reward for reward in group if reward is not None], dtype=torch.float64)
        spread = float(scored.std()) if len(scored) > 1 else 0.0
        result += [None if reward is None else (reward - float(scored.mean())) / (spread + 1e-4) for reward in group]
    return result


def _select(prepared: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Rows of a prepared batch, cut to their widest prompt and completion (prompts are left-padded)."""
    index = torch.tensor(rows, device=prepared["completion_ids"].device)
    count = prepared["completion_ids"].shape[0]
    picked = {key: value[index] if torch.is_tensor(value) and value.dim() and value.shape[0] == count else value
              for key, value in prepared.items()}
    prompt_width = int(picked["prompt_mask"].sum(1).max())
    completion_width = int(picked["completion_mask"].sum(1).max())
    full = prepared["completion_ids"].shape[1]
    for key, value in picked.items():
        if key in ("prompt_ids", "prompt_mask"):
            picked[key] = value[:, -prompt_width:]
        elif key == "routes":
            begin = prepared["prompt_ids"].shape[1]
            picked[key] = value[:, begin - prompt_width:begin + completion_width]
        elif torch.is_tensor(value) and value.dim() == 2 and value.shape[1] == full:
            picked[key] = value[:, :completion_width]
    return picked
