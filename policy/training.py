"""What both trainers share: checkpoints that resume exactly, the balance bias, the curve file.

transformers' `Trainer` resumes a mixture of experts wrongly in silence: `_save` writes experts apart,
`_load_from_checkpoint` looks for them fused, with `strict=False`. It also leaves half a checkpoint behind
when killed while saving. `PolicyTrainer` replaces both methods and marks a checkpoint when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from pipeline.artifacts import write_atomically
from pipeline.stage import Progress
from policy.average import WeightAverage
from policy.balance import RouterProbe
from policy.model import save_policy

COMPLETE = "complete"  # marker file of a checkpoint that was fully written


class PolicyTrainer:
    """Mixin for `SFTTrainer` and `GRPOTrainer`; call `watch` after construction."""

    probe: RouterProbe
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
        self.add_callback(_Watch(self.probe, progress, curve, bias_gamma, step_tokens))

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
        state = {name: tensor.detach().cpu().contiguous().clone()
                 for name, tensor in self.accelerator.unwrap_model(self.model).state_dict().items()}
        save_file(state, folder / "state.safetensors")
        if self.average:
            self.average.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Override of `Trainer._load_from_checkpoint`: strict, so a missing tensor is an error."""
        target = self.accelerator.unwrap_model(model or self.model)
        target.load_state_dict(load_file(Path(resume_from_checkpoint) / "state.safetensors"), strict=True)
        if self.average:
            self.average.load(Path(resume_from_checkpoint))

    def save_result(self, out: Path) -> None:
        """Write `out/checkpoint`; where an average is kept `out/checkpoint-ema` too, which the model then holds."""
        model = self.accelerator.unwrap_model(self.model)
        save_policy(model, self.processing_class, out / "checkpoint")
        if self.average:
            self.average.replace_weights()
            save_policy(model, self.processing_class, out / "checkpoint-ema")


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
    def __init__(self, probe: RouterProbe, progress: Progress, curve: Path, bias_gamma: float,
                 step_tokens: int | None):
        self.probe, self.progress, self.curve, self.bias_gamma = probe, progress, curve, bias_gamma
        self.step_tokens, self.tokens, self.logged = step_tokens, 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        """Cut the curve back to the step the checkpoint is at, so that resumed steps stand once."""
        rows = [row for row in read_curve(self.curve) if row["step"] <= state.global_step]
        write_atomically(self.curve, "".join(json.dumps(row) + "\n" for row in rows))
        self.progress.start(state.max_steps, "steps", done=state.global_step)
        self.tokens, self.logged = state.num_input_tokens_seen, time.monotonic()
        if state.global_step:
            self.progress.note(f"resumes after step {state.global_step} of {state.max_steps}")

    def on_step_begin(self, args, state, control, **kwargs):
        self.probe.reset()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.bias_gamma and self.probe.routers:
            self.probe.update_bias(self.bias_gamma)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        row = {"step": state.global_step} | {key: value for key, value in logs.items()
                                             if isinstance(value, int | float)}
        if self.probe.routers and self.probe.loads.any():
            row["max_violation"] = self.probe.max_violation()
        with open(self.curve, "a") as file:
            file.write(json.dumps(row) + "\n")
        now, tokens = time.monotonic(), row.get("num_tokens", 0.0)
        rate = (self.step_tokens or tokens - self.tokens) / (now - self.logged)
        self.tokens, self.logged = tokens, now
        self.progress.advance(1, **{"tokens/s": rate}, **{
            key: row[key] for key in ("loss", "reward", "mean_token_accuracy") if key in row})

    def on_save(self, args, state, control, **kwargs):
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
    """Threads a trainer may use: those of the machine, as Ray pins workers to one thread by default."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    return threads
