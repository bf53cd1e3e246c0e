"""Triton sources of `permute.py`. Not run on a GPU yet; tests run them in Triton's interpreter.

Both kernels are bound by memory: each row is read once and, in backward, written once, with no atomic additions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from policy.kernels.permute import Order

WIDTH = 1024  # elements of a row a program holds at a time
WARPS = 4


@triton.jit
def unpermute_kernel(rows, weights, positions, offsets, out, hidden, experts,
                     TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr):
    """A program: WIDTH elements of one token, the sum of its TOP_K rows."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    live = tl.load(offsets + experts - 1)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for slot in range(TOP_K):
        row = tl.load(positions + token * TOP_K + slot)
        width = tl.where(row < live, hidden, 0)
        part = tl.load(rows + row * hidden + col, mask=col < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * TOP_K + slot)
        total += part
    tl.store(out + token * hidden + col, total.to(out.dtype.element_ty), mask=col < hidden)


@triton.jit
def unpermute_backward_kernel(d_out, rows, weights, positions, offsets, d_rows, d_weights, hidden, experts,
                              TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    """A program: one choice. d_row = weight * d_out of its token, d_weight = d_out . row."""
    choice = tl.program_id(0).to(tl.int64)
    row = tl.load(positions + choice)
    width = tl.where(row < tl.load(offsets + experts - 1), hidden, 0)
    weight = tl.load(weights + choice)
    dot = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, width, WIDTH):
        col = start + tl.arange(0, WIDTH)
        mask = col < width
        upstream = tl.load(d_out + choice // TOP_K * hidden + col, mask=mask, other=0.0).to(tl.float32)
        dot += upstream * tl.load(rows + row * hidden + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_rows + row * hidden + col, (upstream * weight).to(d_rows.dtype.element_ty), mask=mask)
    tl.store(d_weights + choice, tl.sum(dot, axis=0))


def unpermute(rows: Tensor, weights: Tensor | None, order: Order) -> Tensor:
    """`permute.unpermute` on a GPU; no weights means ones."""
    (tokens, top_k), hidden = order.positions.shape, rows.shape[1]
    out = torch.empty(tokens, hidden, dtype=rows.dtype, device=rows.device)
    if out.numel():
        unpermute_kernel[(tokens, triton.cdiv(hidden, WIDTH))](
            rows.contiguous(), None if weights is None else weights.contiguous(), order.positions, order.offsets, out,
            hidden, len(order.offsets), TOP_K=top_k, WEIGHTED=weights is not None, WIDTH=WIDTH, num_warps=WARPS)
    return out


def unpermute_backward(d_out: Tensor, rows: Tensor, weights: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Gradients of rows [s, hidden], unwritten past the last offset, and of weights [tokens, top_k]."""
    d_rows = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    d_weights = torch.empty(weights.shape, dtype=weights.dtype, device=rows.device)
    if d_weights.numel():
        unpermute_backward_kernel[(d_weights.numel(),)](
            d_out.contiguous(), rows.contiguous(), weights.contiguous(), order.positions, order.offsets, d_rows,
            d_weights, rows.shape[1], len(order.offsets), TOP_K=weights.shape[1], WIDTH=WIDTH, num_warps=WARPS)
    return d_rows, d_weights
