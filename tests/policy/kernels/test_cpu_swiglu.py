import subprocess
from pathlib import Path

import pytest
import torch

from policy.kernels import cpu_swiglu

SHAPES = ((1, 8), (5, 130), (64, 256))  # rows, width


@pytest.fixture
def torch_forms(monkeypatch):
    """Calls a function with its torch form in place of the compiled one."""
    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(cpu_swiglu, "COMPILED", {})
            return function(*arguments)

    return call


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))).to(dtype)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2 ** -8, "atol": 1e-6}


def test_it_is_compiled_here():
    assert cpu_swiglu._library() is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_swiglu_and_its_gradients_are_those_of_float64(rows, width, dtype, torch_forms):
    both, scale, grad = random(rows, 2 * width, dtype=dtype), random(rows).abs(), random(rows, width, dtype=dtype)
    out, grad_both, grad_scale = torch.empty_like(grad), torch.empty_like(both), torch.empty_like(scale)
    exact = [tensor.double() for tensor in (out, grad_both, grad_scale)]
    torch_forms(cpu_swiglu.swiglu, both.double(), scale.double(), exact[0])
    exact_out_again = grad.double()
    torch_forms(cpu_swiglu.swiglu_backward, both.double(), scale.double(), exact_out_again, *exact[1:])
    cpu_swiglu.swiglu(both, scale, out)
    out_again = grad.clone()
    cpu_swiglu.swiglu_backward(both, scale, out_again, grad_both, grad_scale)
    for mine, theirs in zip((out, grad_both, out_again), (*exact[:2], exact_out_again), strict=True):
        torch.testing.assert_close(mine.double(), theirs, **tolerance(dtype))
    torch.testing.assert_close(grad_scale.double(), exact[2], rtol=1e-5, atol=1e-4)


def test_the_torch_form_of_the_backward_pass_is_autograds(torch_forms):
    both, scale, grad = random(6, 20).double(), random(6).double(), random(6, 10).double()
    both.requires_grad_()
    scale.requires_grad_()
    gate, up = both.chunk(2, 1)
    out = torch.nn.functional.silu(gate) * up * scale[:, None]
    expected = torch.autograd.grad((out * grad).sum(), (both, scale))
    found = torch.empty_like(both), torch.empty_like(scale)
    torch_forms(cpu_swiglu.swiglu_backward, both.detach(), scale.detach(), grad, *found)
    for mine, theirs in zip((grad, *found), (out, *expected), strict=True):
        torch.testing.assert_close(mine, theirs.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_far_from_zero_saturate(dtype, torch_forms):
    gates = torch.tensor([-1e30, -1e4, -100., -88., -20., -0., 0., 20., 88., 100., 1e4, 1e30], dtype=dtype)
    both, scale = torch.stack([gates, torch.ones_like(gates)], 1), torch.ones(len(gates))
    mine, theirs = both.new_empty(len(gates), 1), both.new_empty(len(gates), 1)
    cpu_swiglu.swiglu(both, scale, mine)
    torch_forms(cpu_swiglu.swiglu, both, scale, theirs)
    torch.testing.assert_close(mine[1:], theirs[1:], rtol=2 ** -7 if dtype == torch.bfloat16 else 2e-6, atol=1e-30)
    assert mine[0].abs() < 1e-6  # -1e30 / e^87, where the limit is 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_stays_one(dtype):
    both = torch.ones(3, 8, dtype=dtype)
    both[1, 2] = torch.nan
    out = both.new_empty(3, 4)
    cpu_swiglu.swiglu(both, torch.ones(3), out)
    assert out.isnan().nonzero().tolist() == [[1, 2]]


def test_threads_change_no_bit():
    both, scale = random(33, 64, dtype=torch.bfloat16), random(33)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(both.new_empty(33, 32))
        cpu_swiglu.swiglu(both, scale, found[-1])
    torch.set_num_threads(threads)
    assert found[0].equal(found[1])


def test_without_a_compiler_it_warns_once_and_runs_in_torch(monkeypatch):
    monkeypatch.setattr(cpu_swiglu, "COMPILE", ("no-such-compiler",))
    cpu_swiglu._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="install gcc"):
            out = torch.empty(2, 4)
            cpu_swiglu.swiglu(torch.ones(2, 8), torch.ones(2), out)
        torch.testing.assert_close(out, torch.full((2, 4), torch.nn.functional.silu(torch.tensor(1.)).item()))
    finally:
        cpu_swiglu._library.cache_clear()


def test_sanitisers_find_no_stray_write_and_no_undefined_behaviour(tmp_path):
    """The C source under AddressSanitizer and UBSan, in a program of its own with ragged sizes."""
    caller = tmp_path / "caller.c"
    caller.write_text(f'''
#include "{cpu_swiglu.SOURCE}"
#include <stdlib.h>
int main(void) {{
    for (int64_t rows = 0; rows < 6; rows++)
        for (int64_t width = 1; width < 140; width += 23) {{
            float *both = calloc(2 * rows * width + 1, 4), *grad = calloc(rows * width + 1, 4);
            float *grad_both = malloc(8 * rows * width + 1), *grad_scale = malloc(4 * rows + 1);
            float *scale = calloc(rows + 1, 4);
            swiglu_float(both, scale, grad, rows, width);
            swiglu_backward_float(both, scale, grad, grad_both, grad_scale, rows, width);
            swiglu_bfloat16((uint16_t *)both, scale, (uint16_t *)grad, rows, width);
            swiglu_backward_bfloat16((uint16_t *)both, scale, (uint16_t *)grad, (uint16_t *)grad_both, grad_scale, rows,
                                     width);
            free(both), free(scale), free(grad), free(grad_both), free(grad_scale);
        }}
    return 0;
}}''')
    program = tmp_path / "caller"
    subprocess.run(["gcc", "-g", "-O1", "-Wall", "-Werror", "-fopenmp", "-fsanitize=address,undefined",
                    "-fno-sanitize-recover=all", str(caller), "-o", str(program), "-lm"], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, cwd=Path(tmp_path), timeout=60)
    assert done.returncode == 0, done.stderr
