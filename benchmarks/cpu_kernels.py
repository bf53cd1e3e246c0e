"""Experts and log-probs on a CPU, beside transformers, the plain path and the bare matrix products.

    python benchmarks/cpu_kernels.py [--small] [--json FILE]

Everything is timed in turn in one process, forward and backward; figures are medians. "bare products" are the six
matrix products of the experts, on rows that lie ready. The allocator is set as in a stage. Peak memory is that of one
step in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from figures import Row, report
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

from pipeline.ray_session import ALLOCATOR
from policy.kernels.experts import IMPLEMENTATION
from policy.kernels.logprob import linear_logprobs
from policy.presets import tiny_config


@dataclass(frozen=True)
class Experts:
    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int


SHAPES = (Experts("tiny", 128, 64, 16, 2, 2048), Experts("mid", 512, 256, 64, 6, 8192))
ROUNDS = {"tiny": 40, "mid": 5}
HEADS = (("tiny", 2048, 128, 1024), ("mid", 2048, 256, 32768))  # tokens, hidden, vocabulary


def alternate(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each run, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}


def experts_seconds(shape: Experts, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    config = tiny_config(hidden_size=shape.hidden, routed_experts=shape.experts)
    config.moe_intermediate_size = shape.intermediate
    module = DeepseekV3Experts(config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    hidden, target = (torch.randn(shape.tokens, shape.hidden).to(dtype) for _ in range(2))
    indices = torch.rand(shape.tokens, shape.experts).topk(shape.top_k, -1).indices
    weights = torch.rand(shape.tokens, shape.top_k, requires_grad=True)
    hidden.requires_grad_()

    def run(implementation: str) -> Callable[[], None]:
        def step() -> None:
            module.config._experts_implementation = implementation
            hidden.grad = weights.grad = None
            module.zero_grad()
            module(hidden, indices, weights).backward(target)

        return step

    runs = {"posttrain": run(IMPLEMENTATION), "grouped": run("grouped_mm"), "eager": run("eager"),
            "bare products": bare_products(module, indices, hidden.detach())}
    return alternate(runs, rounds)


def bare_products(module: DeepseekV3Experts, indices: torch.Tensor, hidden: torch.Tensor) -> Callable[[], None]:
    gate_up, down = module.gate_up_proj.detach(), module.down_proj.detach()
    counts = torch.bincount(indices.reshape(-1), minlength=len(gate_up)).tolist()
    rows, width = indices.numel(), down.shape[2]
    inputs, outputs = (hidden.new_empty(rows, hidden.shape[1]).normal_() for _ in range(2))
    gated, grad_gated = (hidden.new_empty(rows, width).normal_() for _ in range(2))
    both = hidden.new_empty(rows, 2 * width).normal_()
    grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)

    def step() -> None:
        start = 0
        for expert, count in enumerate(counts):
            part = slice(start, start + count)
            torch.mm(inputs[part], gate_up[expert].t(), out=both[part])
            torch.mm(gated[part], down[expert].t(), out=outputs[part])
            torch.mm(outputs[part], down[expert], out=grad_gated[part])
            torch.mm(outputs[part].t(), gated[part], out=grad_down[expert])
            torch.mm(both[part].t(), inputs[part], out=grad_gate_up[expert])
            torch.mm(both[part], gate_up[expert], out=inputs[part])
            start += count

    return step


def head_step(kind: str, tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> Callable[[], None]:
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(vocabulary, width)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,))

    def step() -> None:
        hidden.grad = weight.grad = None
        if kind == "posttrain":
            logprobs, entropies, _ = linear_logprobs(hidden, weight, targets)
        else:
            every = torch.log_softmax((hidden @ weight.t()).float(), -1)
            logprobs = every.gather(1, targets[:, None])[:, 0]
            entropies = -(every.exp() * every).sum(-1)
        (logprobs.sum() + 0.01 * entropies.sum()).backward()

    return step


def peaks_mib(steps: Sequence[tuple[str, str]], shape: Sequence[int]) -> list[float]:
    """Peak resident memory of a step of each (kind, dtype) above that before it, each in a fork of a fresh process."""
    code = f"""
import os, torch, cpu_kernels
def resident(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
for kind, dtype in {steps}:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    cpu_kernels.head_step(kind, 64, 64, 64, getattr(torch, dtype))()  # libraries load their code
    step = cpu_kernels.head_step(kind, *{shape}, getattr(torch, dtype))
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = resident()
    step()
    print((resident() - before) / 1024, flush=True)
    os._exit(0)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True,
                          check=True)
    return [float(line) for line in done.stdout.split()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the tiny shapes, two rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows: list[Row] = []
    for shape in SHAPES[:1] if options.small else SHAPES:
        rounds = 2 if options.small else ROUNDS[shape.name]
        for dtype in (torch.float32, torch.bfloat16):
            seconds = experts_seconds(shape, dtype, rounds)
            label = f"experts, {shape.name}, {str(dtype).removeprefix('torch.')}"
            rows.append((f"{label}: bare products", 1000 * seconds["bare products"], "ms"))
            rows.append((f"{label}: posttrain", 1000 * seconds["posttrain"], "ms"))
            rows.append((f"{label}: over bare products", seconds["posttrain"] / seconds["bare products"], "x time"))
            for other in ("grouped", "eager"):
                rows.append((f"{label}: transformers {other}", seconds[other] / seconds["posttrain"], "x time"))
    for name, *shape in HEADS[:1] if options.small else HEADS:
        steps = []
        for dtype in ("float32", "bfloat16"):
            label = f"log-probs, {name}, {dtype}"
            seconds = alternate({kind: head_step(kind, *shape, getattr(torch, dtype))
                                 for kind in ("posttrain", "whole logits")}, 2 if options.small else ROUNDS[name])
            rows.append((f"{label}: posttrain", 1000 * seconds["posttrain"], "ms"))
            rows.append((f"{label}: whole logits", seconds["whole logits"] / seconds["posttrain"], "x time"))
            steps += [(kind, dtype) for kind in seconds]
        rows += [(f"log-probs, {name}, {dtype}: {kind}", peak, "MiB")
                 for (kind, dtype), peak in zip(steps, peaks_mib(steps, shape), strict=True)]
    report(rows, options.json)


if __name__ == "__main__":
    if not ALLOCATOR.items() <= os.environ.items():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    main()
