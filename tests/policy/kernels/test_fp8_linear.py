"""The FP8 layers against FP64 autograd: signal to quantisation noise of every result, in dB."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from policy.kernels import e5m6, fp8_linear
from policy.kernels.fp8_experts import experts_forward

TOKENS, WIDE, NARROW = 300, 200, 136  # ragged: none is a multiple of 128


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(x):
    """Two channels a thousand times larger than the rest, as activations of large models have."""
    x = x.clone()
    x[:, [3, -5]] *= 1000
    return x


def sqnr(exact, found):
    return float(20 * torch.log10(exact.norm() / (found.double() - exact).norm()))


def sqnr_of_each(function, exact, *arguments, size=1.0):
    """dB of the output and of each argument's gradient, for the same random gradient of the output, `size` large."""
    narrow = [argument.clone().requires_grad_() for argument in arguments]
    wide = [argument.double().requires_grad_() for argument in arguments]
    found, truth = function(*narrow), exact(*wide)
    dy = size * randn(*found.shape, seed=9)
    found.backward(dy)
    truth.backward(dy.double())
    return [sqnr(truth.detach(), found.detach()),
            *(sqnr(one.grad, other.grad) for one, other in zip(wide, narrow, strict=True))]


@pytest.mark.parametrize("after_attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_loses_no_more_than_e4m3_operands_must(after_attention, dtype):
    x, weight = randn(TOKENS, WIDE).to(dtype), randn(NARROW, WIDE, seed=1).to(dtype)
    noise = sqnr_of_each(lambda x, w: fp8_linear.linear(x, w, after_attention=after_attention),
                         functional.linear, x, weight)
    assert min(noise) > 28, noise


def test_a_gradient_that_a_large_batch_made_small_keeps_its_digits():
    x, weight = randn(TOKENS, WIDE), randn(NARROW, WIDE, seed=1)
    assert min(sqnr_of_each(fp8_linear.linear, functional.linear, x, weight, size=1e-11)) > 28
    gate, up = randn(TOKENS, WIDE, seed=2), randn(TOKENS, WIDE, seed=3)
    noise = sqnr_of_each(fp8_linear.swiglu_linear,
                         lambda g, u, w: functional.linear(functional.silu(g) * u, w), gate, up, weight, size=1e-11)
    assert min(noise) > 24, noise


def test_an_outlier_channel_costs_only_its_own_tile():
    x, weight = with_outliers(randn(TOKENS, 512)), randn(NARROW, 512, seed=1)
    quiet = slice(128, 384)  # columns without an outlier
    layer = x.clone().requires_grad_(), weight.clone().requires_grad_()
    fp8_linear.linear(*layer).backward(randn(TOKENS, NARROW, seed=9))
    exact = randn(TOKENS, NARROW, seed=9).double().T @ x.double()
    assert sqnr(exact[:, quiet], layer[1].grad[:, quiet]) > 28


@pytest.mark.parametrize("after_attention", [False, True])
def test_products_of_numbers_that_fp8_holds_are_exact(after_attention):
    """Integers up to 7 with a 7 in every tile have power-of-two scales and no rounding."""
    def integers(rows, columns, seed):
        x = torch.randint(-7, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
        x[::64], x[:, ::64] = 7, 7
        return x

    x, weight, dy = (integers(*shape, seed).requires_grad_() for seed, shape in
                     enumerate([(TOKENS, WIDE), (NARROW, WIDE), (TOKENS, NARROW)]))
    y = fp8_linear.linear(x, weight, after_attention=after_attention)
    y.backward(dy.detach())
    assert torch.equal(y, x @ weight.T)
    assert torch.equal(x.grad, dy @ weight) and torch.equal(weight.grad, dy.T @ x)


def test_leading_dimensions_and_a_bias_are_those_of_a_linear_layer():
    x, weight, bias = randn(2, 5, 3, WIDE), randn(NARROW, WIDE, seed=1), randn(NARROW, seed=2)
    noise = sqnr_of_each(fp8_linear.linear, functional.linear, x, weight, bias)
    assert min(noise[:3]) > 27 and noise[3] > 100


def test_a_swiglu_is_computed_again_from_its_inputs_in_fp8():
    gate, up, weight = randn(TOKENS, NARROW), randn(TOKENS, NARROW, seed=1), randn(WIDE, NARROW, seed=2)
    noise = sqnr_of_each(fp8_linear.swiglu_linear,
                         lambda g, u, w: functional.linear(functional.silu(g) * u, w), gate, up, weight)
    assert noise[0] > 28 and min(noise[1:]) > 24, noise


@pytest.mark.parametrize(("dropped", "size"), [(0, 1.0), (9, 1.0), (0, 1e-11)])
def test_experts_lose_no_more_than_e4m3_operands_must(dropped, size):
    """Four experts, one without a token; `dropped` tokens belong to experts of another rank."""
    index = torch.randint(0, 3, (TOKENS, 2), generator=torch.Generator().manual_seed(3))
    index[:, 1] = (index[:, 0] + 1) % 3
    index[:dropped, 1] = 4
    route = randn(TOKENS, 2, seed=4).sigmoid() * (index < 4)
    x, gate_up, down = randn(TOKENS, WIDE), randn(4, 2 * NARROW, WIDE, seed=5), randn(4, WIDE, NARROW, seed=6)

    def ours(x, route, gate_up, down):
        module = SimpleNamespace(num_experts=4, _is_expert_parallel=bool(dropped), gate_up_proj=gate_up,
                                 down_proj=down)
        return experts_forward(module, x, index, route)

    def exact(x, route, gate_up, down):
        y = torch.zeros_like(x)
        for expert in range(4):
            token, place = torch.where(index == expert)
            gate, up = functional.linear(x[token], gate_up[expert]).chunk(2, -1)
            rows = functional.linear(functional.silu(gate) * up, down[expert])
            y = y.index_add(0, token, rows * route[token, place, None])
        return y

    noise = sqnr_of_each(ours, exact, x, route, gate_up, down, size=size)
    # three roundings of 28.7 dB each stand between x and y: 10 log10(3) dB less
    assert noise[0] > 23 and min(noise[1:]) > 20.5, noise


def test_layers_that_read_the_same_tensor_share_its_copy():
    x, kept = randn(TOKENS, WIDE).requires_grad_(), set()
    weights = [randn(NARROW, WIDE, seed=seed) for seed in range(3)]

    def keep(tensor):
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [fp8_linear.linear(x, weight) for weight in weights]
    assert len(outputs) == 3 and len(kept) == 3 + 2  # three weights, the values and the scales


def test_every_e5m6_number_comes_back():
    codes = torch.arange(4096, dtype=torch.int32)
    numbers = (codes << 4).to(torch.int16).view(torch.float16).float()
    numbers = numbers[numbers.isfinite()]
    rows = numbers[:len(numbers) // 2 * 2].view(2, -1).T.contiguous()
    padded = torch.cat([torch.full((len(rows), 1), e5m6.E5M6_MAX), rows], dim=1)  # so that the scale is 1
    packed = e5m6.pack(padded)
    assert torch.equal(packed.scales, torch.ones(len(rows), 1))
    assert torch.equal(e5m6.unpack(packed, 3), padded)


def test_e5m6_rounds_to_the_nearest_even_and_takes_twelve_bits():
    x = torch.tensor([[1 + 1 / 128, 1 + 3 / 128, 1 + 1.01 / 128, -1 - 3 / 128, 2.0 ** -21, 3 * 2.0 ** -21,
                       e5m6.E5M6_MAX, 0.0]])
    found = e5m6.unpack(e5m6.pack(x), 8)
    assert found[0].tolist() == [1, 1 + 2 / 64, 1 + 1 / 64, -1 - 2 / 64, 0, 2.0 ** -19, e5m6.E5M6_MAX, 0]
    x = randn(64, 256) * torch.logspace(-3, 3, 64)[:, None]
    packed = e5m6.pack(x)
    assert packed.codes.nbytes == x.numel() * 12 / 8
    assert torch.equal(torch.frexp(packed.scales).mantissa, torch.full_like(packed.scales, 0.5))
    assert sqnr(x.double(), e5m6.unpack(packed, 256)) > 46
    assert torch.equal(e5m6.unpack(e5m6.pack(x[:, :131]), 131)[:, :128], e5m6.unpack(packed, 256)[:, :128])
