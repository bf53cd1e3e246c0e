import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_at_its_smallest_size(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the processes in which memory is measured
    import cpu_kernels

    cpu_kernels.main(["--small", "--json", str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 18 and all(row["figure"] > 0 for row in figures)
