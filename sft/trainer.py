"""The SFT trainer: TRL's SFTTrainer on packs, plus the MTP loss and the sequence-wise balance loss.

Loss = CE + mtp_lambda / D * sum of the CE of D MTP modules + balance_alpha * balance loss (DeepSeek-V3 sections 2.1.2,
2.2). All three are sums over tokens divided by what the whole optimizer step holds, so the loss does not depend on
how the step is cut into micro-batches or packs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from pipeline.parts import parts
from pipeline.recipe import Precision, TrainConfig
from pipeline.stage import Progress, StageError
from policy.adamw import adamw_class
from policy.kernels.logprob import add_logprob_head
from policy.model import load_policy
from policy.parallel.processes import run_on_processes
from policy.parallel.sharding import shard_policy
from policy.precision import apply_precision
from policy.recompute import recompute
from policy.tokenizer import load_tokenizer
from policy.training import PolicyTrainer, last_checkpoint, read_curve, torch_threads
from sft.optimizer import MuonWithAdamW
from sft.sampler import BlanksLast, fill_with_blanks


class PackedSFTTrainer(PolicyTrainer, SFTTrainer):
    """`train_dataset` holds packs (`input_ids`, `labels`, `position_ids`), used as they are.

    `sampler` says their order; the Trainer's own where it is None.
    """

    def __init__(self, *args: Any, config: TrainConfig, sampler: Sampler | None = None, **kwargs: Any):
        self.sampler = sampler
        super().__init__(*args, **kwargs)
        if config.parallel.processes > 1:
            shard_policy(self.model, config.parallel)
            # after the Trainer's own start, which refuses to save what it could not resume; ours can
            self.is_distributed_loading_by_transformers = True
        self.policy_config = config
        add_logprob_head(self.model)

    def _get_train_sampler(self, train_dataset=None):
        """Override of `Trainer._get_train_sampler`: many processes go through the packs in the order of one."""
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Override of `SFTTrainer.compute_loss`: adds the MTP and balance losses to TRL's."""
        config, pad_id = self.policy_config, self.processing_class.pad_token_id
        self.probe.begin(inputs["input_ids"] != pad_id)
        loss = super().compute_loss(model, dict(inputs), return_outputs=False, num_items_in_batch=num_items_in_batch)
        # gradients are averaged over processes; these are sums over the tokens of all, as TRL's own loss is
        processes = self.accelerator.num_processes
        if self.trains_mtp:
            mtp_loss = processes * self._mtp_loss(model, inputs, num_items_in_batch)
            shown = self.accelerator.reduce(mtp_loss.detach(), "mean").item()
            self._metrics["train"]["mtp_loss"].append(shown * self.current_gradient_accumulation_steps)
            loss = loss + config.mtp_lambda * mtp_loss
        if config.balance_alpha and self.probe.routers:
            balance_loss = processes * self.probe.balance_loss(inputs["position_ids"], config.batch_tokens)
            loss = loss + config.balance_alpha * balance_loss
        return loss

    def _mtp_loss(self, model, inputs: dict[str, torch.Tensor], num_items) -> torch.Tensor:
        """Mean over the modules of their cross-entropy, summed and divided as TRL divides its own."""
        found = self.mtp_predictions(model, inputs["input_ids"], inputs["position_ids"], inputs["labels"])
        counts = [one.labelled.sum() if num_items is None else torch.as_tensor(num_items) for one in found]
        return sum(one.losses.sum() / count.clamp(min=1)
                   for one, count in zip(found, counts, strict=True)) / len(found)


def _optimizer(model, config: TrainConfig, adamw: type[torch.optim.Optimizer]) -> dict[str, Any]:
    """The trainer's argument that names the optimizer; none for torch's AdamW, which transformers makes itself."""
    if config.muon_learning_rate is not None:
        muon = MuonWithAdamW(model, muon_learning_rate=config.muon_learning_rate, learning_rate=config.learning_rate,
                             adam_beta2=config.adam_beta2, weight_decay=config.weight_decay, adamw=adamw)
        return {"optimizers": (muon, None)}
    if adamw is torch.optim.AdamW:
        return {}
    return {"optimizer_cls_and_kwargs": (adamw, {"lr": config.learning_rate, "betas": (0.9, config.adam_beta2)})}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Packs are of equal length: stack them, [packs, pack_length] each."""
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels", "position_ids")}


def _parts(packs: Path) -> list[Path]:
    """The files of packs, which are one or a folder."""
    return parts(packs) if packs.is_dir() else [packs]


def train_sft(config: TrainConfig, *, start: Path, packs: Path, out: Path, work: Path, seed: int, dtype: str,
              progress: Progress, in_order: bool = False, precision: Precision = "dtype") -> dict[str, float]:
    """Train the policy in `start` on the packs, from the last checkpoint in `work` if there is one.

    `in_order` takes the packs as they stand in the file (a curriculum) instead of shuffling them.

    Trains on as many processes as `config.parallel` asks for, started by Ray unless it is one. Writes
    `out/checkpoint`, with `ema_decay` `out/checkpoint-ema`, and `out/curve.jsonl`; returns final metrics. Raises
    StageError when there are no packs, or when the loss stops being finite.
    """
    if not sum(pq.read_metadata(part).num_rows for part in _parts(packs)):
        raise StageError(f"{packs}: no packs to train on; no sample was kept")
    train = partial(train_here, config, start=start, packs=packs, out=out, work=work, seed=seed, dtype=dtype,
                    progress=progress, in_order=in_order, precision=precision)
    if config.parallel.processes == 1:
        train()
    else:
        last_checkpoint(work)  # removes what a kill left, before many look
        run_on_processes(train, config.parallel.processes, work)
    rows = read_curve(out / "curve.jsonl")
    tail = rows[-max(1, len(rows) // 10):]
    return {"steps": len(rows), **{key: sum(row[key] for row in tail) / len(tail)
                                   for key in ("loss", "mtp_loss", "mtp_accuracy", "mean_token_accuracy",
                                               "max_violation") if key in tail[-1]}}


def train_here(config: TrainConfig, *, start: Path, packs: Path, out: Path, work: Path, seed: int, dtype: str,
               progress: Progress, in_order: bool = False, precision: Precision = "dtype") -> None:
    """What each process of a training does; with `config.parallel` of many, inside their torch.distributed group."""
    parallel = config.parallel
    torch_threads()
    tokenizer = load_tokenizer(start)
    model = apply_precision(load_policy(start, dtype), precision)
    recompute(model, config.recompute)
    dataset = Dataset.from_parquet([str(part) for part in _parts(packs)], cache_dir=str(work / "cache"), columns=[
        "input_ids", "labels", "position_ids"])
    curve = work / "curve.jsonl"
    packs_per_step = min(config.batch_tokens // config.pack_length, len(dataset))
    per_device = min(config.packs_per_device, -(-packs_per_step // parallel.processes))
    per_round = per_device * parallel.processes
    sampler = None
    if parallel.processes > 1:
        count, dataset = len(dataset), fill_with_blanks(dataset, per_round, tokenizer.pad_token_id)
        sampler = BlanksLast(count, len(dataset), seed, in_order)
    args = SFTConfig(
        output_dir=str(work), seed=seed, data_seed=seed, max_length=None, packing=False,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
        per_device_train_batch_size=per_device, gradient_accumulation_steps=max(1, packs_per_step // per_round),
        train_sampling_strategy="sequential" if in_order else "random",
        num_train_epochs=config.epochs, max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate / config.learning_rate},
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay, adam_beta1=0.9, adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm, logging_steps=1, logging_nan_inf_filter=False,
        save_steps=config.save_steps, report_to="none", disable_tqdm=True,
        bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False, use_cpu=not torch.cuda.is_available())
    trainer = PackedSFTTrainer(model, args=args, train_dataset=dataset, data_collator=collate,
                               processing_class=tokenizer, config=config, sampler=sampler,
                               **_optimizer(model, config, adamw_class(dtype, precision)))
    trainer.watch(progress, curve, config.bias_gamma, packs_per_step * config.pack_length, config.ema_decay)
    trainer.train_to_the_end(work)
    if any(row["loss"] != row["loss"] for row in read_curve(curve)):
        raise StageError(f"{curve}: the loss is not a number; lower the stage's learning_rate")
    trainer.save_result(out)
    if trainer.is_world_process_zero():
        (out / "curve.jsonl").write_text(curve.read_text())
