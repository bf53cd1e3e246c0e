"""Triton sources of `quantize.py`, for Hopper. Not run on a GPU yet; tests run them in Triton's interpreter.

One kernel reads a block of 128 columns once and writes what is asked of it: tiles, columns, a whole block, or tiles
and columns together. What it reads may be a gathered row, an FP8 activation with its scales, or the two halves of a
SwiGLU. RMSNorm needs whole rows, so it has a kernel of its own with a row a program. Arithmetic is FP32; divisions are
`div_rn`, since `/` on FP32 compiles to an approximation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.kernels.quantize import BLOCK, Quantized

TILE_ROWS = 32  # rows a program when only tiles are written: enough work to hide the latency, few registers
WARPS = {TILE_ROWS: 4, BLOCK: 8}


@triton.jit
def _scale(amax, POWER_OF_TWO: tl.constexpr):
    scale = tl.div_rn(tl.maximum(amax, 1e-4), 448.0)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def quantize_kernel(x, rows, x_scales, values, scales, column_values, column_scales, m, k, x_stride, column_stride,
                    SWIGLU: tl.constexpr, GATHER: tl.constexpr, RESCALE: tl.constexpr, TILES: tl.constexpr,
                    COLUMNS: tl.constexpr, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr):
    """A program: ROWS x 128 of one matrix. TILES and COLUMNS say what is written; neither means one whole block."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    col = block * 128 + tl.arange(0, 128)
    matrix = tl.program_id(2).to(tl.int64)
    row_mask = row < m
    mask = row_mask[:, None] & (col < k)[None, :]

    source = row.to(tl.int64) + matrix * m
    if GATHER:
        source = tl.load(rows + row, mask=row_mask, other=0).to(tl.int64)
    pointers = x + source[:, None] * x_stride + col[None, :]
    wide = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if SWIGLU:
        up = tl.load(pointers + k, mask=mask, other=0.0).to(tl.float32)
        wide = wide / (1.0 + tl.exp(-wide)) * up
    if RESCALE:
        wide *= tl.load(x_scales + source * tl.num_programs(1) + block, mask=row_mask, other=0.0)[:, None]

    target = (row.to(tl.int64) + matrix * m)[:, None] * k + col[None, :]
    if TILES:
        tile_scale = _scale(tl.max(tl.abs(wide), axis=1), POWER_OF_TWO)
        tl.store(values + target, tl.div_rn(wide, tile_scale[:, None]).to(tl.float8e4nv), mask=mask)
        tl.store(scales + row * tl.num_programs(1) + block, tile_scale, mask=row_mask)
    if COLUMNS:
        column_scale = _scale(tl.max(tl.abs(wide), axis=0), POWER_OF_TWO)
        tl.store(column_values + col.to(tl.int64)[None, :] * column_stride + row[:, None],
                 tl.div_rn(wide, column_scale[None, :]).to(tl.float8e4nv), mask=mask)
        tl.store(column_scales + tl.program_id(0).to(tl.int64) * k + col, column_scale, mask=col < k)
    if not TILES and not COLUMNS:
        block_scale = _scale(tl.max(tl.max(tl.abs(wide), axis=1), axis=0), POWER_OF_TWO)
        tl.store(values + target, tl.div_rn(wide, block_scale).to(tl.float8e4nv), mask=mask)
        tl.store(scales + (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + block, block_scale)


@triton.jit
def rmsnorm_quantize_kernel(x, weight, values, scales, k, x_stride, eps,
                            POWER_OF_TWO: tl.constexpr, WIDTH: tl.constexpr):
    """A program: one row of k <= WIDTH elements, held in registers between its norm and its scales."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, WIDTH)
    raw = tl.load(x + row * x_stride + col, mask=col < k, other=0.0)
    gain = tl.load(weight + col, mask=col < k, other=0.0)
    wide = raw.to(tl.float32)
    mean = tl.div_rn(tl.sum(wide * wide, axis=0), k.to(tl.float32))
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    normed = (wide * inverse).to(raw.dtype).to(tl.float32) * gain.to(tl.float32)
    if raw.dtype == gain.dtype:
        normed = normed.to(raw.dtype).to(tl.float32)  # torch rounds the product of two BF16 tensors to BF16
    tiles = tl.reshape(normed, (WIDTH // 128, 128))
    scale = _scale(tl.max(tl.abs(tiles), axis=1), POWER_OF_TWO)
    quantized = tl.reshape(tl.div_rn(tiles, scale[:, None]), (WIDTH,)).to(tl.float8e4nv)
    tl.store(values + row * k + col, quantized, mask=col < k)
    count = tl.cdiv(k, 128)
    tile = tl.arange(0, WIDTH // 128)
    tl.store(scales + row * count + tile, scale, mask=tile < count)


def tiles(x: Tensor, power_of_two: bool) -> Quantized:
    flat = x.reshape(-1, x.shape[-1])
    tiled, _ = _launch(flat, flat.shape[-1], power_of_two, tiles=True)
    return Quantized(tiled.values.view(x.shape), tiled.scales.view(*x.shape[:-1], -1))


def columns(x: Tensor, power_of_two: bool, rows: Tensor | None) -> Quantized:
    return _launch(x, x.shape[1], power_of_two, columns=True, rows=rows)[1]


def dual(x: Tensor, power_of_two: bool, rows: Tensor | None) -> tuple[Quantized, Quantized]:
    return _launch(x, x.shape[1], power_of_two, tiles=True, columns=True, rows=rows)


def tiles_to_columns(cached: Quantized, rows: Tensor | None) -> Quantized:
    return _launch(cached.values, cached.values.shape[1], True, columns=True, rows=rows,
                   x_scales=cached.scales.contiguous())[1]


def swiglu(gate_up: Tensor, power_of_two: bool) -> Quantized:
    return _launch(gate_up, gate_up.shape[1] // 2, power_of_two, tiles=True, swiglu=True)[0]


def blocks(w: Tensor, power_of_two: bool) -> Quantized:
    n, k = w.shape[-2:]
    flat = w.reshape(-1, n, k)
    values = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=w.device)
    grid = (triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK), flat.shape[0])
    scales = torch.empty(grid[2], grid[0], grid[1], device=w.device)
    if values.numel():
        quantize_kernel[grid](
            flat, None, None, values, scales, None, None, n, k, k, 0, SWIGLU=False, GATHER=False, RESCALE=False,
            TILES=False, COLUMNS=False, POWER_OF_TWO=power_of_two, ROWS=BLOCK, num_warps=WARPS[BLOCK])
    return Quantized(values.view(w.shape), scales.view(*w.shape[:-2], *grid[:2]))


def rmsnorm(x: Tensor, weight: Tensor, eps: float, power_of_two: bool) -> Quantized:
    flat = _row_major(x.reshape(-1, x.shape[-1]))
    m, k = flat.shape
    values = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(m, triton.cdiv(k, BLOCK), device=x.device)
    width = max(triton.next_power_of_2(k), BLOCK)
    if m:
        rmsnorm_quantize_kernel[(m,)](flat, weight, values, scales, k, flat.stride(0), eps, POWER_OF_TWO=power_of_two,
                                      WIDTH=width, num_warps=8 if width > 2048 else 4)
    return Quantized(values.view(x.shape), scales.view(*x.shape[:-1], -1))


def empty_columns(m: int, k: int, device: torch.device) -> Quantized:
    """Columns [m, k] to be written: m contiguous, and each on a 16 byte boundary for the loads of Wgrad."""
    padded = torch.empty(k, triton.cdiv(m, 16) * 16, dtype=torch.float8_e4m3fn, device=device)
    return Quantized(padded[:, :m].T, torch.empty(triton.cdiv(m, BLOCK), k, device=device))


def _launch(x: Tensor, k: int, power_of_two: bool, *, tiles: bool = False, columns: bool = False, swiglu: bool = False,
            rows: Tensor | None = None, x_scales: Tensor | None = None) -> tuple[Quantized | None, Quantized | None]:
    x = _row_major(x)
    m = len(x) if rows is None else len(rows)
    height = BLOCK if columns else TILE_ROWS
    grid = (triton.cdiv(m, height), triton.cdiv(k, BLOCK), 1)
    tiled = column_wise = None
    if tiles:
        tiled = Quantized(torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device),
                          torch.empty(m, grid[1], device=x.device))
    if columns:
        column_wise = empty_columns(m, k, x.device)
    if m and k:
        quantize_kernel[grid](
            x, rows, x_scales, *(tiled or (None, None)), *(column_wise or (None, None)), m, k, x.stride(0),
            column_wise.values.stride(1) if columns else 0, SWIGLU=swiglu, GATHER=rows is not None,
            RESCALE=x_scales is not None, TILES=tiles, COLUMNS=columns, POWER_OF_TWO=power_of_two, ROWS=height,
            num_warps=WARPS[height])
    return tiled, column_wise


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
