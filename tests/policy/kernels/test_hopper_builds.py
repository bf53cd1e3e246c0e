"""Every launch at DeepSeek-V3's shapes, compiled for sm_90a without a device: what it may take of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
# registers a thread, KiB of shared memory a program; an SM has 65,536 registers and 227 KiB. Compilers differ: Triton
# 3.7 takes 247 registers for log-probs, 3.9 takes 184
BUDGET = {
    "quantise tiles": (72, 1),
    "quantise columns": (112, 16),
    "quantise tiles + columns": (184, 16),
    "gather, quantise tiles + columns": (184, 16),
    "quantise blocks": (112, 1),
    "cached tiles to columns": (128, 16),
    "SwiGLU, quantise tiles": (72, 1),
    "SwiGLU backward, quantise all": (128, 16),
    "RMSNorm, quantise tiles": (72, 1),
    "weighted un-permute": (40, 1),
    "weighted un-permute backward": (40, 1),
    "fp8 linear Fprop": (192, 128),
    "fp8 linear Dgrad": (192, 128),
    "fp8 linear Wgrad": (255, 128),
    "fp8 experts Fprop": (216, 128),
    "fp8 experts Fprop, 32 rows each": (224, 96),
    "fp8 experts Dgrad": (216, 128),
    "fp8 experts Wgrad": (255, 128),
    "bf16 experts Fprop": (128, 128),
    "bf16 experts Fprop, 32 rows each": (128, 96),
    "bf16 experts Dgrad": (128, 128),
    "bf16 experts Wgrad": (144, 128),
    "router": (80, 1),
    "router, replay": (80, 1),
    "log-probs + entropies": (255, 96),
    "gradient of logits": (200, 96),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark times the launches instead")
def test_launches_fit_spill_nothing_and_use_the_matrix_units(tmp_path):
    words = [sys.executable, "benchmarks/kernel_roofline.py", "--small", "--json", str(tmp_path / "f.json")]
    done = subprocess.run(["env", "-u", "TRITON_INTERPRET", f"PYTHONPATH={ROOT}", *words], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["launch"]: row for row in json.loads((tmp_path / "f.json").read_text())["rows"]}
    assert rows.keys() == BUDGET.keys()
    for name, (registers, shared) in BUDGET.items():
        row = rows[name]
        assert row["spilled bytes"] == 0, name
        assert row["registers"] <= registers and row["shared KiB"] <= shared, (name, row)
        assert row["registers"] * row["warps"] * 32 <= 65536, name
        assert (row["wgmma"] > 0) == name.startswith(("fp8", "bf16", "log-probs", "gradient")), name
        assert row["bound us"] > 0
