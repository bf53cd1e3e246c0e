"""What a Triton kernel needs on a Hopper GPU, found without one: compile for sm_90a, ask ptxas.

Says how many registers and how much shared memory a launch takes, whether registers spill to memory, and whether the
matrix units are used at all (`wgmma`). Figures are those of the compiler; nothing runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Usage:
    """Registers a thread, bytes a thread spilled (stores and loads), shared memory a program in bytes, and the PTX."""

    registers: int
    spills: int
    shared_bytes: int
    ptx: str

    @property
    def wgmma(self) -> int:
        """How many Hopper matrix instructions the code has."""
        return self.ptx.count("wgmma.mma_async")


def aot_compile(fn, signature: Mapping[str, str], constexprs: Mapping[str, object],
                options: Mapping[str, int]) -> Usage:
    """Compile `fn` (a `triton.jit` function) for sm_90a as a launch with aligned pointers and sizes would.

    `signature` names the type of each argument that is no constant ("*fp8e4nv", "i32", "fp32"); pointers and integers
    count as divisible by 16, as in the shapes of real models. `options` are num_warps and num_stages.
    Raises TypeError in Triton's interpreter, which has no compiler.
    """
    if not isinstance(fn, triton.JITFunction):
        raise TypeError(f"{fn} is not compiled in this process: unset TRITON_INTERPRET")
    types = {name: signature.get(name, "constexpr") for name in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"
               or kind == "i32"}
    source = ASTSource(fn, types, dict(constexprs), aligned)
    compiled = triton.compile(source, target=HOPPER, options=dict(options))
    ptx = compiled.asm["ptx"]
    said = _ptxas(ptx)
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill", said)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas said nothing about registers of {fn.__name__}: {said}")
    return Usage(int(registers[1]), sum(map(int, spills)), compiled.metadata.shared, ptx)


def _ptxas(ptx: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
