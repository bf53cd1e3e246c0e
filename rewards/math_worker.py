r"""A process that compares two LaTeX answers by algebra, in a child that dies rather than hang.

`python -m rewards.math_worker CPU_SECONDS WALL_SECONDS ADDRESS_BYTES` reads lines `[reference, value]` (JSON) and
answers each with "equal", "different", "unreadable" (the reference), "memory_limit" or "time_limit". The limits are
kernel timers with the default action, death: `\boxed{3^{10^9}}` spends its time inside one C call that holds the GIL,
where no Python signal handler runs. Importing sympy takes a second, so it is a fork of the importing process that
dies, and the next one is there in milliseconds. math-verify's own time-outs are off.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys

from rewards.algebra import Algebra, Unreadable
from rewards.equality import same

PR_SET_PDEATHSIG = 1
TIMERS = (signal.SIGPROF, signal.SIGALRM, signal.SIGVTALRM)


def compare(reference: str, value: str) -> str:
    try:
        return "equal" if same(reference, value, Algebra()) else "different"
    except Unreadable:
        return "unreadable"


def main(cpu_seconds: float, wall_seconds: float, address_bytes: int) -> None:
    logging.disable(logging.CRITICAL)  # math-verify warns that its time-outs are off
    compare("x+1", "1+x")  # builds the parsers before the first timed comparison
    print("ready", flush=True)
    while True:
        child = os.fork()
        if not child:
            serve(cpu_seconds, wall_seconds, address_bytes)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not code:
            return
        print("time_limit" if -code in TIMERS else f"died with status {code}", flush=True)


def serve(cpu_seconds: float, wall_seconds: float, address_bytes: int) -> None:
    """Answer lines until there are no more, or one ends this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing a library prints may look like an answer
    resource.setrlimit(resource.RLIMIT_AS, (address_bytes, address_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while line := sys.stdin.readline():
        reference, value = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, wall_seconds)
        try:
            result = compare(reference, value)
        except MemoryError:
            result = "memory_limit"
        except RecursionError:
            result = "different"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(result, file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
