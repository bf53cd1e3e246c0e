import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_attack_is_held_for_every_user_and_nothing_is_left(tmp_path):
    done = subprocess.run(["env", f"PYTHONPATH={ROOT}", sys.executable, "benchmarks/sandbox_holds.py", "--small",
                           "--json", str(tmp_path / "figures.json")],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == (["root", "ordinary user"] if os.getuid() == 0 else ["ordinary user"])
    for rows in figures.values():
        by_name = {row["what"]: row for row in rows}
        assert by_name["attacks held"]["figure"] == by_name["twins paid"]["figure"] == 30
        assert [row for row in rows if row["unit"] == "x" and row["figure"] > row["limit"]] == []
        assert [row for row in rows if "left" in row["what"] and row["figure"]] == []
