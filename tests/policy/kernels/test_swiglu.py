import pytest
import torch

from policy.kernels.quantize import COLUMNS, TILES, dequantize, quantize_tiles
from policy.kernels.swiglu import swiglu_backward_quantize


def test_swiglu_backward_is_autograd_s_but_for_the_codes():
    generator = torch.Generator().manual_seed(0)
    cached = quantize_tiles(torch.randn(140, 512, generator=generator), power_of_two=True)
    weights = torch.rand(140, generator=generator, requires_grad=True)
    d_out = torch.randn(140, 256, generator=generator)
    gate_up = dequantize(cached, TILES).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    out = weights[:, None] * torch.nn.functional.silu(gate) * up
    d_gate_up, d_weights = torch.autograd.grad(out, (gate_up, weights), d_out)
    got = swiglu_backward_quantize(cached, d_out, weights.detach())
    for quantised, block, exact in ((got.hidden, COLUMNS, out), (got.tiles, TILES, d_gate_up),
                                    (got.columns, COLUMNS, d_gate_up)):
        assert (dequantize(quantised, block) - exact).norm() < 0.03 * exact.norm()
    assert torch.allclose(got.weights, d_weights, rtol=1e-4, atol=1e-5)


def test_gate_and_up_that_share_a_tile_are_refused():
    with pytest.raises(ValueError, match="whole tiles of 128"):
        swiglu_backward_quantize(quantize_tiles(torch.ones(2, 128)), torch.ones(2, 64), torch.ones(2))
