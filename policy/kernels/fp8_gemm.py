"""The three block-FP8 matrix products of a linear layer y = x w^T (DeepSeek-V3, section 3.3.2, figures 6 and 7).

Operands are E4M3 with the scales of `quantize.py`. Partial sums over 128 elements of the contraction are multiplied
by their scales and added up in FP32: the FP8 matrix units of a Hopper GPU keep about 14 bits, which the paper found to
cost up to 2 % over a contraction of 4,096. On a CPU the operands are dequantised and multiplied in FP32: FP8 products
are exact there, so only the order of the FP32 sum differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.kernels import runs_triton
from policy.kernels.quantize import BLOCKS, COLUMNS, TILES, Quantized, dequantize


def fprop(x: Quantized, w: Quantized, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """x w^T: tiles [m, k] and weight blocks [n, k] give [m, n]."""
    if runs_triton(x.values):
        from policy.kernels import triton_gemm
        return triton_gemm.fprop(x, _one(w), None, out_dtype)
    return (dequantize(x, TILES) @ dequantize(w, BLOCKS).T).to(out_dtype)


def dgrad(dy: Quantized, w: Quantized, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """dy w, the gradient of the input: tiles [m, n] and weight blocks [n, k] give [m, k]."""
    if runs_triton(dy.values):
        from policy.kernels import triton_gemm
        return triton_gemm.dgrad(dy, _one(w), None, out_dtype)
    return (dequantize(dy, TILES) @ dequantize(w, BLOCKS)).to(out_dtype)


def wgrad(dy: Quantized, x: Quantized, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """dy^T x, the gradient of the weight: columns [m, n] and columns [m, k] give [n, k]."""
    if runs_triton(dy.values):
        from policy.kernels import triton_gemm
        return triton_gemm.wgrad(dy, x, None, out_dtype)[0]
    return (dequantize(dy, COLUMNS).T @ dequantize(x, COLUMNS)).to(out_dtype)


def _one(w: Quantized) -> Quantized:
    """A weight [n, k] as the weights [1, n, k] of one group."""
    return Quantized(w.values[None], w.scales[None])
