"""Whether the sandbox holds programs that attack it, and whether anything of them is left afterwards.

    python benchmarks/sandbox_holds.py [--small] [--runs 200] [--json FILE]

Each run is one sandbox with a program that leaves daemons, two attacks of the audit's family "sandbox" and an honest
twin; afterwards no process, file or System V IPC of the candidate may be left. As root everything is done twice: as
root, whose sandboxes run under a uid of their own, and as an ordinary user.

Memory is measured from outside while programs try to exceed their limit: of one process the kernel's own highest
figure (file pages included), of a tree the private resident memory of all its processes, read as often as this process
gets to run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.records import Check, Status
from rewards.adversarial import sandbox as family
from rewards.adversarial.cases import Case
from rewards.code import verify_code_batch
from rewards.sandbox import FIRST_UID, Job, Limits, Sandbox

SLOT = 90  # away from the slots of sandboxes that others run here
NOBODY = 65534
LIMITS = Limits(cpu_seconds=1)
CASES = tuple(family.cases())
PAGE = resource.getpagesize()
DAEMONISE = """```python
import os, socket, time
def f(x):
    for number in range(3):
        if os.fork() == 0:
            os.setpgid(0, 0)
            if os.fork() == 0:
                for end in range(10):
                    try: os.close(end)
                    except OSError: pass
                while True:
                    for folder in ("/tmp", "/dev/shm"): open(f"{folder}/late-{number}", "w").write("x")
                    time.sleep(0.01)
            os._exit(0)
    return x + 1
```"""
ONE_PROCESS = "data = bytearray(b'x') * (900 << 20)"
TREE = """
import os
for _ in range(5): os.fork()
try: os.setsid()  # a session each would be a share of the processor each
except OSError: pass
held = [bytearray(b'x') * (1 << 20) for _ in range(900)]
"""


@dataclass(frozen=True)
class Row:
    """A figure; `limit` is what it may be at most (or, for what is wanted, must reach)."""

    what: str
    figure: float
    limit: float
    unit: str


def holds(runs: int) -> list[Row]:
    """Attacks, twins and what is left after each run, as the user that this process has."""
    uid = FIRST_UID + SLOT if os.getuid() == 0 else os.getuid()
    sandbox, paid, refused, left = Sandbox(LIMITS, slot=SLOT), set(), set(), {name: 0 for name in TRACES}
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        before = {name: set(trace(uid)) for name, trace in TRACES.items()}
        for run in range(runs):
            numbers = run % len(CASES), (run + 1) % len(CASES)
            first, second = (CASES[number] for number in numbers)
            items = [(DAEMONISE, first), (first.exploit, first), (second.exploit, second), (first.twin or "", first)]
            _, *attacks, twin = verify_code_batch([(text, _check(case)) for text, case in items], sandbox)
            # what could not be judged was not held
            paid |= {number for number, verdict in zip(numbers, attacks, strict=True)
                     if verdict.status in (Status.CORRECT, Status.INFRA_ERROR)}
            refused |= {numbers[0]} if twin.score != 1 else set()
            for name, trace in TRACES.items():
                left[name] += len(set(trace(uid)) - before[name])
    tried = min(runs, len(CASES))
    return [Row("attacks held", tried - len(paid), tried, "cases"),
            Row("twins paid", tried - len(refused), tried, "cases"),
            *(Row(f"{name} left, {runs} runs", count, 0, "") for name, count in left.items())]


def _check(case: Case) -> Check:
    return Check("code", language="python", entry_point="f", tests=json.dumps(case.check["tests"]))


# -- traces of a user's candidates -------------------------------------------------------------------------------------


def processes(uid: int) -> Iterator[object]:
    """Processes of `uid` in a pid namespace below ours."""
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:  # ended meanwhile
            continue
        if fields["Uid"].split()[0] == str(uid) and len(fields["NSpid"].split()) > 1:
            yield int(fields["Pid"])


def files(uid: int) -> Iterator[object]:
    """Files of `uid` in the world's temporary folders, and any in our own."""
    for folder in map(Path, ("/tmp", "/var/tmp", "/dev/shm")):
        for path in folder.iterdir():
            try:
                if path.lstat().st_uid == uid and str(path) != tempfile.tempdir:
                    yield path
            except OSError:  # removed meanwhile, by others
                continue
    yield from Path(tempfile.gettempdir()).iterdir()


def ipc(uid: int) -> Iterator[object]:
    """System V IPC objects of `uid`."""
    for path in Path("/proc/sysvipc").iterdir():
        names, *rows = (line.split() for line in path.read_text().splitlines())
        yield from ((path.name, *row[:2]) for row in rows if row[names.index("uid")] == str(uid))


TRACES: dict[str, Callable[[int], Iterator[object]]] = {"processes": processes, "files": files, "IPC objects": ipc}

# -- memory ------------------------------------------------------------------------------------------------------------


def memory(repeats: int) -> list[Row]:
    """Highest resident memory of programs that exceed their limit, as a part of that limit."""
    sandbox = Sandbox(LIMITS, slot=SLOT)
    one, tree = [], []
    for _ in range(repeats):
        sandbox.run([Job("python", "programs", ONE_PROCESS, [""])])
        # of all processes this one ever waited for, directly or through others
        one.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
        tree.append(_highest_while(lambda: sandbox.run([Job("python", "programs", TREE, [""])])))
    return [Row("one process, highest / limit", max(one) / LIMITS.memory_bytes, 1.25, "x"),
            Row("a tree of 32, highest / limit", max(tree) / LIMITS.memory_bytes, 1.25, "x")]


def _highest_while(function: Callable[[], object]) -> int:
    """Highest sum of private resident memory below this process while `function` runs."""
    done, sums = threading.Event(), [0]

    def sample() -> None:
        while not done.wait(0.001):
            sums.append(sum(map(_private_bytes, _descendants(os.getpid()))))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        function()
    finally:
        done.set()
        sampler.join()
    return max(sums)


def _descendants(pid: int) -> Iterator[int]:
    """Processes that the main threads of `pid` and of its descendants started."""
    for child in map(int, _read(f"/proc/{pid}/task/{pid}/children").split()):
        yield child
        yield from _descendants(child)


def _private_bytes(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split() or (0, 0, 0)
    return (int(fields[1]) - int(fields[2])) * PAGE


def _read(path: str) -> bytes:
    """A file of /proc, empty when its process ended; unbuffered, since reading disturbs what it measures."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(file, 4096)
    except OSError:
        return b""
    finally:
        os.close(file)


# -- users -------------------------------------------------------------------------------------------------------------


def measured(runs: int, repeats: int, uid: int | None) -> list[Row]:
    """All rows, from a fork that has become `uid`: what it waited for is its candidates' alone."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if uid is not None:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            rows = [*memory(repeats), *holds(runs)]
            os.write(write, json.dumps([vars(row) for row in rows]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    if not text:
        raise SystemExit("the measuring process failed; its error stands above")
    return [Row(**row) for row in json.loads(text)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="every attack once")
    parser.add_argument("--runs", type=int, default=200, help="sandboxes per user")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args(arguments)
    runs, repeats = (len(CASES), 1) if options.small else (options.runs, 10)
    Sandbox(LIMITS).run([Job("python", "programs", "pass", [""])])  # what is read from disk is in memory for all users
    users = {"root": None, "ordinary user": NOBODY} if os.getuid() == 0 else {"ordinary user": None}
    found = {name: measured(runs, repeats, uid) for name, uid in users.items()}
    table = Table("what", *found, "bound", "unit", box=None, header_style="bold", pad_edge=False)
    for rows in zip(*found.values(), strict=True):
        table.add_row(rows[0].what, *(f"{row.figure:.3g}" for row in rows), f"{rows[0].limit:g}", rows[0].unit)
    Console().print(table)
    if options.json:
        figures = {name: [vars(row) for row in rows] for name, rows in found.items()}
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
