r"""A process that compares two LaTeX answers with math-verify, and dies rather than hang.

`python -m rewards.math_worker CPU_SECONDS WALL_SECONDS ADDRESS_BYTES` reads lines `[reference, value]` (JSON) and
answers each with "equal", "different", "unreadable" (the reference) or "memory_limit". Its limits are kernel
timers with the default action, death: `\boxed{3^{10^9}}` spends its time inside one C call that holds the GIL,
where no Python signal handler runs. math-verify's own time-outs are off for that reason.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

from math_verify import parse, verify


def compare(reference: str, value: str) -> str:
    gold = parse(f"${reference}$", fallback_mode="no_fallback", parsing_timeout=None)
    if not gold:
        return "unreadable"
    answer = parse(f"${value}$", fallback_mode="no_fallback", parsing_timeout=None)
    return "equal" if answer and verify(gold, answer, timeout_seconds=None) else "different"


def main(cpu_seconds: float, wall_seconds: float, address_bytes: int) -> None:
    logging.disable(logging.CRITICAL)  # math-verify warns that its time-outs are off
    answers = sys.stdout
    sys.stdout = sys.stderr  # nothing a library prints may look like an answer
    compare("x+1", "1+x")  # builds the parsers before the first timed comparison
    resource.setrlimit(resource.RLIMIT_AS, (address_bytes, address_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
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
