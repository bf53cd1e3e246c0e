"""Ray for one run: started here, or joined where RAY_ADDRESS or POSTTRAIN_RAY_ADDRESS says."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Read by Ray when it is imported and when it starts processes, so set before both.
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",  # Ray's 15 would put the training below everything else on the machine
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # an actor without GPUs must not hide them from its children
    "TOKENIZERS_PARALLELISM": "false",
}

# glibc returns tensors of more than 128 KiB to the kernel when they are freed, and a training step then spends a sixth
# of its time on pages it had a moment ago. Stages give their memory back when they end (`pipeline/worker.py`).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


@contextlib.contextmanager
def ray_session(recipe_name: str, run_dir: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Ray is up inside; it is shut down at the end if it was started here."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.job_config import JobConfig

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("POSTTRAIN_RAY_ADDRESS") or os.environ.get("RAY_ADDRESS")
    # "local" and not None: without an address Ray may join a cluster it finds running on this machine
    options = {"address": address} if address else {"address": "local", "include_dashboard": True}
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    job = JobConfig(metadata={"job_name": f"posttrain {recipe_name}", "run_dir": str(run_dir)})
    context = ray.init(
        **options, namespace="posttrain", job_config=job, log_to_driver=False, logging_level=logging.ERROR,
        configure_logging=True,
        # Ray would give an actor one thread per CPU it reserves; the stage worker reserves none
        runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, **ALLOCATOR}})
    try:
        if context.dashboard_url:
            say(f"Ray dashboard: http://{context.dashboard_url}{_login_hint()}")
        yield
    finally:
        ray.shutdown()


def _login_hint() -> str:
    """Ray asks for a token by default since 2.60 and keeps it in the home directory."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return ""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return f"  (it asks for a token: cat {path})" if path.is_file() else ""
