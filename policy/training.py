"""What both trainers share: checkpoints that resume exactly, the balance bias, MTP modules, the curve file.

transformers' `Trainer` resumes a mixture of experts wrongly in silence: `_save` writes experts apart,
`_load_from_checkpoint` looks for them fused, with `strict=False`. It also leaves half a checkpoint behind
when killed while saving. `PolicyTrainer` replaces both methods and marks a checkpoint when it is whole. Of a policy
that lies on many processes a checkpoint holds everything once, gathered; process 0 writes it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from pipeline.artifacts import write_atomically
from pipeline.recipe import GrpoConfig, TrainConfig
from pipeline.stage import Progress
from policy.average import WeightAverage
from policy.balance import RouterProbe, max_violation
from policy.model import save_policy
from policy.mtp import Prediction, is_mtp, mtp_depth, predictions
from policy.parallel.state import full_optimizer_state, full_state, load_full_state, load_optimizer_state
from policy.replay import RouteReplay

COMPLETE = "complete"  # marker file of a checkpoint that was fully written


class PolicyTrainer:
    """Mixin for `SFTTrainer` and `GRPOTrainer`; set `policy_config`, and call `watch` after construction."""

    policy_config: TrainConfig | GrpoConfig
    probe: RouterProbe
    replay: RouteReplay | None = None  # set by a trainer that replays routes
    _last_hidden: torch.Tensor | None = None  # [batch, tokens, hidden] of the last pass with gradient
    average: WeightAverage | None = None

    def watch(self, progress: Progress, curve: Path, bias_gamma: float, step_tokens: int | None = None,
              ema_decay: float | None = None) -> None:
        """Attach the router probe, the bias update, the curve file and, with `ema_decay`, the average of the weights.

        step_tokens: tokens of an optimizer step, for the rate shown; counted by TRL where they vary.
        """
        if ema_decay is not None:
            self.average = WeightAverage(self.accelerator.unwrap_model(self.model), ema_decay)
            self.add_callback(self.average)
        self.probe = RouterProbe(self.model)
        if self.trains_mtp:
            self.model.base_model.register_forward_hook(self._keep_hidden)
        self.add_callback(_Watch(self.probe, self.replay, progress, curve, bias_gamma, step_tokens))

    @property
    def trains_mtp(self) -> bool:
        return bool(self.policy_config.mtp_lambda and mtp_depth(self.model.config))

    def _keep_hidden(self, _module, _inputs, output) -> None:
        if torch.is_grad_enabled():
            self._last_hidden = output.last_hidden_state

    def mtp_predictions(self, model, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor
                        ) -> list[Prediction]:
        """What the MTP modules make of the forward pass just done, [batch, tokens] each; logs their accuracy."""
        hidden, self._last_hidden = self._last_hidden, None
        found = list(predictions(model, hidden, input_ids, position_ids, labels,
                                 self.policy_config.mtp_trunk_gradient))
        for prediction in found:
            self._metrics["train"][prediction.metric].append(prediction.accuracy())
        return found

    def _clip_grad_norm(self, model):
        """Override of `Trainer._clip_grad_norm`: MTP modules kept from the trunk are clipped apart.

        Under a common norm their gradient would still scale the trunk's step. Returns the norm of the trunk.
        """
        if not self.trains_mtp or self.policy_config.mtp_trunk_gradient:
            return super()._clip_grad_norm(model)
        sides: tuple[list, list] = ([], [])
        for name, parameter in self.accelerator.unwrap_model(model).named_parameters():
            sides[is_mtp(self.model.config, name)].append(parameter)
        trunk, modules = (self.accelerator.clip_grad_norm_(side, self.args.max_grad_norm) for side in sides)
        self._metrics["train"]["mtp_grad_norm"].append(float(modules))
        return trunk

    def train_to_the_end(self, work: Path) -> None:
        """Train from the last whole checkpoint under `work`, if there is one.

        A run that ended at its last step only loads it: transformers' loop would take one step more where that step
        lies inside an epoch.
        """
        checkpoint = last_checkpoint(work)
        if checkpoint:
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(checkpoint)
                return
        self.train(resume_from_checkpoint=checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Override of `Trainer._save`: the raw state dict, every buffer included, under in-memory names."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        state = full_state(model) if self.is_distributed_loading_by_transformers else model.state_dict()
        if self.args.should_save:
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()},
                      folder / "state.safetensors")
        if self.average:
            self.average.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Override of `Trainer._load_from_checkpoint`: strict, so a missing tensor is an error."""
        target = self.accelerator.unwrap_model(model or self.model)
        state = load_file(Path(resume_from_checkpoint) / "state.safetensors")
        if self.is_distributed_loading_by_transformers:
            load_full_state(target, state)
        else:
            target.load_state_dict(state, strict=True)
        if self.average:
            self.average.load(Path(resume_from_checkpoint))

    def save_result(self, out: Path) -> None:
        """Write `out/checkpoint`; where an average is kept `out/checkpoint-ema` too, which the model then holds.

        Every process of a training calls it, and process 0 writes.
        """
        model = self.accelerator.unwrap_model(self.model)
        state = full_state(model) if self.is_distributed_loading_by_transformers else None
        if not self.is_world_process_zero():
            return
        save_policy(model, self.processing_class, out / "checkpoint", state)
        if self.average:
            self.average.replace_weights()
            save_policy(model, self.processing_class, out / "checkpoint-ema")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Override of `Trainer._save_optimizer_and_scheduler`, which would write process 0's part of a cut state."""
        if not self.is_distributed_loading_by_transformers:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = full_optimizer_state(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Override of `Trainer._load_optimizer_and_scheduler`: each process takes its part of the whole state."""
        if not self.is_distributed_loading_by_transformers:
            return super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_optimizer_state(self.model, self.optimizer.optimizer, torch.load(Path(checkpoint) / OPTIMIZER_NAME))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME))


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint under `folder`; removes those a kill left half-written."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            found[int(path.name.rpartition("-")[2])] = path
        else:
            shutil.rmtree(path)
    return str(found[max(found)]) if found else None


def read_curve(path: Path) -> list[dict[str, float]]:
    """The rows of a curve file, one per optimizer step; a last line that a full disk cut short does not count."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


class _Watch(TrainerCallback):
    def __init__(self, probe: RouterProbe, replay: RouteReplay | None, progress: Progress, curve: Path,
                 bias_gamma: float, step_tokens: int | None):
        self.probe, self.replay, self.progress, self.curve, self.bias_gamma = probe, replay, progress, curve, bias_gamma
        self._begin_row()
        self.step_tokens, self.tokens, self.logged = step_tokens, 0.0, 0.0

    def _begin_row(self) -> None:
        """Between two rows of the curve lie several optimizer steps where a rollout has several mini-batches."""
        self.loads, self.dropped = torch.zeros_like(self.probe.loads), 0
        if self.replay is not None:
            self.replay.reset()

    def on_train_begin(self, args, state, control, **kwargs):
        """Cut the curve back to the step the checkpoint is at, so that resumed steps stand once."""
        if not state.is_world_process_zero:
            return
        rows = [row for row in read_curve(self.curve) if row["step"] <= state.global_step]
        write_atomically(self.curve, "".join(json.dumps(row) + "\n" for row in rows))
        self.progress.start(state.max_steps, "steps", done=state.global_step)
        self.tokens, self.logged = state.num_input_tokens_seen, time.monotonic()
        if state.global_step:
            self.progress.note(f"resumes after step {state.global_step} of {state.max_steps}")

    def on_step_begin(self, args, state, control, **kwargs):
        self.probe.reset()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.probe.sum_over_ranks()
        self.loads += self.probe.loads
        self.dropped += self.probe.dropped()
        if self.bias_gamma:
            self.probe.update_bias(self.bias_gamma)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        row = {"step": state.global_step} | {key: value for key, value in logs.items()
                                             if isinstance(value, int | float)}
        if self.loads.any():
            row |= {"max_violation": max_violation(self.loads), "dropped_tokens": self.dropped,
                    "expert_load": self.loads.tolist()}
        if self.replay is not None and self.replay.tokens:
            row["rerouted_share"] = self.replay.rerouted / self.replay.tokens
        self._begin_row()
        with open(self.curve, "a") as file:
            file.write(json.dumps(row) + "\n")
        now, tokens = time.monotonic(), row.get("num_tokens", 0.0)
        rate = (self.step_tokens or tokens - self.tokens) / (now - self.logged)
        self.tokens, self.logged = tokens, now
        self.progress.advance(1, **{"tokens/s": rate}, **{
            key: row[key] for key in ("loss", "reward", "mean_token_accuracy") if key in row})

    def on_save(self, args, state, control, **kwargs):
        if distributed.is_initialized():
            distributed.barrier()  # every process has written its part
        if not state.is_world_process_zero:
            return
        marker = Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE
        for file in marker.parent.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        marker.touch()
        # not the trainer's `save_total_limit`, which deletes older checkpoints before this one is marked whole
        for older in marker.parent.parent.glob("checkpoint-*"):
            if older != marker.parent:
                shutil.rmtree(older)


def torch_threads() -> int:
    """Threads a trainer may use: those of the machine, as Ray pins workers to one thread by default.

    Processes of one training share them.
    """
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads
