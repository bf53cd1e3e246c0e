"""The routed experts in FP8, as a function of transformers' experts interface (DeepSeek-V3, sections 3.3.2, 3.3.3).

A token is quantised once, before it is copied to its experts, as the FP8 dispatch of expert parallelism needs it; the
copy that waits for the backward pass is that one as well. Routing weights multiply the scales of the SwiGLU output's
tiles, which is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from policy.kernels import grouped_gemm
from policy.kernels.fp8_linear import quantize_gradient, swiglu_backward
from policy.kernels.quantize import (
    TILES,
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_dual,
    quantize_tiles,
    swiglu_quantize,
    tiles_to_columns,
)

NAME = "posttrain_fp8"  # in transformers' experts interface


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The weighted sum of each token's experts: hidden_states [tokens, hidden], the others [tokens, top_k].

    `self` is a transformers experts module with `gate_up_proj` [experts, 2 i, hidden], gate first, and `down_proj`
    [experts, hidden, i]. Slots with an index of `num_experts` or above (experts of another rank) add nothing.
    """
    expert, order = torch.sort(top_k_index.flatten(), stable=True)
    counts = torch.bincount(expert, minlength=self.num_experts)[:self.num_experts]
    offsets = counts.cumsum(0).to(torch.int32)
    if self._is_expert_parallel:
        order = order[:int(offsets[-1])]
    return _Experts.apply(hidden_states, top_k_weights, self.gate_up_proj, self.down_proj, order, offsets)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


class _Experts(torch.autograd.Function):
    """`order` [s] lists the slots, token * top_k + place, by expert; `offsets` [experts] the ends of their groups."""

    @staticmethod
    def forward(ctx, x: Tensor, route: Tensor, gate_up_weight: Tensor, down_weight: Tensor, order: Tensor,
                offsets: Tensor) -> Tensor:
        tiles = quantize_tiles(x, power_of_two=True)
        rows = _rows(tiles, order // route.shape[1])
        gate_up = grouped_gemm.fprop(rows, quantize_blocks(gate_up_weight), offsets, x.dtype)
        hidden = swiglu_quantize(gate_up, power_of_two=True)
        weighted = Quantized(hidden.values, hidden.scales * route.flatten()[order, None])
        y = grouped_gemm.fprop(weighted, quantize_blocks(down_weight), offsets)
        ctx.save_for_backward(route, gate_up_weight, down_weight, order, offsets, *tiles,
                              *quantize_tiles(gate_up, power_of_two=True))
        return _sum_slots(y, order, route.shape).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        route, gate_up_weight, down_weight, order, offsets, *cached = ctx.saved_tensors
        tiles, gate_up = Quantized(*cached[:2]), dequantize(Quantized(*cached[2:]), TILES)
        token, weight = order // route.shape[1], route.flatten()[order, None]
        # of the output without its routing weight
        d_hidden = grouped_gemm.dgrad(_rows(quantize_gradient(dy, quantize_tiles), token),
                                      quantize_blocks(down_weight), offsets)
        hidden, d_gate_up = swiglu_backward(gate_up, d_hidden * weight)
        d_route = torch.zeros_like(route).flatten().index_copy(0, order, (d_hidden * hidden).sum(-1).to(route.dtype))
        d_down = grouped_gemm.wgrad(quantize_gradient(dy[token], quantize_columns),
                                    quantize_columns(hidden * weight, power_of_two=True), offsets, down_weight.dtype)
        rows, columns = quantize_gradient(d_gate_up, quantize_dual)
        dx = grouped_gemm.dgrad(rows, quantize_blocks(gate_up_weight), offsets)
        d_gate_up_weight = grouped_gemm.wgrad(columns, tiles_to_columns(_rows(tiles, token)), offsets,
                                              gate_up_weight.dtype)
        return (_sum_slots(dx, order, route.shape).to(dy.dtype), d_route.view_as(route), d_gate_up_weight, d_down,
                None, None)


def _rows(tiles: Quantized, index: Tensor) -> Quantized:
    return Quantized(tiles.values[index], tiles.scales[index])


def _sum_slots(rows: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    """Rows [s, hidden] back in their slots and summed over each token's: FP32 [tokens, hidden], in a fixed order."""
    slots = rows.new_zeros(shape.numel(), rows.shape[1])
    slots[order] = rows
    return slots.view(*shape, -1).sum(1)
