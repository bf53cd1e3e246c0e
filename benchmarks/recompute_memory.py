"""Memory and time of a training pass with each part recomputed, on layers of DeepSeek-V3's proportions, in FP32.

    python benchmarks/recompute_memory.py [--small] [--json FILE]

The model is DeepSeek-V3 at a sixteenth of its width with 8 layers and 32 experts. Each choice runs in a process of its
own. "kept" is what the forward pass leaves alive for the backward pass: storages that operators made and that are
still there when it ends. Hooks on saved tensors would miss what checkpointing itself holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from figures import Row, report
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV3Config

from policy.model import new_policy
from policy.presets import tiny_config
from policy.recompute import recompute

CHOICES = ("none", "norm", "mla_up", "swiglu", "norm+mla_up+swiglu")
MIB = 2**20


class Alive(TorchDispatchMode):
    """Knows every storage an operator made while it is entered; `nbytes` sums those that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = reference, storage.nbytes()
        return found

    def nbytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def shape(small: bool) -> DeepseekV3Config:
    """V3's ratios: queries 3.4, keys and values 4.6 times the hidden width, 8 experts of 0.29 a token."""
    config = tiny_config(hidden_size=64 if small else 448, layers=2 if small else 8, routed_experts=32, vocab_size=1024)
    heads = 4 if small else 16
    config.update({"num_attention_heads": heads, "num_key_value_heads": heads, "qk_nope_head_dim": 64,
                   "v_head_dim": 64, "qk_rope_head_dim": 32, "qk_head_dim": 96, "head_dim": 32,
                   "q_lora_rank": 96, "kv_lora_rank": 32, "intermediate_size": 1152, "moe_intermediate_size": 128,
                   "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 0})
    return config


def measure(parts: list[str], small: bool) -> dict[str, float | str]:
    """Bytes kept, peak resident above the model, CPU seconds of the best of three passes, hash of the gradients."""
    model = new_policy(shape(small), seed=0).train()
    recompute(model, parts)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1024, (2, 32) if small else (4, 512), generator=generator)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).fill_(0)  # written, so that its pages are there from the start
    before, seconds = _peak(), []
    for _ in range(3):
        began = time.process_time()
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).mean().backward()
        seconds.append(time.process_time() - began)
    peak = _peak() - before
    with Alive() as alive:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    kept = alive.nbytes() - hidden.untyped_storage().nbytes()
    torch.set_num_threads(1)  # sums over several threads differ from run to run, whatever is recomputed
    model.zero_grad()
    model(input_ids=ids[:1], use_cache=False).logits.logsumexp(-1).mean().backward()
    gradients = hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None))
    return {"kept": kept, "peak": peak, "seconds": min(seconds), "gradients": gradients.hexdigest()}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--choice", help="measure one choice in this process and print it as JSON")
    options = parser.parse_args(arguments)
    if options.choice:
        print(json.dumps(measure([part for part in options.choice.split("+") if part != "none"], options.small)))
        return
    rows: list[Row] = []
    found = {}
    for choice in ("none", CHOICES[-1]) if options.small else CHOICES:
        command = [sys.executable, __file__, "--choice", choice, *(["--small"] if options.small else [])]
        found[choice] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows += [(f"{choice}: kept for the backward pass", found[choice]["kept"] / MIB, "MiB"),
                 (f"{choice}: peak resident above the model", found[choice]["peak"] / MIB, "MiB"),
                 (f"{choice}: kept, against none", found[choice]["kept"] / found["none"]["kept"], "x"),
                 (f"{choice}: CPU time, against none", found[choice]["seconds"] / found["none"]["seconds"], "x")]
    same = len({figures["gradients"] for figures in found.values()}) == 1
    rows.append(("gradients equal in every bit", float(same), "1 = yes"))
    report(rows, options.json)


if __name__ == "__main__":
    main()
