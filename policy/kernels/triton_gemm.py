"""Triton sources of `fp8_gemm.py` and `grouped_gemm.py`, for Hopper. Not run on a GPU yet; tests run them in Triton's
interpreter and compile them for sm_90a.

Two kernels. `rows_kernel` makes rows: forward and Dgrad, where each group of rows has its own weight. `weight_kernel`
makes weights: Wgrad, where the contraction runs over a group's rows. A dense product is one group. Each step over 128
of the contraction is one FP8 product in the matrix units, then `acc += product * scale` in FP32 registers: that line
is the promotion, no compiler option does it. The FP8 units want the contraction contiguous in both operands, so the
weight of Dgrad and row-major operands of Wgrad are transposed first (a byte an element); BF16 takes any strides.
Loads go through pointers, not TMA descriptors, since groups start and end at any row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.quantize import Quantized

# rows x columns x contraction of a program's tile. 128 of FP8 or 64 of BF16 are one 128 byte line of shared memory.
FP8_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 4}
FP8_SMALL_TILE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
BF16_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
BF16_SMALL_TILE = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
SWIZZLE = 8  # row tiles that share the columns of a weight while it is in the L2 cache


@triton.jit
def _find_rows(offsets, tile, groups, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The group of row tile `tile`, its first row and the group's end; the group is >= `groups` past the last tile."""
    ids = tl.arange(0, GROUPS)
    ends = tl.load(offsets + ids, mask=ids < groups, other=0)
    starts = tl.load(offsets + ids - 1, mask=(ids > 0) & (ids < groups), other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    tiles_before = tl.cumsum(tiles, axis=0)  # up to and with the group
    group = tl.sum((tiles_before <= tile).to(tl.int32), axis=0)
    mine = ids == group
    first = tl.sum(tl.where(mine, starts + (tile - (tiles_before - tiles)) * BLOCK_M, 0), axis=0)
    return group, first, tl.sum(tl.where(mine, ends, 0), axis=0)


@triton.jit
def rows_kernel(a, b, c, a_scales, b_scales, offsets, m, n, k, groups,
                a_row, a_col, b_group, b_row, b_col, s_group, s_row, s_col,
                SCALED: tl.constexpr, GROUPS: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWIZZLE: tl.constexpr):
    """c [m, n] = a [m, k] b^T for b [groups, n, k]; a has a scale a row and step, b one for 128 x 128 (strides s_)."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n,
                                  tl.num_programs(0) // tiles_n, tiles_n, SWIZZLE)
    group, first, end = 0, tile_m * BLOCK_M, m
    if GROUPS > 0:
        group, first, end = _find_rows(offsets, tile_m, groups, GROUPS, BLOCK_M)
        if group >= groups:
            return
    row = first + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    row_mask, col_mask = row < end, col < n
    row64 = row.to(tl.int64)
    b += tl.cast(group, tl.int64) * b_group
    a_pointers = a + row64[:, None] * a_row + step[None, :] * a_col
    b_pointers = b + col.to(tl.int64)[None, :] * b_row + step[:, None] * b_col
    if SCALED:
        steps = tl.cdiv(k, BLOCK_K)
        a_scales += row64 * steps
        b_scales += tl.cast(group, tl.int64) * s_group + (tile_n * BLOCK_N // 128) * s_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(0, tl.cdiv(k, BLOCK_K)):
        k_mask = step < k - i * BLOCK_K
        a_tile = tl.load(a_pointers, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        b_tile = tl.load(b_pointers, mask=col_mask[None, :] & k_mask[:, None], other=0.0)
        if SCALED:
            scale = tl.load(a_scales + i, mask=row_mask, other=0.0) * tl.load(b_scales + i * s_col)
            acc += tl.dot(a_tile, b_tile) * scale[:, None]
        else:
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
        a_pointers += BLOCK_K * a_col
        b_pointers += BLOCK_K * b_col
    tl.store(c + row64[:, None] * n + col[None, :], acc.to(c.dtype.element_ty),
             mask=row_mask[:, None] & col_mask[None, :])


@triton.jit
def _weight_step(acc, dy, x, dy_scales, x_scales, piece, start, end, n, k, row, col, dy_row, dy_col, x_row, x_col,
                 SCALED: tl.constexpr, EDGE: tl.constexpr, BLOCK_K: tl.constexpr):
    token = piece * BLOCK_K + tl.arange(0, BLOCK_K)
    token64 = token.to(tl.int64)
    dy_mask, x_mask = (row < n)[:, None], (col < k)[None, :]
    if EDGE:  # pieces inside a group need no mask along the contraction, which would break up their wide loads
        inside = (token >= start) & (token < end)
        dy_mask, x_mask = dy_mask & inside[None, :], x_mask & inside[:, None]
    dy_tile = tl.load(dy + row.to(tl.int64)[:, None] * dy_col + token64[None, :] * dy_row, mask=dy_mask, other=0.0)
    x_tile = tl.load(x + col.to(tl.int64)[None, :] * x_col + token64[:, None] * x_row, mask=x_mask, other=0.0)
    if SCALED:
        piece64 = tl.cast(piece, tl.int64)
        dy_scale = tl.load(dy_scales + piece64 * n + row, mask=row < n, other=0.0)
        x_scale = tl.load(x_scales + piece64 * k + col, mask=col < k, other=0.0)
        acc += tl.dot(dy_tile, x_tile) * (dy_scale[:, None] * x_scale[None, :])
    else:
        acc = tl.dot(dy_tile, x_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def weight_kernel(dy, x, dw, dy_scales, x_scales, offsets, m, n, k, dy_row, dy_col, x_row, x_col,
                  SCALED: tl.constexpr, GROUPED: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """dw [groups, n, k] = dy^T x over each group's rows of dy [m, n] and x [m, k]; scales are one per 128 x 1."""
    tiles_k = tl.cdiv(k, BLOCK_N)
    row = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) % tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1)
    start, end = 0, m
    if GROUPED:
        start = tl.load(offsets + group - 1, mask=group > 0, other=0)
        end = tl.load(offsets + group)
    # pieces of BLOCK_K rows count from row 0: at most one at each end is shared with a neighbour
    first = start // BLOCK_K
    last = tl.where(end > start, tl.cdiv(end, BLOCK_K), first)
    inner = tl.minimum(tl.cdiv(start, BLOCK_K), last)
    outer = tl.maximum(end // BLOCK_K, inner)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for piece in range(first, inner):
        acc = _weight_step(acc, dy, x, dy_scales, x_scales, piece, start, end, n, k, row, col,
                           dy_row, dy_col, x_row, x_col, SCALED, True, BLOCK_K)
    for piece in range(inner, outer):
        acc = _weight_step(acc, dy, x, dy_scales, x_scales, piece, start, end, n, k, row, col,
                           dy_row, dy_col, x_row, x_col, SCALED, False, BLOCK_K)
    for piece in range(outer, last):
        acc = _weight_step(acc, dy, x, dy_scales, x_scales, piece, start, end, n, k, row, col,
                           dy_row, dy_col, x_row, x_col, SCALED, True, BLOCK_K)
    target = dw + group.to(tl.int64) * n * k + row.to(tl.int64)[:, None] * k + col[None, :]
    tl.store(target, acc.to(dw.dtype.element_ty), mask=(row < n)[:, None] & (col < k)[None, :])


def multiply_rows(a: Tensor, b: Tensor, offsets: Tensor | None, out: Tensor, a_scales: Tensor | None = None,
                  b_scales: Tensor | None = None) -> Tensor:
    """out [m, n] = a [m, k] b_g^T for b [groups, n, k]; `offsets` None is one group of all rows."""
    m, k = a.shape
    groups, n, _ = b.shape
    scaled = a_scales is not None
    small = m < 128 * groups
    tile = (FP8_SMALL_TILE if small else FP8_TILE) if scaled else (BF16_SMALL_TILE if small else BF16_TILE)
    # each group may end in a tile that is not full; programs past the last tile return at once
    tiles_m = triton.cdiv(m, tile["BLOCK_M"]) if offsets is None else m // tile["BLOCK_M"] + groups
    if m and n:
        rows_kernel[(tiles_m * triton.cdiv(n, tile["BLOCK_N"]),)](
            a, b, out, a_scales, b_scales, offsets, m, n, k, groups, *a.stride(), *b.stride(),
            *(b_scales.stride() if scaled else (0, 0, 0)), SCALED=scaled,
            GROUPS=0 if offsets is None else triton.next_power_of_2(groups), SWIZZLE=SWIZZLE, **tile)
    return out


def multiply_weights(dy: Tensor, x: Tensor, offsets: Tensor | None, out: Tensor, dy_scales: Tensor | None = None,
                     x_scales: Tensor | None = None) -> Tensor:
    """out [groups, n, k] = dy_g^T x_g over the rows of each group of dy [m, n] and x [m, k]."""
    groups, n, k = out.shape
    tile = BF16_TILE if dy_scales is None else FP8_TILE
    if n and k:
        weight_kernel[(triton.cdiv(n, tile["BLOCK_M"]) * triton.cdiv(k, tile["BLOCK_N"]), groups)](
            dy, x, out, dy_scales, x_scales, offsets, len(dy), n, k, *dy.stride(), *x.stride(),
            SCALED=dy_scales is not None, GROUPED=offsets is not None, **tile)
    return out


def fprop(x: Quantized | Tensor, w: Quantized | Tensor, offsets: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if isinstance(w, Tensor):
        return multiply_rows(x, w, offsets, x.new_empty(len(x), w.shape[1], dtype=out_dtype))
    out = torch.empty(len(x.values), w.values.shape[1], dtype=out_dtype, device=x.values.device)
    return multiply_rows(_contiguous(x.values, 1), _contiguous(w.values, 2), offsets, out,
                         x.scales.contiguous(), w.scales)


def dgrad(dy: Quantized | Tensor, w: Quantized | Tensor, offsets: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    flipped = w.transpose(1, 2) if isinstance(w, Tensor) else \
        Quantized(w.values.transpose(1, 2), w.scales.transpose(1, 2))
    return fprop(dy, flipped, offsets, out_dtype)


def wgrad(dy: Quantized | Tensor, x: Quantized | Tensor, offsets: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    groups = 1 if offsets is None else len(offsets)
    if isinstance(x, Tensor):
        return multiply_weights(dy, x, offsets, x.new_empty(groups, dy.shape[1], x.shape[1], dtype=out_dtype))
    out = torch.empty(groups, dy.values.shape[1], x.values.shape[1], dtype=out_dtype, device=x.values.device)
    return multiply_weights(_contiguous(dy.values, 0), _contiguous(x.values, 0), offsets, out,
                            dy.scales.contiguous(), x.scales.contiguous())


def _contiguous(values: Tensor, dim: int) -> Tensor:
    """`values` with dimension `dim`, the contraction, contiguous in memory: copied if it is not."""
    return values if values.stride(dim) == 1 else values.movedim(dim, -1).contiguous().movedim(-1, dim)
