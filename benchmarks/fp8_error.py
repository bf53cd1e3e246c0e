"""What block FP8 costs in accuracy, against FP64: the figures of docs/numerics.md.

    python benchmarks/fp8_error.py [--small] [--json FILE]

Three kinds of data: gaussian; a few columns 100,000 times as large; rows spread over eight decades, as gradients of
easy and hard tokens are. SQNR is that which nine tiles (1x128) of ten reach: the large values alone decide a total.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from figures import Row, report
from torch import Tensor

from policy.kernels import fp8_gemm
from policy.kernels.quantize import (
    BLOCKS,
    COLUMNS,
    E4M3_MAX,
    TILES,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_tiles,
    tiles_to_columns,
)


def data(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(rows, columns, generator=generator)
    if kind == "outlier columns":
        x[:, 5::512] *= 1e5
    if kind == "wide rows":
        x *= 10 ** (8 * torch.rand(rows, 1, generator=generator) - 8)
    return x


def per_tensor(x: Tensor) -> Tensor:
    """x after one scale for all of it: what is compared with."""
    scale = x.abs().max() / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def tile_sqnr(x: Tensor, quantised: Tensor) -> float:
    """Signal to noise in dB that 90 % of the 1x128 tiles reach."""
    signal, noise = (value.double().square().unflatten(-1, (-1, 128)).sum(-1) for value in (x, quantised - x))
    return float(10 * (signal / noise).log10().quantile(0.1))


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def quantisers(size: int, generator: torch.Generator) -> list[Row]:
    rows = []
    for kind in ("gaussian", "outlier columns", "wide rows"):
        x = data(kind, size, size, generator)
        if kind == "wide rows":
            x *= 1e4  # tiles of the smallest rows stay above eps
        schemes = {"BF16": x.bfloat16().float(), "FP8 per tensor": per_tensor(x),
                   "FP8 1x128 tiles": dequantize(quantize_tiles(x), TILES),
                   "FP8 1x128 tiles, powers of two": dequantize(quantize_tiles(x, True), TILES)}
        if kind != "wide rows":  # a block or a column has rows of all sizes in it: not for such data
            schemes["FP8 128x128 blocks"] = dequantize(quantize_blocks(x), BLOCKS)
            schemes["FP8 128x1 columns"] = dequantize(quantize_columns(x), COLUMNS)
        rows += [(f"{kind}: {name}", tile_sqnr(x, quantised), "dB") for name, quantised in schemes.items()]
    return rows


def products(size: int, generator: torch.Generator) -> list[Row]:
    """The three products of a linear layer on gaussian data, contraction 1,024 in each."""
    x, w, dy = (data("gaussian", *shape, generator) for shape in ((1024, 1024), (size, 1024), (1024, 1024)))
    forward, weight = x[:size].double() @ w.double().T, dy.double()[:, :size].T @ x.double()
    backward = dy[:size].double() @ x.double()
    free, cached = quantize_tiles(x), quantize_tiles(x, True)
    grad = quantize_columns(dy[:, :size].contiguous())
    return [
        ("Fprop BF16", error(x[:size].bfloat16().float() @ w.bfloat16().float().T, forward), "relative"),
        ("Fprop FP8", error(fp8_gemm.fprop(quantize_tiles(x[:size]), quantize_blocks(w)), forward), "relative"),
        ("Dgrad FP8", error(fp8_gemm.dgrad(quantize_tiles(dy[:size]), quantize_blocks(x)), backward), "relative"),
        ("Wgrad FP8", error(fp8_gemm.wgrad(grad, quantize_columns(x)), weight), "relative"),
        ("Wgrad FP8, cached tiles cut anew, free scales", error(
            fp8_gemm.wgrad(grad, tiles_to_columns(free)), weight), "relative"),
        ("Wgrad FP8, cached tiles cut anew, powers of two", error(
            fp8_gemm.wgrad(grad, tiles_to_columns(cached)), weight), "relative"),
    ]


def promotion(size: int, generator: torch.Generator) -> list[Row]:
    """A sum kept in 13 bits of fraction, cut off, through a contraction of 4,096 of uniform data."""
    a, b = (torch.rand(size, 4096, generator=generator).to(torch.float8_e4m3fn).float() for _ in "ab")
    exact = a.double() @ b.double().T
    rows = []
    for every in (4096, 128):
        total = torch.zeros(size, size)
        for start in range(0, 4096, every):
            partial = torch.zeros(size, size)
            for k in range(start, start + every, 32):  # one FP8 matrix instruction takes 32
                partial = partial + a[:, k:k + 32] @ b[:, k:k + 32].T
                partial = (partial.view(torch.int32) & -(1 << 10)).view(torch.float32)
            total += partial
        rows.append((f"13 bit sums promoted every {every:,}", error(total, exact), "relative"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="matrices of 256 and not of 1,024 rows")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    size, generator = 256 if options.small else 1024, torch.Generator().manual_seed(0)
    rows = quantisers(max(size, 512), generator) + products(size, generator) + promotion(size, generator)
    assert all(math.isfinite(figure) for _, figure, _ in rows)
    report(rows, options.json)


if __name__ == "__main__":
    main()
