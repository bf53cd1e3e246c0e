"""The real command in a process of its own, given in a folder of its own, as a shell would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.artifacts import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "pipeline.cli")


@dataclass(frozen=True)
class Done:
    """A command that ended: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def both(self) -> str:
        return self.out + self.err


def posttrain(*words: str | Path, folder: Path) -> Done:
    """Run `posttrain WORDS` in `folder` to its end."""
    done = subprocess.run([*COMMAND, *map(str, words)], cwd=folder, env=environment(), capture_output=True, text=True)
    return Done(done.returncode, done.stdout, done.stderr)


def start(*words: str | Path, folder: Path, output: Path) -> subprocess.Popen:
    """Start `posttrain WORDS` in `folder`; what it prints goes to the file `output`."""
    with open(output, "w") as file:
        return subprocess.Popen([*COMMAND, *map(str, words)], cwd=folder, env=environment(), stdout=file,
                                stderr=subprocess.STDOUT)


def kill_when(due: Callable[[], bool], driver: subprocess.Popen, output: Path, seconds: float = 240
              ) -> list[psutil.Process]:
    """`kill -9` of the driver alone as soon as `due`; returns all that it had started.

    By then the stage worker and the engines are gone. Ray's two agents, which only serve its dashboard, are not:
    they try for about a minute to tell somebody of the end of their node.
    """
    deadline = time.monotonic() + seconds
    while not due():
        assert driver.poll() is None, f"ended before the kill:\n{output.read_text()}"
        assert time.monotonic() < deadline, f"nothing to kill after {seconds} s:\n{output.read_text()}"
        time.sleep(0.02)
    below = psutil.Process(driver.pid).children(recursive=True)
    agents = [process for process in below if process.name() in ("ray::DashboardAgent", "ray::RuntimeEnvAgent")]
    seen = {process.pid for process in left_behind(Path(psutil.Process(driver.pid).cwd()))}
    assert all(process.pid in seen for process in below if process.name().startswith("ray::")), "left_behind is blind"
    driver.kill()
    driver.wait()
    wait_until_gone([process for process in below if process not in agents])
    return below


def wait_until_gone(processes: Iterable[psutil.Process], seconds: float = 60) -> None:
    """Ray's processes end by themselves when their driver has ended; that takes a moment."""
    deadline = time.monotonic() + seconds
    while left := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def left_behind(folder: Path) -> list[psutil.Process]:
    """Live processes that work in `folder`: what a command given there starts inherits it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and is_alive(process):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def environment() -> dict[str, str]:
    """The tests' environment without what conftest sets for the threads of pytest itself, and without a cluster."""
    kept = {name: value for name, value in os.environ.items()
            if name not in ("OMP_NUM_THREADS", "RAY_ADDRESS", "POSTTRAIN_RAY_ADDRESS")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def artifact(run_dir: Path, stage: str) -> Path:
    """The folder of the stage's newest artifact."""
    manifest = RunDirectory(run_dir).newest_manifest(stage)
    assert manifest is not None, f"{stage} has committed nothing"
    return RunDirectory(run_dir).stage_folder(stage, manifest["fingerprint"])


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
