"""Triton source of `swiglu.py`, for Hopper. Not run on a GPU yet; tests run it in Triton's interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.quantize import BLOCK, Quantized
from policy.kernels.swiglu import SwigluGradients
from policy.kernels.triton_quantize import _scale, empty_columns

WARPS = 16


@triton.jit
def swiglu_backward_kernel(gate_up, gate_up_scales, d_out, weights, hidden, hidden_scales, tiles, tile_scales, columns,
                           column_scales, d_weights, m, i, d_stride, column_stride, PART: tl.constexpr):
    """A program: 128 rows x 128 of the i columns of one result: d_gate, d_up or hidden. All three at once would spill.

    d_weights [m, i / 128] gets each block's share with hidden.
    """
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    col = block * 128 + tl.arange(0, 128)
    live = row < m
    mask = live[:, None]
    row64 = row.to(tl.int64)
    at = row64[:, None] * (2 * i) + col[None, :]
    scales = gate_up_scales + row64 * (2 * blocks) + block
    upstream = tl.load(d_out + row64[:, None] * d_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weights + row, mask=live, other=0.0)[:, None]
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32) * tl.load(scales, mask=live, other=0.0)[:, None]
    sigmoid = 1 / (1 + tl.exp(-gate))
    wide = gate * sigmoid
    if PART == 1:
        wide *= upstream * weight
    else:
        up = tl.load(gate_up + at + i, mask=mask, other=0.0).to(tl.float32)
        up *= tl.load(scales + blocks, mask=live, other=0.0)[:, None]
        if PART == 0:
            wide = upstream * weight * up * (sigmoid * (1 + gate - wide))
        else:
            wide *= up
            tl.store(d_weights + row64 * blocks + block, tl.sum(upstream * wide, axis=1), mask=live)
            wide *= weight

    rows_of_scales = tl.program_id(0).to(tl.int64)
    if PART == 2:
        scale = _scale(tl.max(tl.abs(wide), axis=0), True)
        tl.store(hidden + col.to(tl.int64)[None, :] * column_stride + row[:, None],
                 tl.div_rn(wide, scale[None, :]).to(tl.float8e4nv), mask=mask)
        tl.store(hidden_scales + rows_of_scales * i + col, scale)
    else:
        scale = _scale(tl.max(tl.abs(wide), axis=0), False)
        tl.store(columns + (col + PART * i).to(tl.int64)[None, :] * column_stride + row[:, None],
                 tl.div_rn(wide, scale[None, :]).to(tl.float8e4nv), mask=mask)
        tl.store(column_scales + rows_of_scales * (2 * i) + col + PART * i, scale)
        scale = _scale(tl.max(tl.abs(wide), axis=1), False)
        tl.store(tiles + at + PART * i, tl.div_rn(wide, scale[:, None]).to(tl.float8e4nv), mask=mask)
        tl.store(tile_scales + row64 * (2 * blocks) + PART * blocks + block, scale, mask=live)


def swiglu_backward(gate_up: Quantized, d_out: Tensor, weights: Tensor) -> SwigluGradients:
    m, i = d_out.shape
    d_out = d_out if d_out.stride(1) == 1 else d_out.contiguous()
    hidden, columns = empty_columns(m, i, d_out.device), empty_columns(m, 2 * i, d_out.device)
    tiles = Quantized(torch.empty(m, 2 * i, dtype=torch.float8_e4m3fn, device=d_out.device),
                      torch.empty(m, 2 * i // BLOCK, device=d_out.device))
    d_weights = torch.empty(m, i // BLOCK, device=d_out.device)
    if m:
        for part in range(3):
            swiglu_backward_kernel[(triton.cdiv(m, BLOCK), i // BLOCK)](
                gate_up.values.contiguous(), gate_up.scales.contiguous(), d_out, weights.contiguous(), *hidden, *tiles,
                *columns, d_weights, m, i, d_out.stride(0), hidden.values.stride(1), PART=part, num_warps=WARPS)
    return SwigluGradients(hidden, tiles, columns, d_weights.sum(1))
