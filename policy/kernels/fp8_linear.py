"""Linear layers whose three matrix products and cached activations are FP8 (DeepSeek-V3, sections 3.3.2 and 3.3.3).

Forward, Dgrad and Wgrad multiply E4M3 operands quantised online; weights stay as the optimizer holds them. What waits
for the backward pass is small: the input as E4M3 tiles with power-of-two scales (E5M6 for the linear after
attention), and of a SwiGLU its two inputs, from which its output is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policy.kernels import e5m6, fp8_gemm
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

GAIN = 2.0 ** 24  # gradients are multiplied by it before they meet the least scale, 1e-4 / 448: it is for activations


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, after_attention: bool = False) -> Tensor:
    """x weight^T + bias in FP8: x [..., k], weight [n, k], bias [n] give [..., n] in x's dtype.

    after_attention: cache x for Wgrad in E5M6 instead of E4M3.
    """
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, _input_tiles(x), after_attention)
    y = y.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(silu(gate) * up) weight^T + bias in FP8: gate and up [..., i], weight [n, i] give [..., n] in gate's dtype."""
    y = _SwiGLULinear.apply(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), weight)
    y = y.view(*gate.shape[:-1], -1)
    return y if bias is None else y + bias


def swiglu_backward(gate_up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """SwiGLU's output [m, i] again, and the gradient of its inputs [m, 2 i], gate first; everything FP32."""
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    slope = sigmoid * (1 + gate - silu)
    return silu * up, torch.cat([d_hidden * up * slope, d_hidden * silu], dim=-1)


def quantize_gradient(dy: Tensor, quantize: Callable[[Tensor], Any]) -> Any:
    """`quantize(dy)` for a gradient [m, n], which a mean over a large batch makes far smaller than any activation."""
    found = quantize(dy * GAIN)
    if isinstance(found, Quantized):
        return Quantized(found.values, found.scales / GAIN)
    return tuple(Quantized(values, scales / GAIN) for values, scales in found)


def _input_tiles(x: Tensor) -> Quantized:
    """The tiles of x [..., k] as [m, k]; layers that read the same tensor share one copy of them."""
    tiles = getattr(x, "_fp8_tiles", None)
    if tiles is None:
        tiles = quantize_tiles(x.detach().reshape(-1, x.shape[-1]), power_of_two=True)
        x._fp8_tiles = tiles
    return tiles


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, tiles: Quantized, after_attention: bool) -> Tensor:
        ctx.after_attention = after_attention
        ctx.save_for_backward(weight, *(e5m6.pack(x) if after_attention else tiles))
        return fp8_gemm.fprop(tiles, quantize_blocks(weight), x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        weight, *cached = ctx.saved_tensors
        rows, columns = quantize_gradient(dy, quantize_dual)
        dx = d_weight = None
        if ctx.needs_input_grad[0]:
            dx = fp8_gemm.dgrad(rows, quantize_blocks(weight), dy.dtype)
        if ctx.needs_input_grad[1]:
            x = quantize_columns(e5m6.unpack(e5m6.Packed(*cached), weight.shape[1]), power_of_two=True) \
                if ctx.after_attention else tiles_to_columns(Quantized(*cached))
            d_weight = fp8_gemm.wgrad(columns, x, weight.dtype)
        return dx, d_weight, None, None


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        gate_up = torch.cat([gate, up], dim=-1)
        ctx.save_for_backward(weight, *quantize_tiles(gate_up, power_of_two=True))
        return fp8_gemm.fprop(swiglu_quantize(gate_up, power_of_two=True), quantize_blocks(weight), gate.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        weight, *cached = ctx.saved_tensors
        rows, columns = quantize_gradient(dy, quantize_dual)
        d_hidden = fp8_gemm.dgrad(rows, quantize_blocks(weight))
        hidden, d_gate_up = swiglu_backward(dequantize(Quantized(*cached), TILES), d_hidden)
        d_weight = None
        if ctx.needs_input_grad[2]:
            d_weight = fp8_gemm.wgrad(columns, quantize_columns(hidden, power_of_two=True), weight.dtype)
        d_gate, d_up = d_gate_up.to(dy.dtype).chunk(2, dim=-1)
        return d_gate, d_up, d_weight
