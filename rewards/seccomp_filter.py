"""The system calls a sandboxed program may not make.

A deny list on top of the namespaces: what could reach another process of the same sandbox, what makes kernel
attack surface (bpf, io_uring, user namespaces), and what leaves state behind for the next job.
"""

from __future__ import annotations

import errno
import os
import tempfile
from functools import cache
from types import ModuleType
from typing import Any


class SandboxUnavailable(RuntimeError):
    """This machine lacks what a sandbox needs; the message names it and the remedy."""


REFUSED = ("ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd "
           "mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr "
           "unshare setns bpf perf_event_open userfaultfd keyctl add_key request_key "
           "io_uring_setup io_uring_enter io_uring_register "
           "init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff acct quotactl "
           "open_by_handle_at name_to_handle_at syslog settimeofday clock_settime adjtimex clock_adjtime "
           # state that would outlive a job within the same sandbox
           "shmget msgget semget mq_open memfd_create memfd_secret "
           # slowing down others
           "setpriority sched_setscheduler sched_setparam sched_setattr sched_setaffinity ioprio_set").split()
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
NAMESPACE_FLAGS = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)


@cache
def filter_program() -> bytes:
    """The seccomp program (BPF) for this machine's architecture."""
    seccomp = _library()
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in REFUSED:
        rules.add_rule(seccomp.ERRNO(errno.EPERM), name)
    for flag in NAMESPACE_FLAGS:
        rules.add_rule(seccomp.ERRNO(errno.EPERM), "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    for name in ("socket", "socketpair"):
        rules.add_rule(seccomp.ERRNO(errno.EACCES), name, seccomp.Arg(0, seccomp.NE, 1))  # AF_UNIX is 1
    # MAP_SHARED | MAP_ANONYMOUS: its pages outlive the process that wrote them, and count as nobody's
    rules.add_rule(seccomp.ERRNO(errno.EPERM), "mmap", seccomp.Arg(3, seccomp.MASKED_EQ, 0x21, 0x21))
    rules.add_rule(seccomp.ERRNO(errno.EPERM), "prlimit64", seccomp.Arg(0, seccomp.NE, 0))  # others' limits
    return _exported(rules)


@cache
def candidate_program() -> bytes:
    """What the driver adds for candidates: they stay in one session, and keeper and supervisor in others.

    Schedulers share the processor among sessions, so a bomb of many would keep the keeper from its turn.
    """
    seccomp = _library()
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    rules.add_rule(seccomp.ERRNO(errno.EPERM), "setsid")
    return _exported(rules)


def _library() -> ModuleType:
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:
        raise SandboxUnavailable(f"pyseccomp does not load ({error}); pip install pyseccomp and "
                                 "apt-get install libseccomp2") from None
    return pyseccomp


def _exported(rules: Any) -> bytes:
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def filter_descriptor() -> int:
    """A descriptor to read the program from, for bwrap's --seccomp; the caller closes it."""
    descriptor = os.memfd_create("seccomp")
    os.write(descriptor, filter_program())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
