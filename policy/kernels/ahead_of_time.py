"""What a Triton kernel needs on a Hopper GPU, found without one: compile for sm_90a, ask ptxas.

Says how many registers and how much shared memory a launch takes, whether registers spill to memory, and whether the
matrix units are used at all (`wgmma`). The launches are the library's own, made on meta tensors of real shapes: what is
compiled is what a GPU would run, alignment and all. Figures are those of the compiler; nothing runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver


@dataclass(frozen=True)
class Usage:
    """Registers and spilled bytes (stores and loads) a thread, shared memory and warps a program, and the PTX."""

    registers: int
    spills: int
    shared_bytes: int
    warps: int
    ptx: str

    @property
    def wgmma(self) -> int:
        """How many Hopper matrix instructions the code has."""
        return self.ptx.count("wgmma.mma_async")


class _Hopper:
    """Stands in for Triton's driver where there is no device: names the target, can run nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "sm_90a"

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_launches(call: Callable[[], object]) -> list[Usage]:
    """Compile for sm_90a each kernel that `call` launches, in order, and launch none; give `call` meta tensors.

    Raises TypeError in Triton's interpreter, which has no compiler. Not for use beside threads that launch kernels.
    """
    if triton.knobs.runtime.interpret:
        raise TypeError("kernels are interpreted in this process, not compiled: unset TRITON_INTERPRET")
    compiled, run, active = [], triton.JITFunction.run, driver._active

    def compile_only(kernel, *args, warmup, **options):
        compiled.append(run(kernel, *args, warmup=True, **options))

    triton.JITFunction.run = compile_only
    driver.set_active(_Hopper())
    try:
        call()
    finally:
        triton.JITFunction.run = run
        driver._active = active
    return [_usage(kernel) for kernel in compiled]


def _usage(compiled) -> Usage:
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        words = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill", said)
    if registers is None or not spills:
        raise RuntimeError(f"ptxas said nothing about the registers of {compiled.metadata.name}: {said}")
    return Usage(int(registers[1]), sum(map(int, spills)), compiled.metadata.shared, compiled.metadata.num_warps, ptx)
