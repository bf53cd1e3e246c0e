"""The Triton sources against their references on a CPU: checks/ in a process where Triton interprets."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_checks(**environment: str) -> str:
    """Run checks/ in a child process and return what pytest printed; fails with it if a check fails."""
    files = sorted(map(str, HERE.glob("checks/check_*.py")))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(words, cwd=HERE.parents[2], env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_the_triton_sources_agree_with_their_references_in_the_interpreter():
    said = run_checks(TRITON_INTERPRET="1")
    passed = int(re.search(r"(\d+) passed", said)[1])
    assert passed >= 61 and "skipped" not in said, said[-2000:]
