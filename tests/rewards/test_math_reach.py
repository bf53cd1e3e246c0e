import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reach_of_the_math_verdicts_is_measured_at_its_smallest_size(tmp_path):
    done = subprocess.run(["env", f"PYTHONPATH={ROOT}", sys.executable, "benchmarks/math_reach.py", "--small", "--json",
                           str(tmp_path / "reach.json")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "reach.json").read_text())
    by_half = {(row["what"], row["half"]): row["ours"] for row in report["figures"] if "half" in row}
    assert by_half["itself", "dev"] == by_half["itself", "held-out"] == 100
    assert by_half["shuffled", "dev"] == by_half["shuffled", "held-out"] == 0
    assert "math-verify alone" in done.stdout


def test_the_answers_are_all_different_and_hold_no_row_against_itself():
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "math_answers.jsonl").read_text().splitlines()]
    assert len({row["gold"] for row in rows}) == len(rows) > 400
    assert all({row["gold"], *row["same"]}.isdisjoint(row["near"]) for row in rows)
