"""The matrix products of a layer of experts, all experts in one launch (DeepSeek-V3, section 3.3.2).

Rows are sorted by expert; `offsets` int32 [experts] holds the end row of each expert's group, as the `offs` of
torch's grouped_mm. A group may be empty or of any length. Rows past the last offset belong to nobody: they are not
read, and in results they hold whatever the memory held. Operands are block FP8 (`Quantized`, promoted to FP32 every
128 of the contraction) or plain BF16 or FP32 tensors. The 128-row pieces of FP8 columns count from row 0 and not from
the start of a group: a piece may span two experts, each takes its own rows of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.kernels import runs_triton
from policy.kernels.quantize import BLOCKS, COLUMNS, TILES, Quantized, dequantize

Operand = Quantized | Tensor


def fprop(x: Operand, w: Operand, offsets: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """x_e w_e^T for each expert e: rows (FP8 tiles) [s, k] and weights (FP8 blocks) [experts, n, k] give [s, n]."""
    if runs_triton(offsets):
        from policy.kernels import triton_gemm
        return triton_gemm.fprop(x, w, offsets, out_dtype)
    x, w = _wide(x, TILES), _wide(w, BLOCKS)
    out = x.new_empty(x.shape[0], w.shape[1], dtype=out_dtype)
    for expert, rows in enumerate(_groups(offsets)):
        out[rows] = (x[rows] @ w[expert].T).to(out_dtype)
    return out


def dgrad(dy: Operand, w: Operand, offsets: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """dy_e w_e, the gradient of the rows: (FP8 tiles) [s, n] and weights (FP8 blocks) [experts, n, k] give [s, k]."""
    if runs_triton(offsets):
        from policy.kernels import triton_gemm
        return triton_gemm.dgrad(dy, w, offsets, out_dtype)
    dy, w = _wide(dy, TILES), _wide(w, BLOCKS)
    out = dy.new_empty(dy.shape[0], w.shape[2], dtype=out_dtype)
    for expert, rows in enumerate(_groups(offsets)):
        out[rows] = (dy[rows] @ w[expert]).to(out_dtype)
    return out


def wgrad(dy: Operand, x: Operand, offsets: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """dy_e^T x_e, the gradient of the weights: (FP8 columns) [s, n] and [s, k] give [experts, n, k]; 0 if no rows."""
    if runs_triton(offsets):
        from policy.kernels import triton_gemm
        return triton_gemm.wgrad(dy, x, offsets, out_dtype)
    dy, x = _wide(dy, COLUMNS), _wide(x, COLUMNS)
    return torch.stack([(dy[rows].T @ x[rows]).to(out_dtype) for rows in _groups(offsets)])


def _wide(operand: Operand, block: tuple[int, int]) -> Tensor:
    return dequantize(operand, block) if isinstance(operand, Quantized) else operand.float()


def _groups(offsets: Tensor) -> list[slice]:
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
