"""The first process of a sandbox: runs jobs one after another and cannot be hurt by them.

`rewards/sandbox.py` passes this file's bytecode to a bare system interpreter inside the sandbox, so it imports
only the standard library, and of that only modules written in C: `json`, `re`, `signal` and `ctypes` took longer to
import than the rest of a start. Three kinds of process, so that no job can read or change another's result:

- the *keeper* (this process, pid 1 of the namespace) never holds a job's data. As pid 1 it cannot be killed
  from inside. It watches time and resident memory, and after each job kills all that is left, waits until it
  is gone and empties the writable folders.
- a *supervisor* per job, forked from the keeper, reads the job, starts the candidate and caps its output.
- the *candidate*, forked from the supervisor, holds its own code and inputs and nothing else. Memory and
  descriptors of keeper and supervisor are closed to it (not dumpable; ptrace and friends refused by seccomp).

Input (descriptor 0, a seekable file): a size in 8 digits, that many bytes of marshal, `{"sizes": [[size, size2,
memory], ...], "limits": {...}}`, then the jobs; the second part of a job (asserts) is read only after the candidate
was forked.
Output (descriptor 1): "@ready", then per job a line from the supervisor, a Python literal in ASCII (absent or cut
short when it was killed), and a line "@done", "@time_limit", "@memory_limit", "@lost" (its supervisor was killed) or
"@error" (it failed) from the keeper. A literal has no raw newline, so a candidate cannot forge the keeper's lines.
"""

import _ctypes
import _signal as signal
import array
import fcntl
import marshal
import os
import resource
import select
import sys
import time

harness = type(sys)("harness")  # filled from the bytecode of sandbox_harness.py
LOST = 3  # exit status of a supervisor that the candidate starved
PATH = {"PATH": "/usr/bin:/bin"}
FILL = 16 << 20  # bytes that a job may come to hold in a millisecond; two cores write about 5 MB
SOCKET_BYTES = 416 << 10  # what a socket's unread data may take: kernel memory, which no process is charged for
INODE_BYTES = 4096  # of an empty file: its entries in the kernel's tables, and the time to remove it


# ---------------------------------------------------------------- keeper

def keep(strong, workdir):
    prctl(4, 0)  # PR_SET_DUMPABLE 0: /proc/1/{mem,fd,environ} are closed to candidates
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: where we are not pid 1, orphans still come to us
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # pid 1 ignores what it has no handler for
    os.closerange(3, 1024)
    header = marshal.loads(os.read(0, int(os.read(0, 8))))
    limits, offset = header["limits"], os.lseek(0, 0, os.SEEK_CUR)
    if len(header["sizes"]) > 1:
        warm()
    folders = [workdir, "/dev/shm"] if strong else [workdir]
    os.write(1, b"@ready\n")
    for size, size2, memory_bytes in header["sizes"]:
        pid = os.fork()
        if pid == 0:
            try:
                supervise(offset, size, size2, limits)
            except OSError:  # the candidate filled its folder or took its processes
                os._exit(LOST)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        status = watch(pid, limits["wall_seconds"], memory_bytes, folders if strong else [])
        kill_all(strong)
        os.write(1, b"\n@" + status.encode() + b"\n")
        offset += size + size2
        if not all(empty(folder) for folder in folders):
            return  # the caller runs the remaining jobs in a new sandbox


def prctl(option, value, more=0):
    """Without the module ctypes, whose import is half the interpreter's own start."""
    if _ctypes.call_function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl"), (option, value, more, 0, 0)):
        raise OSError(f"prctl({option}, {value}) failed")


def warm():
    """Import once what many candidates import: their forks share it. A lone job would pay for what it may not use."""
    import collections  # noqa: F401
    import heapq  # noqa: F401
    import json  # noqa: F401
    import math  # noqa: F401
    import re  # noqa: F401
    import typing  # noqa: F401


def watch(pid, wall_seconds, memory_bytes, folders):
    """Wait for a job's end or its limits; looks at its memory as often as what is left of it could be filled."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    deadline = time.monotonic() + wall_seconds
    left = memory_bytes
    try:
        while not poll.poll(min(50, 1 + left // FILL)):
            if time.monotonic() > deadline:
                return "time_limit"
            left = memory_bytes - resident_bytes() - kernel_bytes(folders)
            if left < 0:
                return "memory_limit"
    finally:
        os.close(pidfd)
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        return "done"
    return "lost" if os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == LOST else "error"


def resident_bytes():
    """Private resident memory of all our descendants (all processes of the namespace but this one)."""
    pages, me = 0, os.getpid()
    for name in os.listdir("/proc") if me == 1 else descendants(me):
        if name.isdigit() and name != "1":
            try:
                with open("/proc/" + name + "/statm", "rb", buffering=0) as file:
                    fields = file.read(200).split()
            except OSError:  # ended meanwhile
                continue
            pages += int(fields[1]) - int(fields[2])
    return pages * resource.getpagesize()


def kernel_bytes(folders):
    """What a job holds outside its processes: files of these folders, which are memory, and unread socket data."""
    if not folders:
        return 0  # without namespaces neither is ours alone
    held = 0
    for folder in folders:
        usage = os.statvfs(folder)
        held += (usage.f_blocks - usage.f_bfree) * usage.f_bsize + (usage.f_files - usage.f_ffree) * INODE_BYTES
    with open("/proc/net/sockstat") as file:
        return held + int(file.readline().split()[2]) * SOCKET_BYTES


def descendants(root):
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/" + name + "/stat") as file:
                    parents[name] = file.read().rpartition(")")[2].split()[1]
            except OSError:
                continue
    found, edge = [], {str(root)}
    while edge:
        edge = {child for child, parent in parents.items() if parent in edge}
        found += edge
    return found


def kill_all(strong):
    """Kill and reap everything below us; inside a pid namespace one call reaches all, without a race."""
    while True:
        if strong:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            for name in descendants(os.getpid()):
                try:
                    os.kill(int(name), signal.SIGKILL)
                except ProcessLookupError:
                    pass
        try:
            while os.waitpid(-1, 0 if strong else os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def empty(folder):
    """Remove what a job left in `folder`, and on it; False when something resists."""
    try:
        os.chmod(folder, 0o700)
        for name in os.listxattr(folder):
            os.removexattr(folder, name)
        for root, folders, files in os.walk(folder, topdown=False):
            for name in files:
                os.unlink(os.path.join(root, name))
            for name in folders:
                path = os.path.join(root, name)
                os.unlink(path) if os.path.islink(path) else os.rmdir(path)
        os.utime(folder, (0, 0))
        return not os.listdir(folder)
    except (OSError, RecursionError):
        return False


# ---------------------------------------------------------------- supervisor

def supervise(offset, size, size2, limits):
    os.setsid()  # the keeper has a session of its own, and so its own share of the processor
    job = marshal.loads(os.pread(0, size, offset))
    limits = dict(limits, **job["limits"])
    if job["run"]:
        result = supervise_program(job, limits)
    elif job["mode"] == "asserts":
        result = supervise_asserts(job, offset + size, size2, limits)
    elif job["mode"] == "calls":
        result = {"runs": [Child(lambda: harness.python_calls(job), limits).wait()]}
    else:
        result = {"runs": run_programs(lambda: harness.python_program(job), job["inputs"], limits)}
    line = ascii(result).encode()
    while line:
        line = line[os.write(1, line):]


def supervise_program(job, limits):
    with open(job["source"], "w") as file:
        file.write(job["code"])
    if job["compile"]:
        generous = dict(limits, cpu_seconds=10, file_bytes=max(limits["file_bytes"], 1 << 24))
        compiled = Child(lambda: os.execve(job["compile"][0], job["compile"], PATH), generous).wait()
        if compiled["exit"] != 0:
            return {"compile": compiled, "runs": []}
    return {"runs": run_programs(lambda: os.execve(job["run"][0], job["run"], {}), job["inputs"], limits)}


def run_programs(start, inputs, limits):
    """One process per input text; stops at the first that does not end well."""
    runs = []
    for text in inputs:
        runs.append(Child(start, limits, text.encode()).wait())
        if runs[-1]["exit"] != 0:
            break
    return runs


def supervise_asserts(job, offset, size, limits):
    """Candidate and asserts in two processes; values cross between them as tagged JSON."""
    from_tester, to_candidate = os.pipe()
    from_candidate, to_tester = os.pipe()
    candidate = Child(lambda: harness.python_serve(job), limits, peer=(from_tester, to_tester))
    # read only now, after the candidate's fork: its memory has never held the asserts
    asserts = marshal.loads(os.pread(0, size, offset))
    tester = Child(lambda: harness.python_asserts(asserts, job), limits, peer=(from_candidate, to_candidate))
    for end in (from_tester, to_candidate, from_candidate, to_tester):
        os.close(end)
    run = tester.wait([candidate])
    return {"runs": [run], "candidate": candidate.finish()}


class Child:
    """A forked process whose stdout, stderr and result channel are pipes read with a cap."""

    def __init__(self, start, limits, stdin=b"", peer=()):
        self.cap, self.over = limits["output_bytes"], False
        pipes = [(name, *os.pipe()) for name in ("stdout", "stderr", "channel")]
        source = feed(stdin)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                enter([source, *(end for _, _, end in pipes), *peer], limits)
                start()
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(1)
        self.pidfd = os.pidfd_open(self.pid)
        os.close(source)
        self.ends, self.data = {}, {}
        for name, read_end, write_end in pipes:
            os.close(write_end)
            os.set_blocking(read_end, False)
            self.ends[read_end], self.data[name] = name, b""

    def read(self, end):
        """Take what is there; False at the end of the stream or over the cap."""
        name = self.ends[end]
        while not self.over:
            try:
                chunk = os.read(end, 65536)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self.data[name] += chunk
            if len(self.data[name]) > self.cap:
                self.over = True
                self.kill()
        return False

    def kill(self):
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def wait(self, others=()):
        """Read until the process ends (not until its pipes close: a daemon may hold those)."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        readers = {end: child for child in (self, *others) for end in child.ends}
        for end in readers:
            poll.register(end, select.POLLIN)
        while True:
            events = [end for end, _ in poll.poll()]
            for end in events:
                if end in readers and not readers[end].read(end):
                    poll.unregister(end)
            if self.pidfd in events:
                return self.report()

    def finish(self):
        """Give the process a moment to end by itself (its peer has gone), then kill it."""
        if not select.select([self.pidfd], [], [], 0.2)[0]:
            self.kill()
        return self.report()

    def report(self):
        _, status, usage = os.wait4(self.pid, 0)
        for end in list(self.ends):
            self.read(end)
            os.close(end)
        os.close(self.pidfd)
        text = {name: data[:self.cap].decode("utf-8", "replace") for name, data in self.data.items()}
        return {"exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
                "output_limit": self.over, "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "stdout": text["stdout"], "stderr": text["stderr"][-2000:], "channel": text["channel"]}


def feed(data):
    """A descriptor from which a child reads `data` as its standard input."""
    if not data:
        return os.open("/dev/null", os.O_RDONLY)
    path = f"stdin-{os.getpid()}"
    end = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    while data:
        data = data[os.write(end, data):]
    os.lseek(end, 0, os.SEEK_SET)
    return end


def enter(descriptors, limits):
    """In the new process: make `descriptors` 0, 1, 2, ..., close all others, lower the limits, refuse system calls."""
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 200) for end in descriptors]
    for number, end in enumerate(high):
        os.dup2(end, number)
    os.closerange(len(high), 1024)
    cpu = limits["cpu_seconds"]
    for which, soft, hard in ((resource.RLIMIT_CPU, cpu, cpu + 1), (resource.RLIMIT_NOFILE, 64, 64),
                              (resource.RLIMIT_AS, limits["address_bytes"], limits["address_bytes"]),
                              (resource.RLIMIT_FSIZE, limits["file_bytes"], limits["file_bytes"]),
                              (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
                              (resource.RLIMIT_CORE, 0, 0)):
        resource.setrlimit(which, (soft, hard))
    if limits["refused"]:
        program = array.array("Q", limits["refused"])
        # PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct sock_fprog
        prctl(22, 2, array.array("Q", (len(program), program.buffer_info()[0])).tobytes())


def start(strong, workdir, harness_code):
    exec(harness_code, harness.__dict__)
    keep(strong, workdir)
    os._exit(0)  # an interpreter takes milliseconds to end properly
