"""Fine-grained FP8: what DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) does to tensors before a matrix product.

Activations get one scale per 1x128 tile along the contraction, weights one per 128x128 block, and the activations of
the weight gradient, whose contraction runs over tokens, one per 128x1 column piece. An outlier then costs only its own
128 or 16,384 neighbours their precision, not the tensor. Values are E4M3 throughout, scales FP32, found online:

    scale = max(max |x|, 1e-4) / 448        rounded up to a power of two if asked
    q     = x / scale                        true division, round to nearest even

Both divisions are correctly rounded, so every path gives the same bytes. Ragged edges count as padded with zeros.
Power-of-two scales are for activations that are cached in FP8 and cut anew for the weight gradient: the change of
scale is then exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.kernels import runs_triton

E4M3_MAX = 448.0
BLOCK = 128
EPS = 1e-4
TILES, BLOCKS, COLUMNS = (1, BLOCK), (BLOCK, BLOCK), (BLOCK, 1)


class Quantized(NamedTuple):
    """An FP8 tensor: `values` float8_e4m3fn [..., m, k] and FP32 `scales`, one per block; their product is x."""

    values: Tensor
    scales: Tensor


def quantize_tiles(x: Tensor, power_of_two: bool = False) -> Quantized:
    """Quantise x [..., k] by 1x128 tiles: scales [..., ceil(k / 128)]. Activations of forward and Dgrad."""
    if runs_triton(x):
        from policy.kernels import triton_quantize
        return triton_quantize.tiles(x, power_of_two)
    return _quantize(x, TILES, power_of_two)


def quantize_blocks(w: Tensor, power_of_two: bool = False) -> Quantized:
    """Quantise w [..., n, k] by 128x128 blocks: scales [..., ceil(n / 128), ceil(k / 128)]. Weights."""
    if runs_triton(w):
        from policy.kernels import triton_quantize
        return triton_quantize.blocks(w, power_of_two)
    return _quantize(w, BLOCKS, power_of_two)


def quantize_columns(x: Tensor, power_of_two: bool = False, rows: Tensor | None = None) -> Quantized:
    """Quantise x [m, k] by 128x1 column pieces: scales [ceil(m / 128), k]. Both operands of Wgrad.

    With `rows`, integers [s], x[rows] is quantised without being written. On a GPU the values are laid out with m
    contiguous, as the FP8 matrix units want the contraction.
    """
    if runs_triton(x):
        from policy.kernels import triton_quantize
        return triton_quantize.columns(x, power_of_two, rows)
    return _quantize(x if rows is None else x[rows], COLUMNS, power_of_two)


def quantize_dual(x: Tensor, power_of_two: bool = False, rows: Tensor | None = None) -> tuple[Quantized, Quantized]:
    """Tiles and columns of x [m, k] from one reading of it: a gradient feeds both Dgrad and Wgrad.

    With `rows`, integers [s], of x[rows]: tokens sorted by expert, without a copy of them in 16 bits.
    """
    if runs_triton(x):
        from policy.kernels import triton_quantize
        return triton_quantize.dual(x, power_of_two, rows)
    x = x if rows is None else x[rows]
    return _quantize(x, TILES, power_of_two), _quantize(x, COLUMNS, power_of_two)


def tiles_to_columns(tiles: Quantized, rows: Tensor | None = None) -> Quantized:
    """Cut a cached activation [m, k], or its `rows` [s], anew for Wgrad: columns with power-of-two scales.

    Costs nothing but underflow if the tiles have power-of-two scales, a second rounding otherwise.
    """
    if runs_triton(tiles.values):
        from policy.kernels import triton_quantize
        return triton_quantize.tiles_to_columns(tiles, rows)
    wide = dequantize(tiles, TILES)
    return _quantize(wide if rows is None else wide[rows], COLUMNS, power_of_two=True)


def swiglu_quantize(gate_up: Tensor, power_of_two: bool = False) -> Quantized:
    """Tiles of silu(gate) * up for gate_up [m, 2 i], gate first: values [m, i], never written in 16 or 32 bits."""
    if runs_triton(gate_up):
        from policy.kernels import triton_quantize
        return triton_quantize.swiglu(gate_up, power_of_two)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return _quantize(F.silu(gate) * up, TILES, power_of_two)


def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, power_of_two: bool = False) -> Quantized:
    """Tiles of the RMSNorm of x [m, k] by `weight` [k], as transformers computes it: rounded to x's type first."""
    if runs_triton(x):
        from policy.kernels import triton_quantize
        return triton_quantize.rmsnorm(x, weight, eps, power_of_two)
    wide = x.float()
    # 1 / sqrt in two correctly rounded steps: rsqrt differs between devices in its last bit
    normed = wide * (1.0 / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps))
    return _quantize(weight * normed.to(x.dtype), TILES, power_of_two)


def dequantize(q: Quantized, block: tuple[int, int]) -> Tensor:
    """The FP32 tensor [..., m, k] that `q` stands for; `block` is TILES, BLOCKS or COLUMNS."""
    grid = _grid(_widen(q.values), block).mul_(q.scales[..., :, None, :, None])
    return grid.flatten(-4, -3).flatten(-2, -1)[..., :q.values.shape[-2], :q.values.shape[-1]]


@torch.no_grad()
def _quantize(x: Tensor, block: tuple[int, int], power_of_two: bool) -> Quantized:
    grid = _grid(x.float(), block)  # [..., m / rows, rows, k / columns, columns]
    magnitude = largest = grid.abs()
    for dim, size in ((-1, block[1]), (-3, block[0])):  # one by one: both at once is ten times slower on a CPU
        if size > 1:
            largest = largest.amax(dim, keepdim=True)
    scales = largest.clamp(min=EPS) / E4M3_MAX
    if power_of_two:
        scales = round_up_to_power_of_two(scales)
    # into memory that is there already: fresh memory costs a CPU more than the division
    values = torch.div(grid, scales, out=magnitude).to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2, -1)
    return Quantized(values[..., :x.shape[-2], :x.shape[-1]].contiguous(), scales.squeeze(-1).squeeze(-2))


def _widen(values: Tensor) -> Tensor:
    """E4M3 values in FP32, by table on a CPU: torch's own cast takes four times as long there."""
    if values.is_cuda:
        return values.float()
    table = torch.arange(256, dtype=torch.uint8).view(values.dtype).float()
    return table.index_select(0, values.contiguous().view(torch.uint8).flatten().int()).view(values.shape)


def round_up_to_power_of_two(scales: Tensor) -> Tensor:
    """The least powers of two not below positive normal FP32 `scales`: a carry out of the mantissa, then drop it."""
    return ((scales.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)


def _grid(x: Tensor, block: tuple[int, int]) -> Tensor:
    """x [..., m, k] padded with zeros to whole blocks and seen as [..., m / rows, rows, k / columns, columns]."""
    rows, columns = -x.shape[-2] % block[0], -x.shape[-1] % block[1]
    if rows or columns:
        x = F.pad(x, (0, columns, 0, rows))
    m, k = x.shape[-2:]
    return x.unflatten(-1, (k // block[1], block[1])).unflatten(-3, (m // block[0], block[0]))
