"""SwiGLU between the experts' matrix products on a CPU, forward and backward, in one pass over memory each.

torch takes a pass, and a new tensor, for each operator of it. `cpu_swiglu.c` is compiled for this processor when a
process first needs it, in a third of a second. float64, and a machine without a C compiler, take the torch form that
stands beside each call.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

SOURCE = Path(__file__).with_suffix(".c")
COMPILE = ("gcc", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared",
           *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()))
COMPILED = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def swiglu(both: Tensor, scale: Tensor, out: Tensor) -> None:
    """Into `out` [rows, width], silu(gate) * up * scale for gate and up side by side in `both` [rows, 2 width].

    scale: [rows], at least FP32.
    """
    if not _call("swiglu", both, scale, out, len(out), out.shape[1]):
        gate, up = both.chunk(2, 1)
        torch.mul(functional.silu(gate), up, out=out).mul_(scale[:, None])


def swiglu_backward(both: Tensor, scale: Tensor, grad: Tensor, grad_both: Tensor, grad_scale: Tensor) -> None:
    """From `grad` [rows, width] of `swiglu`'s output, the gradients `grad_both` and `grad_scale`.

    `grad` then holds the output itself, computed again.
    """
    if _call("swiglu_backward", both, scale, grad, grad_both, grad_scale, *grad.shape):
        return
    (gate, up), (grad_gate, grad_up) = both.chunk(2, 1), grad_both.chunk(2, 1)
    silu, sigmoid, scaled = functional.silu(gate), torch.sigmoid(gate), grad * scale[:, None]
    grad_scale.copy_((grad * silu * up).sum(1))
    grad_gate.copy_(scaled * up * sigmoid * (1 + gate - silu))
    grad_up.copy_(scaled * silu)
    torch.mul(silu, up, out=grad).mul_(scale[:, None])


def _call(name: str, both: Tensor, *arguments: Tensor | int) -> bool:
    """Run the compiled function for the dtype of `both`; False where there is none. Tensors are contiguous."""
    kind, arguments = COMPILED.get(both.dtype), (both, *arguments)
    if kind is None or _library() is None:
        return False
    _function(f"{name}_{kind}", len(arguments))(*[
        argument if isinstance(argument, int) else argument.data_ptr() for argument in arguments])
    return True


@cache
def _function(name: str, arguments: int) -> ctypes._CFuncPtr:
    function = _library()[name]
    function.argtypes, function.restype = [ctypes.c_int64] * arguments, None  # pointers and sizes
    return function


@cache
def _library() -> ctypes.CDLL | None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "cpu_swiglu.so"
        try:
            subprocess.run([*COMPILE, str(SOURCE), "-o", str(built), "-lm"], check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(built))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            warnings.warn(f"the experts run slower: {SOURCE.name} was not compiled ({reason}); "
                          "install gcc", stacklevel=2)
            return None
