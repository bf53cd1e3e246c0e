"""Train and gather in every layout on 2 and 4 processes; run once, `test_layouts.py` looks at what it leaves.

`run_process` is what each of four processes does. Each layout trains by the SFT trainer, as inside a stage, but for
the pipeline, which has no trainer. A hang ends every process with its stack.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_models import Killed, Quiet, tiny_tokenizer
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

import sft.trainer
from pipeline.recipe import ParallelConfig, TrainConfig
from policy.kernels.cpu_experts import runs
from policy.model import load_policy, save_policy
from policy.parallel.pipeline import PipelinedPolicy
from policy.parallel.sharding import shard_policy
from policy.parallel.state import full_state
from sft.packing import IGNORE

SECONDS = 100  # a process that takes longer hangs
PACK, PACKS = 32, 8  # tokens of a pack, packs of an optimizer step
LAYOUTS = {"dp": {"shard": False}, "fsdp": {}, "ep": {"shard": False, "expert": 2, "dispatch": "exact"},
           "fsdp-ep": {"expert": 2, "dispatch": "exact"}, "fsdp-ep-fp8": {"expert": 2}}
EXACT = [name for name in LAYOUTS if not name.endswith("fp8")]
RECOMPUTED = {"fsdp-ep": ("norm", "mla_up", "swiglu")}  # on four processes
LAYERS = {2: 3, 4: 7}  # of the pipelined policies, by processes: two stages each, the MTP module in the last


def config(parallel: dict | None = None, recompute: Sequence[str] = ()) -> TrainConfig:
    """Two optimizer steps; the gradient is never clipped."""
    return TrainConfig(batch_tokens=PACKS * PACK, pack_length=PACK, packs_per_device=1, max_steps=2,
                       save_steps=1 if Watched.dies else 2, learning_rate=1e-3, min_learning_rate=1e-4,
                       mtp_lambda=0.3, balance_alpha=0.01, bias_gamma=1e-3, max_grad_norm=1e9,
                       parallel=ParallelConfig(**parallel or {}), recompute=recompute)


class Watched(sft.trainer.PackedSFTTrainer):
    """Writes the gradients of the first step; dies before the second where `dies` says so."""

    folder: Path
    dies = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Gradients())


class _Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
            held = sum(local(parameter).numel() for parameter in model.parameters())
            if state.is_world_process_zero:
                torch.save({"gradients": gradients, "held": held}, Watched.folder / "first_step.pt")

    def on_step_begin(self, args, state, control, **kwargs):
        if Watched.dies and state.global_step == 1:
            raise Killed("before the second step")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train(folder: Path, start: Path, packs: Path, parallel: dict | None = None, recompute: Sequence[str] = ()) -> Path:
    """Train in `folder`, as this process's part of the layout; returns the checkpoint.

    The file `recomputed` stands there afterwards where anything was computed again for a backward pass. Layouts that
    recompute run the experts of a GPU, whose tokens and SwiGLU are among it.
    """
    for name in ("work", "out"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Watched.folder = folder
    with (mock.patch.object(sft.trainer, "PackedSFTTrainer", Watched),
          mock.patch("policy.kernels.experts.runs", side_effect=lambda weights: not recompute and runs(weights)),
          mock.patch("policy.recompute.checkpoint", wraps=checkpoint) as again):
        sft.trainer.train_here(config(parallel, recompute), start=start, packs=packs, out=folder / "out",
                               work=folder / "work", seed=0, dtype="float32", progress=Quiet(), in_order=True)
    if again.called:
        (folder / "recomputed").touch()
    return folder / "out/checkpoint"


def token_loss(policy, hidden, input_ids, position_ids, labels, count):
    """Cross-entropy plus that of the MTP module, as the SFT trainer weighs them."""
    same_sample = position_ids[:, 2:] == position_ids[:, :-2] + 2
    after = labels[:, 2:].masked_fill(~same_sample, IGNORE)
    predicted = policy.mtp_hidden_states(hidden, input_ids, position_ids)[:, :-1]
    losses = [functional.cross_entropy(policy.lm_head(states).flatten(0, 1), wanted.flatten(), ignore_index=IGNORE,
                                       reduction="sum")
              for states, wanted in ((hidden[:, :-1], labels[:, 1:]), (predicted, after))]
    return (losses[0] + 0.3 * losses[1]) / count


def pipeline(folder: Path, start: Path, rows: list[dict], processes: int) -> PipelinedPolicy:
    """One step of the pipelined policy over the first step's packs; writes loss and gradients as `train` does."""
    ids, labels, positions = (torch.tensor([row[key] for row in rows[:PACKS]])
                              for key in ("input_ids", "labels", "position_ids"))
    count = (labels[:, 1:] != IGNORE).sum()
    policy = PipelinedPolicy(load_policy(start), lambda *parts: token_loss(*parts, count), balance_alpha=0.01,
                             batch_tokens=PACKS * PACK)
    loss = policy.step(ids, positions, labels, micro_batches=2 * processes)
    own = {name: parameter.grad for name, parameter in policy.policy.named_parameters()}
    gathered: list = [None] * processes
    distributed.all_gather_object(gathered, own)
    if distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        (folder / "loss.json").write_text(json.dumps(loss.item()))
        torch.save({"gradients": {name: tensor for part in gathered for name, tensor in part.items()},
                    "held": sum(tensor.numel() for tensor in own.values())}, folder / "first_step.pt")
    return policy


def save_again(policy, state, folder: Path) -> None:
    if distributed.get_rank() == 0:
        save_policy(policy, tiny_tokenizer(), folder, state)
    distributed.barrier()


def join(rank: int, processes: int, folder: Path) -> int:
    """Make this process one of a group of `processes` neighbours; returns which group it is."""
    group = rank // processes
    os.environ |= {"RANK": str(rank % processes), "LOCAL_RANK": str(rank % processes), "WORLD_SIZE": str(processes),
                   "LOCAL_WORLD_SIZE": str(processes)}
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store-{processes}-{group}",
                                   rank=rank % processes, world_size=processes,
                                   timeout=datetime.timedelta(seconds=SECONDS // 2))
    return group


def leave() -> None:
    distributed.barrier()
    distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_process(rank: int, folder: Path) -> None:
    """Everything, as rank `rank` of four; what it prints goes to `folder/RANK.log`."""
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=2)
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    start, packs = folder / "start-3", folder / "packs.parquet"
    rows = pq.read_table(packs).to_pylist()

    group = join(rank, 2, folder)  # two groups share the layouts
    for index, (name, layout) in enumerate(LAYOUTS.items()):
        if index % 2 == group and name in EXACT:
            train(folder / f"2/{name}", start, packs, {"processes": 2, **layout})
    if group == 1:
        pipeline(folder / "2/pp", start, rows, 2)
    leave()

    join(rank, 4, folder)
    for name, layout in LAYOUTS.items():
        if name != "fsdp-ep":
            train(folder / f"4/{name}", start, packs, {"processes": 4, **layout}, RECOMPUTED.get(name, ()))
    dies = folder / "4/fsdp-ep"
    Watched.dies = True
    try:
        train(dies, start, packs, {"processes": 4, **LAYOUTS["fsdp-ep"]}, RECOMPUTED["fsdp-ep"])
    except Killed:
        (dies / "killed").touch()
    Watched.dies = False
    train(dies, start, packs, {"processes": 4, **LAYOUTS["fsdp-ep"]}, RECOMPUTED["fsdp-ep"])
    # each checkpoint is loaded in the next layout and saved as it is
    names = list(LAYOUTS)
    for name, source in zip(names, [*names[1:], names[0]], strict=True):
        policy = shard_policy(load_policy(folder / f"4/{source}/out/checkpoint"),
                              ParallelConfig(processes=4, **LAYOUTS[name]))
        save_again(policy, full_state(policy), folder / f"4/{name}/from-{source}")
    pipelined = pipeline(folder / "4/pp", folder / "start-7", rows, 4)
    save_again(pipelined.policy, pipelined.full_state(), folder / "4/pp/from-start-7")
    leave()
