"""How near the kernels come to what an H100 can do, at DeepSeek-V3's shapes.

    python benchmarks/kernel_roofline.py [--small] [--json FILE]

With a GPU: the time of each launch and its share of the roofline, max(FLOP / peak, bytes / bandwidth). Without one:
what the compiler says each launch takes on a Hopper GPU (registers, spills, shared memory, matrix instructions) and
the bound alone. Peaks are those of an H100 or H800: 989 TFLOP/s BF16, 1979 FP8, 3.35 TB/s.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor

from policy.kernels import (
    triton_gemm,
    triton_logprob,
    triton_permute,
    triton_quantize,
    triton_router,
    triton_swiglu,
)
from policy.kernels.ahead_of_time import compile_launches
from policy.kernels.permute import Order
from policy.kernels.quantize import Quantized

PEAK = {"fp8": 1979e12, "bf16": 989e12}
BANDWIDTH = 3.35e12
HIDDEN, EXPERT_WIDTH, ROUTED, TOP_K, VOCAB = 7168, 2048, 256, 8, 129280


@dataclass(frozen=True)
class Case:
    """One operation: `call` launches it, `flop` and `bytes` it cannot do without, `kind` of multiplication."""

    name: str
    call: Callable[[], object]
    bytes: float
    flop: float = 0
    kind: str = "bf16"

    @property
    def bound(self) -> float:
        """Seconds that an H100 needs at least."""
        return max(self.flop / PEAK[self.kind], self.bytes / BANDWIDTH)


def cases(device: str, tokens: int, experts: int) -> list[Case]:
    """The launches of a layer of `experts` local experts for `tokens` tokens; on "meta" they hold no data."""
    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)

    def fp8(shape: tuple[int, ...], *scales: int) -> Quantized:
        return Quantized(randn(*shape, dtype=torch.float8_e4m3fn), torch.rand(scales, device=device) + 0.5)

    def tiles(m: int, k: int) -> Quantized:
        return fp8((m, k), m, k // 128)

    def columns(m: int, k: int) -> Quantized:
        turned = fp8((k, m), m // 128, k)
        return Quantized(turned.values.T, turned.scales)

    def offsets(rows: int) -> Tensor:
        return torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)

    n, rows, few = 2 * EXPERT_WIDTH, tokens * TOP_K // 2, 32 * experts
    cached = tiles(tokens, HIDDEN)
    x, gate_up, spread = randn(tokens, HIDDEN), randn(rows, n), randn(tokens * TOP_K, HIDDEN)
    chosen = torch.randint(tokens, (rows,), device=device)
    places = torch.randperm(tokens * TOP_K, device=device)
    order = Order(torch.argsort(places), places.view(tokens, TOP_K), offsets(tokens * TOP_K // experts * experts))
    weights = torch.rand(tokens, TOP_K, device=device)
    pairs, d_hidden, gates = tiles(rows, n), randn(rows, n // 2), torch.rand(rows, device=device)
    size, gathered = tokens * HIDDEN, rows * HIDDEN
    found = [
        Case("quantise tiles", lambda: triton_quantize.tiles(x, False), 3 * size),
        Case("quantise columns", lambda: triton_quantize.columns(x, False, None), 3 * size),
        Case("quantise tiles + columns", lambda: triton_quantize.dual(x, False, None), 4 * size),
        Case("gather, quantise tiles + columns", lambda: triton_quantize.dual(x, False, chosen),
             2 * size + 2 * gathered),
        Case("quantise blocks", lambda: triton_quantize.blocks(x, False), 3 * size),
        Case("cached tiles to columns", lambda: triton_quantize.tiles_to_columns(cached, None), 2 * size),
        Case("SwiGLU, quantise tiles", lambda: triton_quantize.swiglu(gate_up, False), rows * (2 * n + n // 2)),
        Case("SwiGLU backward, quantise all", lambda: triton_swiglu.swiglu_backward(pairs, d_hidden, gates),
             rows * (n + n + n // 2 + 2 * n)),
        Case("RMSNorm, quantise tiles", lambda: triton_quantize.rmsnorm(x, x[0], 1e-6, False), 3 * size),
        Case("weighted un-permute", lambda: triton_permute.unpermute(spread, weights, order), 2 * size * (TOP_K + 1)),
        Case("weighted un-permute backward", lambda: triton_permute.unpermute_backward(x, spread, weights, order),
             2 * size * (2 * TOP_K + 1)),
    ]

    def product(name: str, kind: str, m: int, groups: int, call: Callable[[], object], wide: int) -> None:
        """`wide` is the element size of the result: rows [m, n] or, for Wgrad, weights [groups, n, hidden]."""
        element = 1 if kind == "fp8" else 2
        weight = groups * n * HIDDEN
        moved = element * m * (n + HIDDEN) + wide * weight if "Wgrad" in name else \
            element * (m * HIDDEN + weight) + wide * m * n if "Fprop" in name else \
            element * (m * n + weight) + wide * m * HIDDEN
        found.append(Case(f"{kind} {name}", call, moved, 2 * m * n * HIDDEN, kind))

    bf16, fp32 = torch.bfloat16, torch.float32
    linear, stack = fp8((1, n, HIDDEN), 1, n // 128, HIDDEN // 128), \
        fp8((experts, n, HIDDEN), experts, n // 128, HIDDEN // 128)
    a, b, c, d = tiles(tokens, HIDDEN), tiles(tokens, n), columns(tokens, n), columns(tokens, HIDDEN)
    product("linear Fprop", "fp8", tokens, 1, lambda: triton_gemm.fprop(a, linear, None, bf16), 2)
    product("linear Dgrad", "fp8", tokens, 1, lambda: triton_gemm.dgrad(b, linear, None, bf16), 2)
    product("linear Wgrad", "fp8", tokens, 1, lambda: triton_gemm.wgrad(c, d, None, fp32), 4)
    ends, few_ends = offsets(rows), offsets(few)
    e, f, g, h, i = tiles(rows, HIDDEN), tiles(rows, n), columns(rows, n), columns(rows, HIDDEN), tiles(few, HIDDEN)
    product("experts Fprop", "fp8", rows, experts, lambda: triton_gemm.fprop(e, stack, ends, bf16), 2)
    product("experts Fprop, 32 rows each", "fp8", few, experts, lambda: triton_gemm.fprop(i, stack, few_ends, bf16), 2)
    product("experts Dgrad", "fp8", rows, experts, lambda: triton_gemm.dgrad(f, stack, ends, bf16), 2)
    product("experts Wgrad", "fp8", rows, experts, lambda: triton_gemm.wgrad(g, h, ends, fp32), 4)
    u, v, w = randn(rows, HIDDEN), randn(rows, n), randn(experts, n, HIDDEN)
    product("experts Fprop", "bf16", rows, experts, lambda: triton_gemm.fprop(u, w, ends, bf16), 2)
    product("experts Fprop, 32 rows each", "bf16", few, experts,
            lambda: triton_gemm.fprop(u[:few], w, few_ends, bf16), 2)
    product("experts Dgrad", "bf16", rows, experts, lambda: triton_gemm.dgrad(v, w, ends, bf16), 2)
    product("experts Wgrad", "bf16", rows, experts, lambda: triton_gemm.wgrad(v, u, ends, fp32), 4)
    head, targets, figures = randn(VOCAB, HIDDEN), chosen[:tokens], torch.rand(tokens, device=device)
    scores, bias = torch.rand(tokens, ROUTED, device=device), torch.rand(ROUTED, device=device)
    replayed = torch.randint(ROUTED, (tokens, TOP_K), device=device)
    logits, read = 2 * tokens * HIDDEN * VOCAB, 2 * (tokens + VOCAB) * HIDDEN
    found += [
        Case("router", lambda: triton_router.launch(scores, bias, 8, 4, TOP_K, 2.5, True, None),
             4 * tokens * (ROUTED + 3 * TOP_K)),
        Case("router, replay", lambda: triton_router.launch(scores, bias, 8, 4, TOP_K, 2.5, True, replayed),
             4 * tokens * (ROUTED + 5 * TOP_K)),
        Case("log-probs + entropies", lambda: triton_logprob.statistics(x, head, targets, 1.0), read, logits),
        Case("gradient of logits", lambda: triton_logprob.logit_gradient(
            x, head, targets, figures, figures, figures, None, 1.0), read + 2 * tokens * VOCAB, logits)]
    return found


def compiled(case: Case) -> dict[str, float]:
    """What the compiler says it takes on a Hopper GPU: the most of its launches, where it is several."""
    usages = compile_launches(case.call)
    return {"registers": max(usage.registers for usage in usages), "spilled bytes": sum(u.spills for u in usages),
            "shared KiB": max(usage.shared_bytes for usage in usages) / 1024,
            "warps": max(usage.warps for usage in usages), "wgmma": sum(usage.wgmma for usage in usages)}


def timed(case: Case) -> dict[str, float]:
    """Median milliseconds of the launch on this GPU, and the bound's share of them."""
    milliseconds = triton.testing.do_bench(case.call, return_mode="median")
    return {"ms": milliseconds, "of roofline %": 100 * 1000 * case.bound / milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="an eighth of the tokens and experts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    tokens, experts = (512, 4) if options.small else (4096, 32)
    rows = [{"launch": case.name, "bound us": 1e6 * case.bound, "by": "bytes" if case.bytes / BANDWIDTH >= case.bound
             else "FLOP", **(timed if on_gpu else compiled)(case)}
            for case in cases("cuda" if on_gpu else "meta", tokens, experts)]
    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.4g}" for value in row.values()))
    where = torch.cuda.get_device_name() if on_gpu else "no GPU: compiled for sm_90a, not run"
    console = Console(width=120)
    console.print(f"{tokens} tokens, {experts} local experts, hidden {HIDDEN}; {where}", table, sep="\n")
    if options.json:
        options.json.write_text(json.dumps({"where": where, "tokens": tokens, "experts": experts, "torch":
                                            torch.__version__, "triton": triton.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
