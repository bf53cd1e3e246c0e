"""The routed experts in C++: everything between the tokens and the sums of what their experts return.

`cpu_experts.cpp` is compiled for this processor when a process first needs it, in a second. Its products are oneDNN's
micro kernels for one core, which torch exports: on the rows of one expert they are up to ten times as fast as
`torch.mm`, since what is brought into their layout stays in cache and is used again.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARIES = Path(torch.__file__).parent / "lib"
COMPILE = ("g++", "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC",
           "-shared", *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()))
NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
LINE = 64  # bytes, of which rows of hidden and intermediate size are multiples


def runs(gate_up: Tensor) -> bool:
    """Whether experts of this dtype and shape run here: FP32, or BF16 where the processor has matrix tiles (AMX)."""
    _, both, hidden = gate_up.shape
    if gate_up.dtype not in NAMES or hidden * gate_up.itemsize % LINE or both * gate_up.itemsize % (2 * LINE):
        return False
    return _library() is not None and (gate_up.dtype == torch.float32 or _library().has_bfloat16())


class Experts(torch.autograd.Function):
    """The weighted sum of each token's experts, [tokens, hidden], as `runs` takes them.

    hidden: [tokens, hidden]; gate_up: [experts, 2 width, hidden]; down: [experts, hidden, width]; indices: int64
    [tokens, top_k], the experts of each token; weights: [tokens, top_k]. Raises ValueError where shapes do not fit, and
    IndexError where `indices` names an expert that is not there.
    """

    @staticmethod
    def forward(ctx, hidden, gate_up, down, indices, weights):
        if indices.shape != weights.shape or len(indices) != len(hidden) or hidden.shape[1] != gate_up.shape[2]:
            raise ValueError(f"hidden {[*hidden.shape]}, indices {[*indices.shape]}, weights {[*weights.shape]} and "
                             f"gate_up {[*gate_up.shape]} do not fit together")
        hidden, gate_up, down, indices = (tensor.contiguous() for tensor in (hidden, gate_up, down, indices))
        scale, rows = weights.float().contiguous(), indices.numel()
        order = torch.empty(2 * rows + len(gate_up) + 2, dtype=torch.int32)  # how rows lie, for `backward` too
        projected, returned = hidden.new_empty(rows, gate_up.shape[1]), hidden.new_empty(rows, hidden.shape[1])
        out = torch.empty_like(hidden)
        if not _call("forward", indices.shape, hidden, gate_up, down, indices, scale, order, projected, returned, out):
            raise IndexError(f"indices: experts {indices.min()} to {indices.max()} where there are {len(gate_up)}")
        ctx.save_for_backward(hidden, gate_up, down, scale, order, projected)
        ctx.weights_dtype = weights.dtype
        return out

    @staticmethod
    def backward(ctx, grad_out):
        hidden, gate_up, down, scale, order, projected = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in (hidden, gate_up, down, scale)]
        returned = hidden.new_empty(len(projected), hidden.shape[1])
        _call("backward", scale.shape, hidden, gate_up, down, scale, order, projected, grad_out.contiguous(), returned,
              *gradients)
        return *gradients[:3], None, gradients[3].to(ctx.weights_dtype)


def _call(name: str, choices: Sequence[int], hidden: Tensor, gate_up: Tensor, *tensors: Tensor) -> bool:
    tensors = (hidden, gate_up, *tensors)
    experts, both, size = gate_up.shape
    function = _function(f"{name}_{NAMES[gate_up.dtype]}", len(tensors) + 5)
    return function(*[tensor.data_ptr() for tensor in tensors], *choices, experts, size, both // 2)


@cache
def _function(name: str, arguments: int) -> ctypes._CFuncPtr:
    function = _library()[name]
    function.argtypes, function.restype = [ctypes.c_int64] * arguments, ctypes.c_bool  # pointers and sizes
    return function


@cache
def _library() -> ctypes.CDLL | None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "cpu_experts.so"
        command = [*COMPILE, str(SOURCE), "-o", str(built), f"-L{LIBRARIES}", "-ltorch_cpu"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
            library = ctypes.CDLL(str(built))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            warnings.warn(f"the experts run slower: {SOURCE.name} was not compiled ({reason}); install g++",
                          stacklevel=2)
            return None
    library.has_bfloat16.restype = ctypes.c_bool
    return library
