"""The routed experts on a CPU, forward and backward, at little more than the cost of their matrix products.

transformers' grouped path spends as long around the products as in them: it permutes, gates, scales and sums tensors of
tokens x top_k rows that leave the cache between any two steps. Here an expert's rows go through all steps in blocks
that stay in cache (`cpu_experts.py`); the gate weight is applied to the narrow SwiGLU output, before the down
projection; and the SwiGLU output is recomputed in the backward pass (DeepSeek-V3, arXiv 2412.19437, section 3.2.3).
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from policy.kernels.cpu_experts import Experts, runs

IMPLEMENTATION = "posttrain"  # its name among transformers' experts implementations


def experts_forward(module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                    top_k_weights: torch.Tensor) -> torch.Tensor:
    """An `ExpertsInterface` function: the weighted sum of each token's experts, [tokens, hidden].

    hidden_states: [tokens, hidden]; top_k_index: int64 [tokens, top_k]; top_k_weights: [tokens, top_k].
    Where tensors are on a GPU, split over processes, of a dtype or size that `cpu_experts.runs` does not take, or gated
    by something else than SwiGLU, transformers' grouped path runs instead.
    """
    if not _runs_here(module) or hidden_states.dtype != module.gate_up_proj.dtype:
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return Experts.apply(hidden_states, module.gate_up_proj, module.down_proj, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def use_fast_experts(model: PreTrainedModel) -> None:
    """Let the experts of `model` run here; a dense model, or one whose class has no such choice, stays as it is."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation(IMPLEMENTATION)


def recomputes_swiglu(module: torch.nn.Module) -> bool:
    """Whether the experts of `module` keep their SwiGLU output out of memory by themselves."""
    return module.config._experts_implementation == IMPLEMENTATION and _runs_here(module)


def _runs_here(module: torch.nn.Module) -> bool:
    return (module.has_gate and module.gate_up_proj.device.type == "cpu" and not module._is_expert_parallel
            and not module.has_bias and not module.is_transposed
            and getattr(module.config, "hidden_act", None) == "silu" and runs(module.gate_up_proj))
