"""Attacks on the sandbox. Each program is real and runs in a real sandbox."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.sandbox import Job, Limits, Sandbox, SandboxUnavailable


def program(code, stdin=""):
    return Job("python", "programs", code, [stdin])


def output(sandbox, code):
    outcome, = sandbox.run([program(code)])
    assert outcome.status == "done", outcome
    return outcome.runs[0]["stdout"]


def harmless(sandbox, attack):
    """Outcome of an attack; the program that follows it in the same sandbox must run as if nothing happened."""
    first, second = sandbox.run([program(attack), program("import os; print(sorted(os.listdir('/tmp')), 6 * 7)")])
    assert second.status == "done" and second.runs[0]["stdout"] == "[] 42\n"
    return first


def test_a_fork_bomb_ends_with_its_job(sandbox):
    harmless(sandbox, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")


def test_a_memory_bomb_hits_the_limit(sandbox):
    bomb = "import os\nfor _ in range(3): os.fork()\nb = []\nwhile True: b.append(bytearray(b'x' * (8 << 20)))"
    assert harmless(sandbox, bomb).status == "memory_limit"


def test_an_endless_loop_runs_out_of_cpu_time_and_a_sleep_out_of_wall_time():
    loop, = Sandbox(Limits(cpu_seconds=1, wall_seconds=60)).run([program("while True: pass")])
    sleep, = Sandbox(Limits(wall_seconds=0.5)).run([program("import time; time.sleep(60)")])
    assert loop.runs[0]["signal"] == signal.SIGXCPU
    assert sleep.status == "time_limit"


def test_huge_output_is_cut(sandbox):
    run, = harmless(sandbox, "while True: print('x' * 10000)").runs
    assert run["output_limit"] and len(run["stdout"]) == sandbox.limits.output_bytes


def test_there_is_no_network(sandbox):
    assert "Permission denied" in output(
        sandbox, "import socket\ntry: socket.socket()\nexcept OSError as error: print(error)")
    assert "lo" in output(sandbox, "print([l.split(':')[0].strip() for l in open('/proc/net/dev')][2:])")


def test_proc_shows_no_other_process_memory_descriptor_or_environment(sandbox, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_SECRET", "do-not-read")
    text = output(sandbox, """
import os
print('seen', [name for name in os.listdir('/proc') if name.isdigit()])
for pid in (1, os.getppid()):
    for name in ('environ', 'mem', 'maps', 'fd/0'):
        try: print('read', open(f'/proc/{pid}/{name}').read(1))
        except OSError: pass
print(os.environ)
""")
    assert "read" not in text and "do-not-read" not in text
    assert "'1', '2', '3']" in text


def test_a_daemon_does_not_outlive_its_job(sandbox):
    name = f"posttrain-daemon-{os.getpid()}"
    harmless(sandbox, f"""
import os, ctypes, time
if os.fork() == 0:
    os.setpgid(0, 0)
    if os.fork() == 0:
        ctypes.CDLL(None).prctl(15, b"{name[-15:]}", 0, 0, 0)
        while True:
            time.sleep(0.01)
            open('/tmp/late', 'w').write('x')
time.sleep(0.1)
""")
    assert name[-15:] not in subprocess.run(["ps", "-eo", "comm"], capture_output=True, text=True, check=True).stdout


def test_only_the_temporary_folders_can_be_written(sandbox):
    text = output(sandbox, """
import os
for folder in ('/', '/usr', '/dev', '/proc', '/tmp', '/dev/shm'):
    try: open(folder + '/x', 'w').write('x'); print(folder)
    except OSError: pass
print(os.path.exists('/etc/passwd'), os.path.exists('/root'), os.path.exists('/home'))
""")
    assert text == "/tmp\n/dev/shm\nFalse False False\n"


def test_the_temporary_folder_cannot_be_filled_past_its_size(sandbox):
    harmless(sandbox, "for i in range(99): open(f'/tmp/{i}', 'wb').write(b'x' * (7 << 20))")


def test_files_that_cannot_be_removed_cost_a_new_sandbox_and_nothing_else(sandbox):
    harmless(sandbox, "import os\nfor _ in range(1500):\n    os.mkdir('a' * 200)\n    os.chdir('a' * 200)")


@pytest.mark.parametrize("attack", ["os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.kill(1, 9); os.kill(1, 2)"])
def test_killing_the_watchers_harms_only_the_attacker(sandbox, attack):
    assert harmless(sandbox, f"import os\n{attack}").status in ("lost", "done")


def test_namespaces_tracing_and_limits_of_others_are_refused(sandbox):
    text = output(sandbox, """
import ctypes, os, resource
libc = ctypes.CDLL(None)
print(libc.unshare(0x10000000), libc.ptrace(16, os.getppid(), 0, 0), libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0))
print(libc.syscall(425, 8, 0), libc.memfd_create(b'x', 0), libc.shmget(1, 4096, 0o1600))
try: resource.prlimit(1, resource.RLIMIT_AS, (1, 1))
except PermissionError: print('refused')
try: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))
except ValueError: print('refused')
try: os.setsid()  # a share of the processor as large as the watcher's
except PermissionError: print('refused')
""")
    assert text == "-1 -1 -1\n-1 -1 -1\nrefused\nrefused\nrefused\n"


def test_one_job_sees_nothing_of_another(sandbox):
    secret = "s" + "ecret-of-the-first"
    spy = """
import gc, os
found = [o for o in gc.get_objects() if 'of-the-first' in str(o)[:100000] and o is not globals()]
print(len([o for o in found if isinstance(o, str)]), os.listdir('/tmp'), os.listdir('/dev/shm'))
"""
    outcomes = sandbox.run([program(f"open('/tmp/note', 'w').write('{secret}'); print('{secret}')"), program(spy)])
    assert outcomes[0].runs[0]["stdout"].strip() == secret
    assert outcomes[1].runs[0]["stdout"].endswith("[] []\n") and secret not in outcomes[1].runs[0]["stdout"]


@pytest.mark.parametrize("isolation", ["bubblewrap", "rlimits"])
def test_asserts_import_no_module_that_the_candidate_wrote(isolation):
    candidate = """
open('fractions.py', 'w').write("import os; os.write(3, b'forged'); Fraction = int")
def f(x): return 0
"""
    asserts = "def check(f):\n    f(1)\n    from fractions import Fraction\n    assert f(1) == Fraction(1)\n"
    outcome, = Sandbox(isolation=isolation).run([Job("python", "asserts", candidate, (), "f", "nonce", asserts)])
    assert "forged" not in outcome.runs[0]["channel"]
    assert '"detail": "AssertionError()"' in outcome.runs[0]["channel"]


def test_nothing_stays_on_the_writable_folders_themselves(sandbox):
    mark = "import os\nfor folder in ('/tmp', '/dev/shm'):\n    {}"
    look = ("import os\nfor folder in ('/tmp', '/dev/shm'):\n"
            "    print(os.listxattr(folder), os.stat(folder).st_mtime, oct(os.stat(folder).st_mode))")
    for action in ("os.setxattr(folder, 'user.mark', b'x')", "os.utime(folder, (42, 42))", "os.chmod(folder, 0)"):
        _, second = sandbox.run([program(mark.format(action)), program(look)])
        assert second.runs[0]["stdout"] == "[] 0.0 0o40700\n" * 2


@pytest.mark.parametrize("hoard", [
    "import socket\nfor _ in range(4): os.fork()\nends = [end for _ in range(25) for end in socket.socketpair()]",
    "for i in range(10**9): os.mkdir(str(i))",
    "data = b'x' * (190 << 20)\nfor i in range(9): open(str(i), 'wb').write(data[:7 << 20])\n"
    "for i in range(2): open(f'/dev/shm/{i}', 'wb').write(data[:7 << 20])"])
def test_what_the_kernel_keeps_for_a_job_counts_as_its_memory(sandbox, hoard):
    outcome = harmless(sandbox, f"import os, time\n{hoard}\ntime.sleep(1)")
    assert outcome.status == "memory_limit"


def test_no_memory_is_shared_without_a_file(sandbox):
    assert output(sandbox, """
import mmap, os
try: mmap.mmap(-1, 4096)
except PermissionError: print('refused')
print(os.path.exists('/dev/zero'), len(mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))
""") == "refused\nFalse 4096\n"


def test_a_caller_that_is_killed_leaves_no_process_and_no_file(tmp_path):
    call = ("from rewards.sandbox import *\n"
            "Sandbox(slot=80).run([Job('python', 'programs', 'import time; time.sleep(60)', [''])])")
    caller = subprocess.Popen([sys.executable, "-c", call], env={
        **os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])})
    try:
        within_seconds(20, lambda: len(below(caller.pid)) == 4)  # bubblewrap, keeper, supervisor and candidate
        sandboxed = below(caller.pid)
    finally:
        caller.kill()
        caller.wait()
    within_seconds(20, lambda: not any(Path(f"/proc/{pid}").exists() for pid in sandboxed))
    assert list(tmp_path.iterdir()) == []


def below(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(pid) for pid in children] + [found for child in children for found in below(child)]


def within_seconds(seconds, holds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_machine_without_bubblewrap_is_told_the_remedy(monkeypatch):
    monkeypatch.setattr("rewards.sandbox.shutil.which", lambda name: None)
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
        Sandbox()


def test_the_weak_isolation_runs_programs_and_leaves_no_process():
    weak = Sandbox(Limits(cpu_seconds=1, wall_seconds=5), isolation="rlimits")
    marker = f"/tmp/posttrain-weak-{os.getpid()}"
    attack = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(1)
    open('{marker}', 'w')
print(1)
"""
    first, second = weak.run([program(attack), program("import time; time.sleep(1.5); print(2)")])
    assert (first.runs[0]["stdout"], second.runs[0]["stdout"]) == ("1\n", "2\n")
    assert not Path(marker).exists()
