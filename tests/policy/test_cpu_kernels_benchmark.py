import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_at_its_smallest_size(tmp_path):
    done = subprocess.run(["env", f"PYTHONPATH={ROOT}", sys.executable, "benchmarks/cpu_kernels.py", "--small",
                           "--json", str(tmp_path / "figures.json")],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 18 and all(row["figure"] > 0 for row in figures)
