import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_set_finds_what_was_planted_and_is_the_same_after_a_kill(tmp_path):
    """The smallest size of the benchmark: real stages, Ray tasks, runner and kills."""
    file = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, "benchmarks/sft_set.py", "--small", "--no-peers", "--json", file], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = {row["what"].split(": ")[-1]: row["figure"] for row in json.loads(file.read_text())
               if not row["what"].startswith("TRL")}
    assert figures["samples"] == 2000 and figures["too long, counted"] == 0
    assert figures["near duplicates found"] >= 95 and figures["right among those found"] >= 98
    assert figures["contaminated found"] == 100 and figures["clean taken for contaminated"] == 0
    assert figures["kills"] == 1 and figures["same set and packs"] == 1
