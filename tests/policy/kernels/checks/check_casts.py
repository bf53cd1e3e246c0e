"""The repair of the interpreter, and a GPU's casts, against the E4M3 and BF16 formats written out by hand."""

import math
import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about the interpreter")


def e4m3(code: int) -> float:
    """OCP 8-bit floating point, E4M3: bias 7, no infinities, all ones is NaN."""
    sign, exponent, mantissa = (-1.0) ** (code >> 7), (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


POSITIVE = [e4m3(code) for code in range(127)]
MIDPOINTS = [(low + high) / 2 for low, high in zip(POSITIVE, POSITIVE[1:], strict=False)]


@triton.jit
def cast_kernel(source, target, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < n).to(target.dtype.element_ty), mask=i < n)


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(values.shape, dtype=dtype, device=values.device)
    cast_kernel[(1,)](values, out, len(values), BLOCK=triton.next_power_of_2(len(values)))
    return out


def fp32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).float().to(device)


def test_every_e4m3_code_widens_to_its_value_and_comes_back(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    wide = cast(codes.view(torch.float8_e4m3fn), torch.float32)
    assert np.array_equal(wide.cpu().numpy(), np.array([e4m3(code) for code in range(256)], np.float32), equal_nan=True)
    numbers = ~wide.isnan()
    assert torch.equal(cast(wide, torch.float8_e4m3fn).view(torch.uint8)[numbers], codes[numbers])


def test_midpoints_of_e4m3_go_to_even_and_their_neighbours_to_the_nearer_code(device):
    middle = fp32(MIDPOINTS, device)
    for sign in (1, -1):
        bit = 0 if sign == 1 else 128
        lower = torch.arange(126, dtype=torch.uint8, device=device) + bit
        for value, expected in ((middle, lower + lower % 2), (middle.nextafter(middle * 0), lower),
                                (middle.nextafter(middle * 2), lower + 1)):
            assert torch.equal(cast(sign * value, torch.float8_e4m3fn).view(torch.uint8), expected)


def test_too_large_values_become_the_largest_e4m3(device):
    codes = cast(fp32([449.0, 1e6, math.inf, -464.0, -math.inf], device), torch.float8_e4m3fn).view(torch.uint8)
    assert codes.tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0xFE]
    assert cast(fp32([math.nan], device), torch.float8_e4m3fn).isnan().all()


def test_bf16_rounds_to_nearest_even(device):
    low = torch.arange(0x3F80, 0x4080, dtype=torch.int16, device=device)  # every mantissa of two binades
    wide = low.view(torch.bfloat16).float()
    middle = (low.int() * 65536 + 0x8000).view(torch.float32)
    assert torch.equal(cast(wide, torch.bfloat16).view(torch.int16), low)
    assert torch.equal(cast(low.view(torch.bfloat16), torch.float32), wide)
    assert torch.equal(cast(middle, torch.bfloat16).view(torch.int16), low + low % 2)
    assert torch.equal(cast(middle.nextafter(middle * 2), torch.bfloat16).view(torch.int16), low + 1)


@triton.jit
def dot_kernel(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_a_dot_multiplies_what_the_codes_stand_for(device, generator, dtype, gemm_error):
    a, b = (torch.randn(32, 32, generator=generator).to(dtype).to(device) for _ in "ab")
    out = torch.empty(32, 32, device=device)
    dot_kernel[(1,)](a, b, out, N=32)
    exact = a.double() @ b.double()
    assert (out - exact).norm() <= gemm_error * exact.norm()


@interpreted
def test_the_interpreter_still_needs_the_repair(triton_interpreter):
    """When this fails, Triton casts right by itself: drop the repair."""
    values = np.array(MIDPOINTS, np.float32)
    own = triton_interpreter(values, tl.float32, tl.float8e4nv, None)
    right = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (own != right).any()
