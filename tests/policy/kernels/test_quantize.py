import math

import pytest
import torch

from policy.kernels.quantize import (
    BLOCKS,
    COLUMNS,
    TILES,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_dual,
    quantize_tiles,
    rmsnorm_quantize,
    swiglu_quantize,
    tiles_to_columns,
)

E4M3 = [2.0**-9 * mantissa if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        for exponent in range(16) for mantissa in range(8)][:127]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_code(value: float) -> int:
    """The E4M3 code nearest to `value`, ties to even, by looking at all of them."""
    code = min(range(127), key=lambda code: (abs(E4M3[code] - abs(value)), code % 2))
    return code | (128 if math.copysign(1, value) < 0 else 0)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_codes_and_scales_follow_the_written_rule(power_of_two):
    x = gaussian(2, 200) * torch.tensor([[1.0], [1e-7]])
    q = quantize_tiles(x, power_of_two)
    for row in range(2):
        for tile, piece in enumerate((x[row, :128], x[row, 128:])):
            scale = max(piece.abs().max(), torch.tensor(1e-4)) / torch.tensor(448.0)
            if power_of_two:
                scale = torch.tensor(2.0 ** math.ceil(math.log2(scale)))
            assert q.scales[row, tile] == scale
            codes = [nearest_code(float(value)) for value in piece / scale]
            assert q.values[row, tile * 128: tile * 128 + 128].view(torch.uint8).tolist() == codes


@pytest.mark.parametrize("quantiser, block", [(quantize_tiles, TILES), (quantize_blocks, BLOCKS),
                                              (quantize_columns, COLUMNS)])
def test_ragged_edges_count_as_padded_with_zeros(quantiser, block):
    x = gaussian(200, 300)
    padded = torch.zeros(256, 384)
    padded[:200, :300] = x
    ragged, whole = quantiser(x), quantiser(padded)
    rows, columns = (200 if block[0] == 1 else 2), (300 if block[1] == 1 else 3)
    assert torch.equal(ragged.scales, whole.scales[:rows, :columns])
    assert torch.equal(ragged.values.view(torch.uint8), whole.values[:200, :300].view(torch.uint8))
    assert torch.equal(dequantize(ragged, block), dequantize(whole, block)[:200, :300])


def test_weights_of_experts_are_quantised_each_for_itself():
    w = gaussian(3, 200, 130)
    whole = quantize_blocks(w)
    assert whole.scales.shape == (3, 2, 2)
    for expert in range(3):
        one = quantize_blocks(w[expert])
        assert torch.equal(whole.scales[expert], one.scales)
        assert torch.equal(dequantize(whole, BLOCKS)[expert], dequantize(one, BLOCKS))


def test_powers_of_two_are_the_least_that_fit_and_exact_in_bf16():
    x = gaussian(64, 256)
    free, power = quantize_tiles(x), quantize_tiles(x, power_of_two=True)
    ratio = power.scales / free.scales
    assert (power.scales.log2() % 1 == 0).all() and (ratio >= 1).all() and (ratio < 2).all()
    wide = dequantize(power, TILES)
    assert torch.equal(wide.bfloat16().float(), wide)
    exact = torch.full((1, 128), 448.0 * 2**-5)
    assert quantize_tiles(exact, power_of_two=True).scales.item() == 2.0**-5


def test_quantising_what_was_quantised_changes_nothing_with_powers_of_two():
    wide = dequantize(quantize_tiles(gaussian(64, 256), power_of_two=True), TILES)
    assert torch.equal(dequantize(quantize_tiles(wide, power_of_two=True), TILES), wide)


def test_cached_tiles_are_cut_into_columns_almost_for_nothing_only_with_powers_of_two():
    x = gaussian(512, 512)

    def added(power_of_two):
        tiles = quantize_tiles(x, power_of_two)
        before, after = dequantize(tiles, TILES), dequantize(tiles_to_columns(tiles), COLUMNS)
        return float((after - before).norm() / x.norm())

    assert added(True) < 2e-3 < 0.02 < added(False)


def test_one_pass_gives_tiles_and_columns_of_gathered_rows():
    x, rows = gaussian(20, 256), torch.randint(20, (150,), generator=torch.Generator().manual_seed(1))
    tiles, columns = quantize_dual(x, rows=rows)
    assert torch.equal(dequantize(tiles, TILES), dequantize(quantize_tiles(x[rows]), TILES))
    assert torch.equal(dequantize(columns, COLUMNS), dequantize(quantize_columns(x[rows]), COLUMNS))


def test_swiglu_and_rmsnorm_are_transformers_own_then_quantised():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

    norm = DeepseekV3RMSNorm(256, eps=1e-6)
    norm.weight.data = gaussian(256, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        x, norm = gaussian(40, 256).to(dtype), norm.to(dtype)
        got = dequantize(rmsnorm_quantize(x, norm.weight, 1e-6), TILES)
        expected = dequantize(quantize_tiles(norm(x)), TILES)
        # another rounding of 1 / sqrt moves a value at a tie to the next code
        assert (~got.isclose(expected, rtol=1e-5)).float().mean() < 0.01
        assert (got - expected).norm() < 5e-3 * expected.norm()
    x = gaussian(40, 512)
    expected = quantize_tiles(torch.nn.functional.silu(x[:, :256]) * x[:, 256:])
    assert torch.equal(dequantize(swiglu_quantize(x), TILES), dequantize(expected, TILES))


def test_zeros_and_values_below_eps_keep_a_finite_scale():
    q = quantize_tiles(torch.zeros(1, 128))
    assert q.scales.item() == torch.tensor(1e-4).div(448).item() and not q.values.float().any()
    assert dequantize(quantize_tiles(torch.full((1, 128), 1e-5)), TILES).max() == pytest.approx(1e-5, rel=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_are_no_rows(dtype):
    for q in (quantize_tiles(torch.empty(0, 256, dtype=dtype)), quantize_columns(torch.empty(0, 256, dtype=dtype))):
        assert q.values.shape == (0, 256) and len(q.scales) == 0
