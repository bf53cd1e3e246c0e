"""The routed experts on a CPU, forward and backward, at little more than the cost of their matrix products.

transformers' grouped path spends as long around the products as in them: it permutes, gates, scales and sums tensors of
tokens x top_k rows that leave the cache between any two steps. Here experts are taken a few at a time, so that the rows
between two products stay in cache; the gate weight is applied to the narrow SwiGLU output, before the down
projection; and the SwiGLU output is recomputed in the backward pass (DeepSeek-V3, arXiv 2412.19437, section 3.2.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from policy.kernels.cpu_swiglu import swiglu, swiglu_backward
from policy.kernels.permute import sort_by_expert

IMPLEMENTATION = "posttrain"  # its name among transformers' experts implementations
BLOCK_BYTES = 1 << 20  # of the rows between two products, or the rows of one expert: what a core's cache holds


def experts_forward(module: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                    top_k_weights: torch.Tensor) -> torch.Tensor:
    """An `ExpertsInterface` function: the weighted sum of each token's experts, [tokens, hidden].

    hidden_states: [tokens, hidden]; top_k_index: int64 [tokens, top_k]; top_k_weights: [tokens, top_k].
    Where tensors are on a GPU, split over processes, or gated by something else than SwiGLU, transformers' grouped path
    runs instead.
    """
    if not _runs_here(module):
        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return _Experts.apply(hidden_states, module.gate_up_proj, module.down_proj, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def use_fast_experts(model: PreTrainedModel) -> None:
    """Let the experts of `model` run here; a dense model, or one whose class has no such choice, stays as it is."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation(IMPLEMENTATION)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, gate_up, down, indices, weights):
        order = sort_by_expert(indices, len(gate_up))
        tokens, counts = order.tokens, order.offsets.diff(prepend=order.offsets.new_zeros(1)).tolist()
        scale = weights.reshape(-1)[order.choices].to(torch.promote_types(hidden.dtype, torch.float32))
        projected = hidden.new_empty(len(tokens), gate_up.shape[1])
        returned = hidden.new_empty(len(tokens), hidden.shape[1])
        blocks = list(_blocks(counts, BLOCK_BYTES // (hidden.shape[1] * hidden.element_size())))
        for experts, start, stop in blocks:
            rows, both = hidden.index_select(0, tokens[start:stop]), projected[start:stop]
            gated = rows.new_empty(len(rows), down.shape[2])
            _products(counts[experts], rows, gate_up[experts].mT, both)
            swiglu(both, scale[start:stop], gated)
            _products(counts[experts], gated, down[experts].mT, returned[start:stop])
        ctx.save_for_backward(hidden, gate_up, down, projected, scale, tokens, order.choices, order.positions)
        ctx.counts, ctx.blocks, ctx.weights_dtype = counts, blocks, weights.dtype
        return _combine(returned, order.positions)

    @staticmethod
    def backward(ctx, grad_output):
        hidden, gate_up, down, projected, scale, tokens, choices, positions = ctx.saved_tensors
        grad_scale = torch.empty_like(scale)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        returned = hidden.new_empty(len(tokens), hidden.shape[1])
        for experts, start, stop in ctx.blocks:
            counts, chosen = ctx.counts[experts], tokens[start:stop]
            rows = grad_output.index_select(0, chosen)
            gated, grad_both = rows.new_empty(len(rows), down.shape[2]), rows.new_empty(len(rows), gate_up.shape[1])
            _products(counts, rows, down[experts], gated)
            swiglu_backward(projected[start:stop], scale[start:stop], gated, grad_both, grad_scale[start:stop])
            _weight_gradients(counts, rows, gated, grad_down[experts])
            torch.index_select(hidden, 0, chosen, out=rows)
            _weight_gradients(counts, grad_both, rows, grad_gate_up[experts])
            _products(counts, grad_both, gate_up[experts], returned[start:stop])
        grad_weights = torch.empty_like(grad_scale)
        grad_weights[choices] = grad_scale
        return (_combine(returned, positions), grad_gate_up, grad_down, None,
                grad_weights.view(positions.shape).to(ctx.weights_dtype))


def _combine(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden]: for each token the sum of its `rows` [s, hidden] at `positions` [tokens, top_k].

    Added in FP32 at least and rounded once: a rounded sum would send tokens of the next layer to other experts.
    """
    return functional.embedding_bag(positions, rows, mode="sum")


def _products(counts: Sequence[int], rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
    """Into `out`, each expert's rows times its weights [in, out]."""
    for mine, weight, result in zip(rows.split(counts), weights, out.split(counts), strict=True):
        torch.mm(mine, weight, out=result)


def _weight_gradients(counts: Sequence[int], grad: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Into `out` [experts, a, b], each expert's `grad` [n, a] transposed times its `rows` [n, b]: zeros for no rows."""
    for a, b, result in zip(grad.split(counts), rows.split(counts), out, strict=True):
        torch.mm(a.t(), b, out=result)


def _blocks(counts: Sequence[int], rows: int) -> Iterator[tuple[slice, int, int]]:
    """Neighbouring experts of about `rows` rows together: the experts, their first row, their last row + 1."""
    first = start = stop = 0
    for expert, count in enumerate(counts, 1):
        stop += count
        if stop - start >= rows or expert == len(counts):
            yield slice(first, expert), start, stop
            first, start = expert, stop


def recomputes_swiglu(module: torch.nn.Module) -> bool:
    """Whether the experts of `module` keep their SwiGLU output out of memory by themselves."""
    return module.config._experts_implementation == IMPLEMENTATION and _runs_here(module)


def _runs_here(module: torch.nn.Module) -> bool:
    return (module.has_gate and module.gate_up_proj.device.type == "cpu" and not module._is_expert_parallel
            and not module.has_bias and not module.is_transposed
            and getattr(module.config, "hidden_act", None) == "silu")
