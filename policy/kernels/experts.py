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

IMPLEMENTATION = "posttrain"  # its name among transformers' experts implementations
BLOCK_ROWS = 4096  # rows between two products: 2 MiB in float32 at a width of 128

Spans = list[tuple[int, int, int]]  # expert, first row, last row + 1


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
        width = gate_up.shape[1] // 2
        order = indices.reshape(-1).argsort(stable=True)
        tokens = order.div(indices.shape[1], rounding_mode="floor")
        counts = torch.bincount(indices.reshape(-1), minlength=len(gate_up)).tolist()
        scale = weights.reshape(-1)[order].to(hidden.dtype).unsqueeze(1)
        projected = hidden.new_empty(len(order), 2 * width)
        # a token's experts are summed in FP32 at least: a rounded sum sends tokens of the next layer elsewhere
        output = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start, end, spans in _blocks(counts):
            rows, both = hidden.index_select(0, tokens[start:end]), projected[start:end]
            for expert, first, last in spans:
                torch.mm(rows[first:last], gate_up[expert].t(), out=both[first:last])
            gated = functional.silu(both[:, :width]).mul_(both[:, width:]).mul_(scale[start:end])
            for expert, first, last in spans:
                torch.mm(gated[first:last], down[expert].t(), out=rows[first:last])
            output.index_add_(0, tokens[start:end], rows.to(output.dtype))
        ctx.save_for_backward(hidden, gate_up, down, projected, scale, tokens, order)
        ctx.counts, ctx.weights_like = counts, (weights.shape, weights.dtype)
        return output.to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        hidden, gate_up, down, projected, scale, tokens, order = ctx.saved_tensors
        width = gate_up.shape[1] // 2
        grad_hidden, grad_scale = torch.zeros_like(hidden), scale.new_empty(len(order))
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for expert, count in enumerate(ctx.counts):
            if not count:
                grad_gate_up[expert].zero_()
                grad_down[expert].zero_()
        for start, end, spans in _blocks(ctx.counts):
            chosen, gate, up = tokens[start:end], projected[start:end, :width], projected[start:end, width:]
            rows = grad_output.index_select(0, chosen)
            grad_gated = rows.new_empty(end - start, width)
            for expert, first, last in spans:
                torch.mm(rows[first:last], down[expert], out=grad_gated[first:last])
            activated = functional.silu(gate)
            gated = activated * up
            torch.sum(grad_gated * gated, -1, out=grad_scale[start:end])
            gated.mul_(scale[start:end])
            for expert, first, last in spans:
                torch.mm(rows[first:last].t(), gated[first:last], out=grad_down[expert])
            grad_gated.mul_(scale[start:end])
            grad_both = rows.new_empty(end - start, 2 * width)
            torch.mul(grad_gated, activated, out=grad_both[:, width:])
            torch.ops.aten.silu_backward.grad_input(grad_gated.mul_(up), gate, grad_input=grad_both[:, :width])
            torch.index_select(hidden, 0, chosen, out=rows)
            for expert, first, last in spans:
                torch.mm(grad_both[first:last].t(), rows[first:last], out=grad_gate_up[expert])
            for expert, first, last in spans:
                torch.mm(grad_both[first:last], gate_up[expert], out=rows[first:last])
            grad_hidden.index_add_(0, chosen, rows)
        shape, dtype = ctx.weights_like
        grad_weights = torch.empty_like(grad_scale)
        grad_weights[order] = grad_scale
        return grad_hidden, grad_gate_up, grad_down, None, grad_weights.view(shape).to(dtype)


def _blocks(counts: Sequence[int]) -> Iterator[tuple[int, int, Spans]]:
    """Neighbouring experts of about BLOCK_ROWS rows together: first row, last row + 1, spans counted from the first."""
    start, row, spans = 0, 0, []
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, row - start, row - start + count))
            row += count
        if spans and (row - start >= BLOCK_ROWS or row == sum(counts)):
            yield start, row, spans
            start, spans = row, []


def recomputes_swiglu(module: torch.nn.Module) -> bool:
    """Whether the experts of `module` keep their SwiGLU output out of memory by themselves."""
    return module.config._experts_implementation == IMPLEMENTATION and _runs_here(module)


def _runs_here(module: torch.nn.Module) -> bool:
    return (module.has_gate and module.gate_up_proj.device.type == "cpu" and not module._is_expert_parallel
            and not module.has_bias and not module.is_transposed
            and getattr(module.config, "hidden_act", None) == "silu")
