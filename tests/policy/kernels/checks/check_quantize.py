"""The Triton quantisers give the reference's bytes and touch nothing else."""

import pytest
import torch

from policy.kernels import quantize, triton_quantize
from policy.kernels.quantize import COLUMNS, TILES, Quantized, _quantize, dequantize

RAGGED = [(1, 128), (130, 256), (37, 200), (128, 16)]


def data(shape, generator, device, dtype=torch.float32):
    """Gaussian with an outlier column, a row of tiny values and a tile of zeros."""
    x = torch.randn(shape, generator=generator)
    x[..., :: 97] *= 1000
    x[..., 0, :] *= 1e-6
    x[..., -1, : min(128, shape[-1])] = 0
    return x.to(dtype).to(device)


def same_bytes(got: Quantized, expected: Quantized):
    assert torch.equal(got.scales.cpu(), expected.scales)
    assert torch.equal(got.values.cpu().contiguous().view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", RAGGED)
def test_tiles_and_columns_are_the_reference_s_byte_for_byte(shape, power_of_two, generator, device):
    x = data(shape, generator, device)
    tiles, columns = _quantize(x.cpu(), TILES, power_of_two), _quantize(x.cpu(), COLUMNS, power_of_two)
    same_bytes(quantize.quantize_tiles(x, power_of_two), tiles)
    same_bytes(quantize.quantize_columns(x, power_of_two), columns)
    for got, expected in zip(quantize.quantize_dual(x, power_of_two), (tiles, columns), strict=True):
        same_bytes(got, expected)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", [(130, 200), (3, 40, 130)])
def test_blocks_are_the_reference_s_byte_for_byte(shape, power_of_two, generator, device):
    w = data(shape, generator, device)
    same_bytes(quantize.quantize_blocks(w, power_of_two), _quantize(w.cpu(), quantize.BLOCKS, power_of_two))


def test_bf16_and_strided_inputs_and_leading_dimensions(generator, device):
    x = data((6, 40, 512), generator, device, torch.bfloat16)[:, :, 128:384]
    same_bytes(quantize.quantize_tiles(x), _quantize(x.cpu(), TILES, False))
    flat = x[0]
    same_bytes(quantize.quantize_columns(flat), _quantize(flat.cpu(), COLUMNS, False))


def test_gathered_rows_are_quantised_as_if_they_lay_in_that_order(generator, device):
    x, rows = data((20, 130), generator, device), torch.randint(20, (140,), generator=generator).to(device)
    for got, block in zip(quantize.quantize_dual(x, rows=rows), (TILES, COLUMNS), strict=True):
        same_bytes(got, _quantize(x[rows].cpu(), block, False))
    same_bytes(quantize.quantize_columns(x, rows=rows), _quantize(x[rows].cpu(), COLUMNS, False))


def test_cached_tiles_are_cut_into_columns(generator, device):
    tiles = quantize.quantize_tiles(data((130, 200), generator, device), power_of_two=True)
    expected = _quantize(dequantize(Quantized(tiles.values.cpu(), tiles.scales.cpu()), TILES), COLUMNS, True)
    same_bytes(quantize.tiles_to_columns(tiles), expected)
    rows = torch.randint(130, (40,), generator=generator).to(device)
    gathered = Quantized(tiles.values.view(torch.uint8)[rows].view(torch.float8_e4m3fn), tiles.scales[rows])
    same_bytes(quantize.tiles_to_columns(tiles, rows), _quantize(
        dequantize(Quantized(gathered.values.cpu(), gathered.scales.cpu()), TILES), COLUMNS, True))


def test_rmsnorm_is_the_reference_s_byte_for_byte_where_its_sum_is_exact(generator, device, monkeypatch):
    x = torch.randint(-8, 9, (5, 256), generator=generator).to(torch.bfloat16).to(device)
    weight = torch.randn(256, generator=generator).to(torch.bfloat16).to(device)
    got = quantize.rmsnorm_quantize(x, weight, 1e-6)
    same_bytes(got, reference(quantize.rmsnorm_quantize, monkeypatch, x.cpu(), weight.cpu(), 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_rmsnorm_differ_by_a_code_at_most(dtype, generator, device, monkeypatch):
    """exp, and the order of a sum, are not the same in every library: a value at a tie may go the other way."""
    x, weight = data((33, 400), generator, device, dtype), torch.randn(400, generator=generator).to(dtype).to(device)
    for got, expected in (
            (quantize.swiglu_quantize(x), reference(quantize.swiglu_quantize, monkeypatch, x.cpu())),
            (quantize.rmsnorm_quantize(x, weight, 1e-6),
             reference(quantize.rmsnorm_quantize, monkeypatch, x.cpu(), weight.cpu(), 1e-6))):
        assert torch.allclose(got.scales.cpu(), expected.scales, rtol=1e-5 if dtype == torch.float32 else 8e-3)
        steps = (got.values.cpu().view(torch.uint8).int() - expected.values.view(torch.uint8).int()).abs()
        assert steps.max() <= 1 and (steps > 0).float().mean() < 0.01


def test_every_byte_of_the_outputs_is_written_and_none_beside_them(generator, device, monkeypatch):
    """Buffers come filled with NaN and 32 canary bytes longer than needed."""
    buffers = []

    def poisoned(*shape, dtype=torch.float32, device=None):
        shape = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
        count = torch.Size(shape).numel()
        buffers.append(torch.full((count * dtype.itemsize + 32,), 0xFF, dtype=torch.uint8, device=device))
        return buffers[-1][: count * dtype.itemsize].view(dtype).view(shape)

    x, w = data((45, 200), generator, device), data((3, 40, 130), generator, device)
    monkeypatch.setattr(triton_quantize.torch, "empty", poisoned)
    outputs = [*quantize.quantize_dual(x), quantize.quantize_tiles(x), quantize.quantize_blocks(w),
               quantize.swiglu_quantize(x), quantize.rmsnorm_quantize(x, x[1], 1e-6)]
    monkeypatch.undo()
    for output in outputs:
        assert not output.values.float().isnan().any() and not output.scales.isnan().any()
    assert buffers and all((buffer[-32:] == 0xFF).all() for buffer in buffers)
    spare = buffers[2][:-32].view(200, 48)[:, 45:]  # the columns' padding from 45 to 48 rows
    assert (spare == 0xFF).all()


def test_nothing_to_quantise_is_nothing(device):
    tiles, columns = quantize.quantize_dual(torch.empty(0, 256, device=device))
    assert tiles.values.shape == (0, 256) and tiles.scales.shape == (0, 2) and columns.scales.shape == (0, 256)


def test_a_value_that_is_no_number_stays_none(device):
    x = torch.ones(4, 256, device=device)
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    back = dequantize(quantize.quantize_tiles(x), TILES)
    assert back[1, 3].isnan() and not back[2, 200].isfinite() and back[[0, 3]].isfinite().all()


def reference(operation, monkeypatch, *operands):
    """What `operation` gives in plain torch."""
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "runs_triton", lambda x: False)
        return operation(*operands)
