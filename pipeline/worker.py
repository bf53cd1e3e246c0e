"""The process in which stages run, one after another.

One process for the whole run, because importing torch, transformers and vLLM takes longer than many a
stage of the tiny recipe. `StageWorker` is a plain class: the runner makes a Ray actor of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from pipeline.artifacts import disk_full_explained, now
from pipeline.progress import FileProgress
from pipeline.stage import Stage, StageContext, StageError, StageResult

LOCK_SECONDS = 60.0


@dataclass(frozen=True)
class StageOrder:
    """One stage to run: where its inputs lie, where it works, where it logs."""

    stage: Stage
    inputs: dict[str, Path]
    work_folder: Path
    log_file: Path
    seed: int


class StageWorker:
    """Runs stages. Its files: `out.tmp/` and `work/` in the stage's work folder, and the stage's log."""

    def run_stage(self, order: StageOrder) -> StageResult:
        """Fill `out.tmp` and return what the manifest shall say; the driver commits.

        Raises StageError for what the user can mend (a full disk among it) and whatever the stage raises.
        """
        folder = order.work_folder
        with disk_full_explained(folder):
            (folder / "work").mkdir(parents=True, exist_ok=True)
            order.log_file.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(folder), _output_to(order.log_file):
                print(f"=== {now()} stage {order.stage.name} in {folder}", flush=True)
                # only work/ is resumed from: what a killed run left in out.tmp may be half a file
                shutil.rmtree(folder / "out.tmp", ignore_errors=True)
                (folder / "out.tmp").mkdir()
                (folder / "progress.json").unlink(missing_ok=True)
                progress = FileProgress(folder / "progress.json")
                try:
                    return order.stage.run(StageContext(
                        name=order.stage.name, config=order.stage.config, inputs=order.inputs,
                        out=folder / "out.tmp", work=folder / "work", seed=order.seed, progress=progress))
                finally:
                    progress.close()
                    _release_memory()

    def resident(self) -> int:
        """Bytes of memory that this process holds between stages."""
        return psutil.Process().memory_info().rss


def _release_memory() -> None:
    """Give back what a stage held: a trainer is a web of cycles, and the next stage's engine needs its gigabytes."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has malloc_trim
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the work folder: the worker of a killed run may take a while to notice and still be writing."""
    with open(folder / ".lock", "w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StageError(f"{folder}: a worker of an earlier run still holds it after {LOCK_SECONDS:.0f} s; "
                                     "find it with `fuser` on that folder's .lock, stop it, and run again") from None
                time.sleep(0.25)
        yield


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[IO[str]]:
    """Send file descriptors 1 and 2 to the log, so that what C++ prints lands there too."""
    with open(log, "a") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # Ray puts streams of its own in front of the descriptors
        streams = sys.stdout, sys.stderr
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        try:
            yield file
        finally:
            for stream, descriptor in zip((sys.stdout, sys.stderr), (1, 2), strict=True):
                stream.close()
                os.dup2(saved[descriptor - 1], descriptor)
                os.close(saved[descriptor - 1])
            sys.stdout, sys.stderr = streams
