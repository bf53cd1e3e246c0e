"""The Triton matrix products against FP64 on the same operands: any group sizes, each output written, no more."""

import pytest
import torch

from policy.kernels import fp8_gemm, grouped_gemm, triton_gemm
from policy.kernels.quantize import (
    BLOCKS,
    COLUMNS,
    TILES,
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_dual,
    quantize_tiles,
)

GROUPS = {"ragged": [70, 130, 9], "one of all": [140], "empty and single": [0, 1, 0, 129, 1, 0], "none": [0, 0]}
SPARE = 5  # rows past the last offset


def near(got, exact, error):
    assert got.shape == exact.shape
    assert (got.double() - exact).norm() <= error * exact.norm()


def exact(q: Quantized, block) -> torch.Tensor:
    return dequantize(q, block).double()


def gaussian(generator, device, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def offsets_of(sizes, device):
    return torch.tensor(sizes).cumsum(0).int().to(device)


def groups(offsets):
    ends = offsets.tolist()
    return enumerate(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("m, n, k", [(130, 144, 272), (1, 128, 128), (37, 40, 200)])
def test_the_three_products_of_a_linear_layer(m, n, k, generator, device, gemm_error):
    x, w = gaussian(generator, device, m, k), gaussian(generator, device, n, k)
    x[:, 3] *= 500
    tiles, columns = quantize_dual(x)
    dy_tiles, dy_columns = quantize_dual(gaussian(generator, device, m, n))
    blocks = quantize_blocks(w)
    near(fp8_gemm.fprop(tiles, blocks), exact(tiles, TILES) @ exact(blocks, BLOCKS).T, gemm_error)
    near(fp8_gemm.dgrad(dy_tiles, blocks), exact(dy_tiles, TILES) @ exact(blocks, BLOCKS), gemm_error)
    near(fp8_gemm.wgrad(dy_columns, columns), exact(dy_columns, COLUMNS).T @ exact(columns, COLUMNS), gemm_error)


def test_row_major_columns_are_turned_round(generator, device, gemm_error):
    """As the torch path makes them: the FP8 matrix units want the other order."""
    dy, x = (quantize_columns(gaussian(generator, device, 70, 48)) for _ in "ab")
    turned = [Quantized(q.values.contiguous(), q.scales) for q in (dy, x)]
    near(fp8_gemm.wgrad(*turned), exact(dy, COLUMNS).T @ exact(x, COLUMNS), gemm_error)


def test_the_result_is_rounded_once_to_the_type_asked_for(generator, device):
    x, w = quantize_tiles(gaussian(generator, device, 9, 128)), quantize_blocks(gaussian(generator, device, 16, 128))
    assert torch.equal(fp8_gemm.fprop(x, w, torch.bfloat16), fp8_gemm.fprop(x, w).to(torch.bfloat16))


def operands(kind, generator, device, rows, experts, n, k):
    """x, dy, w as Fprop and Dgrad take them, dy and x as Wgrad does, and all five in FP64."""
    x, dy = gaussian(generator, device, rows, k), gaussian(generator, device, rows, n)
    w = gaussian(generator, device, experts, n, k)
    if kind == "bf16":
        x, dy, w = (value.bfloat16() for value in (x, dy, w))
        return (x, dy, w, dy, x), [value.double() for value in (x, dy, w, dy, x)]
    x_tiles, x_columns = quantize_dual(x)
    dy_tiles, dy_columns = quantize_dual(dy)
    blocks = quantize_blocks(w)
    return (x_tiles, dy_tiles, blocks, dy_columns, x_columns), [
        exact(x_tiles, TILES), exact(dy_tiles, TILES), exact(blocks, BLOCKS), exact(dy_columns, COLUMNS),
        exact(x_columns, COLUMNS)]


@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_grouped_products_of_any_group_sizes(kind, sizes, generator, device, gemm_error):
    n, k = 136, 160
    offsets = offsets_of(sizes, device)
    total = sum(sizes)
    (x, dy, w, dy_w, x_w), wide = operands(kind, generator, device, total + SPARE, len(sizes), n, k)
    y, dx = grouped_gemm.fprop(x, w, offsets), grouped_gemm.dgrad(dy, w, offsets)
    dw = grouped_gemm.wgrad(dy_w, x_w, offsets)
    for group, (start, end) in groups(offsets):
        rows = slice(start, end)
        near(y[rows], wide[0][rows] @ wide[2][group].T, gemm_error)
        near(dx[rows], wide[1][rows] @ wide[2][group], gemm_error)
        near(dw[group], wide[3][rows].T @ wide[4][rows], gemm_error)


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
def test_outputs_are_wholly_written_and_spare_rows_untouched(kind, generator, device):
    """Buffers start as NaN; rows past the last offset are read by nobody, so they may be NaN in the operands too."""
    sizes, n, k = [1, 0, 130], 40, 136
    offsets, total = offsets_of(sizes, device), sum(sizes)
    (x, _, w, dy, x_w), _ = operands(kind, generator, device, total, len(sizes), n, k)
    padded = [spare_rows(x), spare_rows(dy), spare_rows(x_w)]
    (x_values, x_scales), (dy_values, dy_scales), (xw_values, xw_scales) = padded
    w_values, w_scales = w if isinstance(w, Quantized) else (w, None)
    y = torch.full((total + SPARE, n), torch.nan, device=device)
    y[total:] = 7
    triton_gemm.multiply_rows(x_values, w_values, offsets, y, x_scales, w_scales)
    assert y[:total].isfinite().all() and (y[total:] == 7).all()
    dw = torch.full((len(sizes), n, k), torch.nan, device=device)
    triton_gemm.multiply_weights(dy_values, xw_values, offsets, dw, dy_scales, xw_scales)
    assert dw.isfinite().all() and (dw[1] == 0).all()


def spare_rows(operand):
    """The operand's values with SPARE rows of NaN after them, in the same memory order, and its scales (or None)."""
    values, scales = operand if isinstance(operand, Quantized) else (operand, None)
    nan = torch.full((SPARE, values.shape[1]), torch.nan, device=values.device).to(values.dtype)
    joined = torch.cat([values.view(torch.uint8), nan.view(torch.uint8)]).view(values.dtype) \
        if values.dtype == torch.float8_e4m3fn else torch.cat([values, nan])
    if values.stride(0) == 1 and scales is not None:
        joined = joined.T.contiguous().T
    if scales is not None and len(scales) == len(values):  # tiles: a scale a row
        scales = torch.cat([scales, torch.full((SPARE, scales.shape[1]), torch.nan, device=scales.device)])
    return joined, scales


def test_partial_sums_are_promoted_every_128(generator, device):
    """Pieces of the contraction 2^20 apart in scale: a common scale would lose the small one wholly."""
    x, w = torch.ones(4, 256, device=device), torch.ones(8, 256, device=device)
    x[:, 128:] *= 2.0**-20
    product = fp8_gemm.fprop(quantize_tiles(x, True), quantize_blocks(w, True))
    assert (product - (128 + 128 * 2.0**-20)).abs().max() <= 128 * 2.0**-23
