"""The Triton backward of SwiGLU against plain torch, and every buffer wholly written."""

import pytest
import torch

from policy.kernels import swiglu, triton_swiglu
from policy.kernels.quantize import COLUMNS, TILES, Quantized, dequantize, quantize_tiles
from policy.kernels.swiglu import swiglu_backward_quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m, i", [(130, 128), (1, 256)])
def test_gradients_are_the_reference_s_but_for_a_code(m, i, dtype, generator, device, monkeypatch):
    """exp is not the same in every library: a value at a tie may go the other way."""
    gate_up = quantize_tiles(torch.randn(m, 2 * i, generator=generator).to(device), power_of_two=True)
    d_out = torch.randn(m, i, generator=generator).to(dtype).to(device)
    weights = torch.rand(m, generator=generator).to(device)
    empty = torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(triton_swiglu.torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(torch.nan))
        got = swiglu_backward_quantize(gate_up, d_out, weights)
    with monkeypatch.context() as patch:
        patch.setattr(swiglu, "runs_triton", lambda x: False)
        expected = swiglu_backward_quantize(Quantized(*(part.cpu() for part in gate_up)), d_out.cpu(), weights.cpu())
    for name, block in (("hidden", COLUMNS), ("tiles", TILES), ("columns", COLUMNS)):
        mine, theirs = getattr(got, name), getattr(expected, name)
        assert torch.allclose(mine.scales.cpu(), theirs.scales, rtol=1e-5), name
        got_wide = dequantize(Quantized(*(part.cpu() for part in mine)), block)
        assert got_wide.isclose(dequantize(theirs, block), rtol=1e-4).float().mean() > 0.995, name
    assert torch.allclose(got.weights.cpu(), expected.weights, rtol=1e-4, atol=1e-5)
