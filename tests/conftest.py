"""Set before any test imports torch, Ray or vLLM: two cores are shared by trainer, engine and pytest.

And the one whole run that the end-to-end tests look into.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from posttrain_command import Done, posttrain

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("COLUMNS", "160")  # typer and rich wrap their output to the width


@dataclass(frozen=True)
class SmokeRun:
    """A finished run of recipes/smoke.yaml: the folder in which the command was given, and what it said."""

    folder: Path
    done: Done

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> SmokeRun:
    """`posttrain run smoke` from nothing to its report, once for all tests; minutes on two cores."""
    folder = tmp_path_factory.mktemp("smoke")
    done = posttrain("run", "smoke", "--run-dir", "run", folder=folder)
    assert done.code == 0, f"exit code {done.code}; the end of its output:\n{done.both[-6000:]}"
    return SmokeRun(folder, done)
