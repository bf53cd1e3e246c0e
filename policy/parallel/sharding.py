"""Where the weights of a policy lie on many processes: data parallel, FSDP2, expert parallel, and both together.

Two views of the same processes (DeepSeek-V3, arXiv 2412.19437, section 3.2): everything but the experts is
replicated or sharded over all of them; an expert lives in one of `expert` processes, and the groups that hold the
same experts replicate or shard these. torch's `fully_shard` does all four, by a mesh (replicate, shard) in which one
of the two is 1: so gradients are averaged over processes and weights look the same to the optimizer in each layout.
transformers' expert-parallel plan cuts the experts and sends the tokens.
"""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.distributed.tensor_parallel import apply_expert_parallelism

from pipeline.recipe import ParallelConfig
from pipeline.stage import StageError
from policy.parallel.dispatch import EXACT, FP8


def shard_policy(model: PreTrainedModel, config: ParallelConfig) -> PreTrainedModel:
    """Lay the policy out, in place, over the processes of the default group; each has loaded the whole policy.

    Raises StageError where the model's experts cannot be cut as the layout asks.
    """
    if dist.get_world_size() != config.processes:
        raise StageError(f"parallel.processes is {config.processes}, but {dist.get_world_size()} were started")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = config.processes // config.expert  # processes that hold the same experts
    dense = init_device_mesh(device, _replicate_or_shard(config.processes, config.shard),
                             mesh_dim_names=("replicate", "shard"))
    if config.expert > 1:
        _check_experts(model, config)
        mesh = init_device_mesh(device, (*_replicate_or_shard(ways, config.shard), config.expert),
                                mesh_dim_names=("replicate", "shard", "expert"))
        plan = {name: FP8 if style == EXACT and config.dispatch == "fp8" else style
                for name, style in model.ep_plan.items()}
        apply_expert_parallelism(model, mesh["expert"], None, plan)
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                _shard_experts(layer.mlp.experts, mesh["replicate", "shard"], config.processes)
    for index, layer in enumerate(model.model.layers):
        # the MTP module's projection and norms are called apart from its block: they stay with embedding and head
        units = [layer] if index < model.config.num_hidden_layers else [layer.self_attn, layer.mlp]
        for unit in units:
            fully_shard(unit, mesh=dense)
    # kept whole from forward to backward: the losses use embedding and head once more after the model's own forward
    fully_shard(model, mesh=dense, reshard_after_forward=False)
    return model


def _replicate_or_shard(processes: int, shard: bool) -> tuple[int, int]:
    return (1, processes) if shard else (processes, 1)


def _shard_experts(experts: nn.Module, mesh: DeviceMesh, processes: int) -> None:
    """Gradients of an expert are sums over the tokens of all processes that sent it some, so divided by all."""
    fully_shard(experts, mesh=mesh)
    experts.set_gradient_divide_factor(float(processes))
    # gloo cannot scale while it sums; where nothing is sharded torch divides by itself, and would do so twice
    if dist.get_backend() != "nccl" and mesh["shard"].size() > 1:
        experts.set_force_sum_reduction_for_comms(True)


def _check_experts(model: PreTrainedModel, config: ParallelConfig) -> None:
    if not model.ep_plan or not hasattr(model.config, "n_routed_experts"):
        raise StageError(f"parallel.expert {config.expert} needs a mixture of experts that transformers can cut; "
                         f"{type(model).__name__} is none: leave expert at 1")
    parts = config.processes if config.shard else config.expert
    if model.config.n_routed_experts % parts:
        raise StageError(f"parallel.{'processes' if config.shard else 'expert'} {parts} must divide the "
                         f"{model.config.n_routed_experts} routed experts")
