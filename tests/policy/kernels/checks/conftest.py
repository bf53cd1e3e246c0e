"""Where the Triton sources run: on a GPU, or in Triton's interpreter with its number formats repaired.

The files here are named check_*.py so that pytest does not collect them by itself: Triton decides at import whether it
interprets, so `test_interpreter.py` and `test_on_gpu.py` run them in a process of their own.
"""

import os

import numpy as np
import pytest
import torch


def cast_as_torch(data, source, target, rounding=None):
    """Stands in for the interpreter's `_convert_float`: bits of `source` to bits of `target`, as sm_90 converts.

    Rounds to nearest even. What is too large for E4M3 becomes 448, as `cvt.rn.satfinite` makes it.
    """
    formats = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2, "bf16": torch.bfloat16,
               "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    if getattr(rounding, "name", "RTNE") != "RTNE":
        raise NotImplementedError(f"rounding {rounding}: only to nearest even")
    bits = torch.from_numpy(np.ascontiguousarray(data).copy().view(f"i{source.primitive_bitwidth // 8}"))
    wide = bits.view(formats[source.name])
    if target.name == "fp8e4nv":
        wide = wide.float().clamp(-448.0, 448.0)
    cast = wide.to(formats[target.name])
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[cast.element_size()]
    return cast.view(whole).numpy().view(f"u{cast.element_size()}").reshape(np.shape(data))


@pytest.fixture(scope="session", autouse=True)
def triton_interpreter():
    """The interpreter's own cast loses carries, and its dot reads BF16 as integers: both replaced by torch's casts.

    Gives the interpreter's own cast, or None where there is a GPU and no interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield None
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def widen(operand):
        if operand.dtype.name == "fp32":
            return operand.data
        return cast_as_torch(operand.data, operand.dtype.scalar, tl.float32).view(np.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(widen(a), widen(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    own_cast = interpreter._convert_float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", cast_as_torch)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield own_cast


@pytest.fixture
def device() -> torch.device:
    """Where tensors of a check live."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture
def gemm_error(device) -> float:
    """Relative L2 error against FP64 of the same operands: an FP32 sum, or Hopper's 14 bit sums within 128."""
    return 1e-6 if device.type == "cpu" else 2e-3


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
