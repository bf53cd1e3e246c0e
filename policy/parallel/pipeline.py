"""Pipeline parallel with DualPipeV (DeepSeek-V3, arXiv 2412.19437, section 3.2.1), by torch.distributed.pipelining.

P processes hold 2P stages in a V: process r has stages r and 2P - 1 - r. Process 0 so has the first and the last:
embedding, head and the MTP module that shares both. Micro-batches flow down and up again; a forward of one and a
backward of another meet on each process. Not run on a GPU; not driven by a recipe: a training loop calls `step`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from pipeline.stage import StageError
from policy.balance import RouterProbe

# (policy, hidden [packs, tokens, hidden] after the last norm, input_ids, position_ids, labels) -> scalar
Loss = Callable[[PreTrainedModel, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class PipelinedPolicy:
    """One process's part of a policy, and the schedule that trains it."""

    def __init__(self, policy: PreTrainedModel, loss: Loss, *, balance_alpha: float, batch_tokens: int):
        """Keep of `policy`, which every process has loaded whole, what this one needs; the rest is dropped.

        loss: of one micro-batch, a sum over tokens divided by the count of the whole step, so that micro-batches add
        up. batch_tokens: tokens of the step, for the balance loss. Raises StageError for fewer layers than stages.
        """
        processes, rank = dist.get_world_size(), dist.get_rank()
        ranges = split_layers(policy.config.num_hidden_layers, len(policy.model.layers), 2 * processes)
        self.policy, self.count = policy, len(ranges)
        _keep(policy, {layer for index in (rank, self.count - 1 - rank) for layer in ranges[index]}, ends=rank == 0)
        self.probe = RouterProbe(policy)
        self.stages = {index: _Stage(policy, index, ranges, loss, self.probe, balance_alpha, batch_tokens)
                       for index in (rank, self.count - 1 - rank)}

    def step(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor,
             micro_batches: int) -> torch.Tensor:
        """Forward and backward of packs [packs, tokens], cut into `micro_batches`; every process gives all of them.

        Gradients add up in the parameters. Returns the loss of the whole step, on every process.
        """
        shape = (len(input_ids) // micro_batches, input_ids.shape[1])
        parameter = next(self.policy.parameters())
        hidden = torch.empty(*shape, self.policy.config.hidden_size, dtype=parameter.dtype, device="meta",
                             requires_grad=True)
        parts = []
        for index, module in sorted(self.stages.items()):
            module.balance = torch.zeros((), device=parameter.device)
            last = index == self.count - 1
            parts.append(PipelineStage(
                module, index, self.count, parameter.device,
                input_args=torch.empty(shape, dtype=torch.long, device="meta") if index == 0 else hidden,
                output_args=torch.empty((), device="meta", requires_grad=True) if last else hidden))
        schedule = ScheduleDualPipeV(parts, micro_batches, loss_fn=lambda output, _target: output, scale_grads=False)
        losses: list[torch.Tensor] = []
        first = dist.get_rank() == 0
        schedule.step(*([input_ids] if first else []), target=labels if first else None,
                      losses=losses if first else None, return_outputs=False, input_ids=input_ids,
                      position_ids=position_ids, labels=labels)
        total = sum((module.balance for module in self.stages.values()), torch.zeros((), device=parameter.device))
        total = total + sum(loss.detach() for loss in losses)
        dist.all_reduce(total)
        return total

    def full_state(self) -> dict[str, torch.Tensor]:
        """The whole state dict on the CPU, buffers included, in process 0; empty in the others. A collective."""
        own = {name: tensor.detach().cpu() for name, tensor in self.policy.state_dict().items()}
        gathered: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(own, gathered)
        return {name: tensor for part in gathered or [] for name, tensor in part.items()}


def split_layers(main: int, layers: int, stages: int) -> list[range]:
    """Consecutive layers of each stage, as even as they can be; MTP modules, `main` and on, count as one, at the end.

    Raises StageError for fewer layers than stages.
    """
    units = main + (layers > main)
    if units < stages:
        raise StageError(f"pipeline: {stages} stages (two a process) need as many layers, MTP counted; the policy has "
                         f"{units}: start at most {units // 2} processes")
    bounds = [index * units // stages for index in range(stages)] + [layers]
    return [range(first, end) for first, end in zip(bounds, bounds[1:], strict=False)]


def _keep(policy: PreTrainedModel, layers: set[int], *, ends: bool) -> None:
    """Drop the layers of other processes and, but for the process with both ends, embedding, norm and head."""
    for index in range(len(policy.model.layers)):
        if index not in layers:
            policy.model.layers[index] = nn.Identity()
    if not ends:
        policy.model.embed_tokens = policy.model.norm = policy.lm_head = nn.Identity()


class _Stage(nn.Module):
    """Consecutive layers of the policy; the first stage embeds, the last returns the loss."""

    def __init__(self, policy: PreTrainedModel, index: int, ranges: list[range], loss: Loss, probe: RouterProbe,
                 balance_alpha: float, batch_tokens: int):
        super().__init__()
        main = policy.config.num_hidden_layers
        self.first, self.last = index == 0, index == len(ranges) - 1
        self.layers = nn.ModuleList(policy.model.layers[layer] for layer in ranges[index] if layer < main)
        # the schedule computes gradients of weights apart, for those that a stage names as its own
        shared = [policy.model.embed_tokens] if self.first or self.last else []
        ending = [policy.model.norm, policy.lm_head, *policy.model.layers[main:]] if self.last else []
        self.ends = nn.ModuleList([*shared, *ending])
        self.loss, self.probe, self.alpha, self.batch_tokens = loss, probe, balance_alpha, batch_tokens
        self.balance = torch.zeros(())
        self.policy = (policy,)  # a tuple, so that the whole policy is not this stage's own

    def forward(self, hidden: torch.Tensor, *, input_ids: torch.Tensor, position_ids: torch.Tensor,
                labels: torch.Tensor) -> torch.Tensor:
        policy, = self.policy
        pad = policy.config.pad_token_id
        self.probe.begin(torch.ones_like(input_ids, dtype=torch.bool) if pad is None else input_ids != pad)
        if self.first:
            hidden = policy.model.embed_tokens(hidden)
        mask = create_causal_mask(config=policy.config, inputs_embeds=hidden, attention_mask=None,
                                  past_key_values=None, position_ids=position_ids)
        rotary = policy.model.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
        if self.last:
            hidden = self.loss(policy, policy.model.norm(hidden), input_ids, position_ids, labels)
        if not self.alpha:
            return hidden
        balance = self.alpha * self.probe.balance_loss(position_ids, self.batch_tokens)
        self.balance = self.balance + balance.detach()
        return _AddLoss.apply(hidden, balance)


class _AddLoss(torch.autograd.Function):
    """Passes hidden states on unchanged; in backward the loss beside them gets its gradient of 1."""

    @staticmethod
    def forward(ctx, hidden, loss):
        return hidden.clone()  # a view could not be detached in place, as the schedule does with stage outputs

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones((), device=gradient.device)
