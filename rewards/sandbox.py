"""Run untrusted programs without Docker or root: bubblewrap, seccomp, limits, a watcher.

What holds a program in:
- as root, an unprivileged uid first (setpriv): RLIMIT_NPROC does nothing for root;
- bubblewrap: own user, pid, net, ipc, uts and cgroup namespaces, further user namespaces disabled, no
  capabilities, /usr read-only, sized tmpfs for /tmp and /dev/shm, everything else read-only, and an *empty*
  environment for bwrap's own process (what `--clearenv` removes stays readable in /proc/1/environ);
- a seccomp filter: no ptrace, mount, namespaces, bpf, keyrings, io_uring, System V IPC, limits or priorities
  of other processes, memory shared without a file; clone3 answers ENOSYS so that libc falls back to the filtered
  clone; sockets AF_UNIX only;
- rlimits, memory (resident, in files and in sockets) and wall time watched by `sandbox_driver.py`, pid 1 of the
  namespace;
- here: capped reads, a last wall-clock limit, and a wait on a pidfd of that first process, so that no daemon
  outlives the call.

Starting a sandbox costs about 14 ms above a bare Python's 7, so `Sandbox.run` takes many jobs: each runs in a
fresh fork of the warm interpreter (see `sandbox_driver.py` for why they cannot meet).
"""

from __future__ import annotations

import ast
import json
import marshal
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rewards.languages import LANGUAGES
from rewards.seccomp_filter import SandboxUnavailable, candidate_program, filter_descriptor, filter_program

Isolation = Literal["bubblewrap", "rlimits"]
DRIVER = Path(__file__).with_name("sandbox_driver.py")
HARNESS = Path(__file__).with_name("sandbox_harness.py")
PYTHON = "/usr/bin/python3"
COMPILE = ("import binascii, marshal, sys; code = compile(sys.stdin.read(), sys.argv[1], 'exec')\n"
           "print(binascii.b2a_base64(marshal.dumps(code)).decode())")
# no folder that a candidate writes to may be searched for modules
START = ("import binascii, marshal, sys\nsys.path.remove('')\n"
         "driver, harness_code = (marshal.loads(binascii.a2b_base64(text)) for text in sys.argv[3:5])\n"
         "exec(driver); start(sys.argv[1] == 'strong', sys.argv[2], harness_code)")
MARSHAL = 2  # the format that every Python reads: ours may be newer than the sandbox's
FIRST_UID = 61000  # pool of uids for root; one per slot, so that RLIMIT_NPROC counts one sandbox only
MAX_OUTPUT = 64 << 20  # bytes read back from one sandbox, all jobs together


class SandboxFailure(RuntimeError):
    """A sandbox broke for a reason that is not the candidate's doing."""


@dataclass(frozen=True)
class Limits:
    """Per job. CPU time is strict; wall time is generous because a loaded machine runs slower, not longer."""

    cpu_seconds: int = 2
    wall_seconds: float = 12.0
    memory_bytes: int = 256 << 20  # private resident memory, all processes of the job, and its files in memory
    address_bytes: int = 1 << 30  # RLIMIT_AS of each process
    output_bytes: int = 256 << 10  # of stdout, stderr and the result channel each
    file_bytes: int = 8 << 20
    processes: int = 64
    tmp_bytes: int = 64 << 20


@dataclass(frozen=True)
class Job:
    """One program and all its inputs.

    mode: "calls" (`inputs` are argument lists of `entry_point`), "programs" (`inputs` are stdin texts, one
    process each; the only mode outside Python) or "asserts" (`secret` has the asserts' source, which the
    candidate's process never holds). language: a key of `languages.LANGUAGES`; main: the class to start, for Java.
    """

    language: str
    mode: Literal["calls", "programs", "asserts"]
    code: str
    inputs: Sequence[Any] = ()
    entry_point: str | None = None
    nonce: str = ""
    secret: str | None = None
    main: str = ""


@dataclass(frozen=True)
class Outcome:
    """status: "done", "time_limit" (wall), "memory_limit" or "lost" (the program killed its supervisor).

    runs: one dict per process: exit, signal, output_limit, cpu_seconds, stdout, stderr, channel.
    compile: the same for the compiler when it failed; candidate: the candidate's process in mode "asserts".
    """

    status: str
    runs: tuple[dict[str, Any], ...] = ()
    compile: dict[str, Any] | None = None
    candidate: dict[str, Any] | None = None
    seconds: float = 0.0


class Sandbox:
    """Runs jobs, one sandbox at a time. Use one per thread, each with its own `slot`.

    isolation "rlimits" has no namespaces and no filter: a program reaches the network and every
    world-readable file. It is for machines that cannot have bubblewrap, and verdicts record it.
    """

    def __init__(self, limits: Limits = Limits(), isolation: Isolation = "bubblewrap", slot: int = 0) -> None:
        self.limits, self.isolation, self.slot = limits, isolation, slot
        check_available(isolation)

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes in the order of `jobs`; raises SandboxFailure when the sandbox itself breaks."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(jobs):
            # a sandbox ends early when a job left files that cannot be removed: go on in a new one
            outcomes += self._launch(jobs[len(outcomes):])
        return outcomes

    def _launch(self, jobs: Sequence[Job]) -> list[Outcome]:
        began = time.monotonic()
        # a folder of the machine's only where there is no other: it would outlive a caller that is killed
        strong = self.isolation == "bubblewrap"
        folder = nullcontext("/tmp") if strong else tempfile.TemporaryDirectory(prefix="posttrain-")
        with tempfile.TemporaryFile() as file, folder as workdir:
            _write_jobs(file, jobs, self.limits, candidate_program() if strong else b"")
            if not strong and os.getuid() == 0:
                os.chown(workdir, FIRST_UID + self.slot, FIRST_UID + self.slot)
            output, errors, clean = self._supervise(file, workdir, len(jobs))
        lines = output.split(b"\n")
        if lines[0] != b"@ready":
            raise SandboxFailure(f"the sandbox did not start: {errors.strip()[-400:] or 'no message'}")
        outcomes = _parse(lines[1:], errors)
        if not outcomes:
            raise SandboxFailure(f"the sandbox ended before its first job did ({'' if clean else 'wall clock; '}"
                                 f"{errors.strip()[-400:] or 'no message'})")
        each = (time.monotonic() - began) / len(outcomes)
        return [Outcome(**{**outcome, "seconds": each}) for outcome in outcomes]

    def _supervise(self, file: Any, workdir: str, count: int) -> tuple[bytes, str, bool]:
        """Start, read with a cap and a deadline, kill, and wait until the namespace is empty."""
        info_read, info_write = os.pipe()
        filter_fd = filter_descriptor() if self.isolation == "bubblewrap" else -1
        passed = [info_write] + ([filter_fd] if filter_fd >= 0 else [])
        strong = self.isolation == "bubblewrap"
        driver = [PYTHON, "-s", "-S", "-B", "-X", "utf8", "-c", START, "strong" if strong else "weak",
                  workdir, _compiled(DRIVER), _compiled(HARNESS)]
        command = [*_drop_root(self.slot), *(_bwrap(self.limits, info_write, filter_fd) if strong else []), *driver]
        try:
            process = subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       env={} if strong else {"PYTHONHASHSEED": "0"}, cwd="/" if strong else workdir,
                                       pass_fds=passed, start_new_session=True)
        finally:
            for descriptor in passed:
                os.close(descriptor)
        assert process.stdout and process.stderr
        first = -1
        try:
            with process.stdout, process.stderr:
                first = _first_process(info_read) if strong else os.pidfd_open(process.pid)
                deadline = time.monotonic() + count * (self.limits.wall_seconds + 2) + 20
                return _read(process.stdout.fileno(), process.stderr.fileno(), deadline)
        finally:
            os.close(info_read)
            process.kill()
            process.wait()
            if first >= 0:
                # readable once every process of the namespace is gone
                gone = select.select([first], [], [], 10)[0]
                os.close(first)
                if not gone:
                    raise SandboxFailure("processes of a sandbox outlived it by 10 s; the machine is badly overloaded")


def check_available(isolation: Isolation) -> None:
    """Raise SandboxUnavailable, naming the remedy, when programs cannot be run here."""
    if not os.path.exists(PYTHON):
        raise SandboxUnavailable(f"the sandbox runs {PYTHON}, which is missing; apt-get install python3")
    if isolation == "bubblewrap":
        if shutil.which("bwrap") is None:
            raise SandboxUnavailable("bubblewrap (bwrap) is missing; apt-get install bubblewrap, or pass "
                                     'isolation="rlimits" to run candidates with limits alone')
        if os.getuid() == 0 and shutil.which("setpriv") is None:
            raise SandboxUnavailable("setpriv is missing (needed as root); apt-get install util-linux")
        filter_program()


def _write_jobs(file: Any, jobs: Sequence[Job], limits: Limits, refused: bytes) -> None:
    parts = []
    for job in jobs:
        language = LANGUAGES[job.language]
        fields = asdict(job) | {
            "source": language.source, "compile": language.compile,
            "run": [word.format(main=job.main) for word in language.run],
            "limits": {"address_bytes": max(limits.address_bytes, language.address_bytes)}}
        secret = fields.pop("secret")
        parts.append((marshal.dumps(fields, MARSHAL), b"" if secret is None else marshal.dumps(secret, MARSHAL)))
    sizes = [[len(first), len(second), limits.memory_bytes + LANGUAGES[job.language].memory_bytes]
             for job, (first, second) in zip(jobs, parts, strict=True)]
    header = marshal.dumps({"sizes": sizes, "limits": asdict(limits) | {"refused": refused}}, MARSHAL)
    file.write(b"%8d" % len(header) + header + b"".join(first + second for first, second in parts))
    file.flush()
    file.seek(0)


def _parse(lines: list[bytes], errors: str) -> list[dict[str, Any]]:
    """The driver's lines: a supervisor's literal (perhaps cut short), then the keeper's "@status"."""
    outcomes, payload = [], b""
    for line in lines:
        if not line.startswith(b"@"):
            payload = line or payload
            continue
        status = line[1:].decode()
        if status == "error":
            raise SandboxFailure(f"the sandbox driver failed: {errors.strip()[-400:]}")
        outcomes.append({"status": status, **(ast.literal_eval(payload.decode()) if status == "done" else {})})
        payload = b""
    return outcomes


def _read(stdout: int, stderr: int, deadline: float) -> tuple[bytes, str, bool]:
    """Both streams until they end; stops at MAX_OUTPUT or the deadline (then the last value is False)."""
    data = {stdout: bytearray(), stderr: bytearray()}
    poll = select.poll()
    for descriptor in data:
        poll.register(descriptor, select.POLLIN)
    still_open = 2
    while still_open:
        left = deadline - time.monotonic()
        if left <= 0 or len(data[stdout]) > MAX_OUTPUT:
            break
        for descriptor, _ in poll.poll(left * 1000):
            chunk = os.read(descriptor, 1 << 16)
            data[descriptor] += chunk[:MAX_OUTPUT]
            if not chunk:
                poll.unregister(descriptor)
                still_open -= 1
    return bytes(data[stdout]), data[stderr][-4000:].decode("utf-8", "replace"), not still_open


def _drop_root(slot: int) -> list[str]:
    if os.getuid() != 0:
        return []
    uid = str(FIRST_UID + slot)
    return [shutil.which("setpriv") or "setpriv", "--reuid", uid, "--regid", uid, "--clear-groups", "--"]


def _bwrap(limits: Limits, info_fd: int, filter_fd: int) -> list[str]:
    links = [arg for name in ("bin", "sbin", "lib", "lib32", "lib64") if os.path.islink(f"/{name}")
             for arg in ("--symlink", f"usr/{name}", f"/{name}")]
    # no /dev/zero: mapped shared, it is memory that no process is charged for; no terminals: nobody needs them
    devices = [arg for name in ("null", "random", "urandom") for arg in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")]
    devices += [arg for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2"))
                for arg in ("--symlink", f"/proc/self/fd{target}", f"/dev/{name}")]
    binds = [arg for name in ("bin", "sbin", "lib", "lib64") if os.path.isdir(f"/{name}") and not
             os.path.islink(f"/{name}") for arg in ("--ro-bind", f"/{name}", f"/{name}")]
    # Debian's Java reads its settings there
    binds += [arg for path in Path("/etc").glob("java-*-openjdk") for arg in ("--ro-bind", str(path), str(path))]
    return [shutil.which("bwrap") or "bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net",
            "--unshare-uts", "--unshare-cgroup-try", "--disable-userns", "--die-with-parent", "--new-session",
            "--as-pid-1", "--cap-drop", "ALL", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr", *links, *binds,
            "--proc", "/proc", "--tmpfs", "/dev", *devices, "--size", str(limits.tmp_bytes), "--tmpfs", "/tmp",
            "--size", str(limits.tmp_bytes // 4), "--tmpfs", "/dev/shm", "--remount-ro", "/dev", "--remount-ro", "/",
            "--chdir", "/tmp", "--setenv", "PYTHONHASHSEED", "0", "--seccomp", str(filter_fd),
            "--info-fd", str(info_fd), "--"]


def _first_process(info_read: int) -> int:
    """pidfd of the namespace's first process, from bwrap's --info-fd; -1 when it never started."""
    text = b""
    while chunk := os.read(info_read, 4096):
        text += chunk
        if b"}" in chunk:
            break
    try:
        return os.pidfd_open(json.loads(text)["child-pid"])
    except (ValueError, ProcessLookupError):
        return -1


@cache
def _compiled(path: Path) -> str:
    """The file's bytecode for PYTHON as base64, made once: compiling it takes longer than running it."""
    return subprocess.run([PYTHON, "-s", "-S", "-c", COMPILE, path.name], input=path.read_text(), check=True,
                          capture_output=True, text=True).stdout.strip()
