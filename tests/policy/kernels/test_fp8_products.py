import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from policy.kernels import fp8_gemm, grouped_gemm
from policy.kernels.quantize import (
    BLOCKS,
    COLUMNS,
    TILES,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_tiles,
)

ROOT = Path(__file__).parents[3]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_block_scales_hold_where_one_scale_a_tensor_breaks(tmp_path):
    done = subprocess.run([sys.executable, "benchmarks/fp8_error.py", "--small", "--json", str(tmp_path / "f.json")],
                          cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    figures = {row["what"]: row["figure"] for row in json.loads((tmp_path / "f.json").read_text())}
    for name, figure in figures.items():
        if "FP8 1x" in name or "FP8 128x" in name:
            assert figure > (26 if name.startswith("outlier") else 30), name  # dB
    assert figures["gaussian: FP8 per tensor"] > 30
    assert figures["outlier columns: FP8 per tensor"] < 12 and figures["wide rows: FP8 per tensor"] < 5
    for name in ("Fprop FP8", "Dgrad FP8", "Wgrad FP8", "Wgrad FP8, cached tiles cut anew, powers of two"):
        assert 0.03 < figures[name] < 0.039, name
    assert figures["Wgrad FP8, cached tiles cut anew, free scales"] > 0.042
    assert figures["13 bit sums promoted every 4,096"] > 10 * figures["13 bit sums promoted every 128"]


def test_products_multiply_what_the_codes_stand_for():
    x, w, dy = gaussian(40, 200), gaussian(130, 200, seed=1), gaussian(40, 130, seed=2)
    tiles, blocks, dy_tiles = quantize_tiles(x), quantize_blocks(w), quantize_tiles(dy)
    columns, dy_columns = quantize_columns(x), quantize_columns(dy)
    for got, a, b in (
            (fp8_gemm.fprop(tiles, blocks), dequantize(tiles, TILES), dequantize(blocks, BLOCKS).T),
            (fp8_gemm.dgrad(dy_tiles, blocks), dequantize(dy_tiles, TILES), dequantize(blocks, BLOCKS)),
            (fp8_gemm.wgrad(dy_columns, columns), dequantize(dy_columns, COLUMNS).T, dequantize(columns, COLUMNS))):
        exact = a.double() @ b.double()
        assert (got - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("fp8", [True, False])
def test_grouped_products_are_each_expert_s_own(fp8):
    """Three experts of which one has no token; three rows at the end are nobody's, and NaN."""
    sizes, n, k = (150, 0, 1), 72, 136
    offsets = torch.tensor(sizes).cumsum(0).int()
    x, dy, w = gaussian(154, k), gaussian(154, n, seed=1), gaussian(3, n, k, seed=2)
    x[151:], dy[151:] = torch.nan, torch.nan
    tiles, dy_tiles, blocks, columns, dy_columns = x, dy, w, x, dy
    if fp8:
        tiles, dy_tiles, blocks = quantize_tiles(x), quantize_tiles(dy), quantize_blocks(w)
        columns, dy_columns = quantize_columns(x[:151]), quantize_columns(dy[:151])
    y, dx = grouped_gemm.fprop(tiles, blocks, offsets), grouped_gemm.dgrad(dy_tiles, blocks, offsets)
    dw = grouped_gemm.wgrad(dy_columns, columns, offsets)
    error = 0.05 if fp8 else 1e-6
    for expert, (start, end) in enumerate(((0, 150), (150, 150), (150, 151))):
        rows = slice(start, end)
        for got, exact in ((y[rows], x[rows].double() @ w[expert].double().T),
                           (dx[rows], dy[rows].double() @ w[expert].double()),
                           (dw[expert], dy[rows].double().T @ x[rows].double())):
            assert got.shape == exact.shape and (got - exact).norm() <= error * exact.norm()
