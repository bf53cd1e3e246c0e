"""Tables too large for one process: folders of Parquet parts, and work done on them part by part.

A unit of work is a pure function of one part. What it makes is a folder that comes into being by one rename, so a
killed stage goes on with the units that are missing. Names of parts, sorted, are the order of the rows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.stage import Progress

PART = "part-{:05}.parquet"
HERE_BYTES = 64 * 2**20  # of Parquet; less is done in this process before others have started
UNITS_PER_CPU = 2  # handed out at a time, so that no process waits for its next one


def parts(folder: Path) -> list[Path]:
    """The parts of a table in the order of their rows."""
    return sorted(folder.glob("*.parquet"))


def map_parts(function: Callable[..., None], sources: Sequence[Path], made: Path, progress: Progress, *shared: Any,
              size: int | None = None) -> list[Path]:
    """`function(source, out, *shared)` fills the new folder `out` for each source file; returns them, in order.

    Folders that `made` holds already are not made again. Much work is spread over the CPUs of the Ray cluster;
    `function` then is one that its processes can import. size: bytes of work, where it is not that of the sources.
    Raises whatever `function` raises.
    """
    folders = [made / source.stem for source in sources]
    made.mkdir(parents=True, exist_ok=True)
    left = [(source, folder) for source, folder in zip(sources, folders, strict=True) if not folder.is_dir()]
    progress.start(len(sources), "parts", done=len(sources) - len(left))
    if (sum(source.stat().st_size for source, _ in left) if size is None else size) < HERE_BYTES:
        for source, folder in left:
            _unit(function, source, folder, *shared)
            progress.advance(1)
    else:
        _spread(function, left, progress, shared)
    return folders


def _unit(function: Callable[..., None], source: Path, folder: Path, *shared: Any) -> None:
    """Fill a folder aside and rename it. The name aside is this process's own: one of a killed run may still write."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    function(source, aside, *shared)
    for path in aside.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(aside)  # that other process was faster; the same came out of it


def _spread(function: Callable[..., None], left: list[tuple[Path, Path]], progress: Progress, shared: tuple[Any, ...]
            ) -> None:
    import ray  # here: most stages of small runs do without

    unit = ray.remote(num_cpus=1, max_retries=3, runtime_env={"env_vars": {
        "POLARS_MAX_THREADS": "1", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}})(_unit)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting, running = list(reversed(left)), []
    try:
        while waiting or running:
            while waiting and len(running) < UNITS_PER_CPU * cpus:
                running.append(unit.remote(function, *waiting.pop(), *shared))
            done, running = ray.wait(running)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # as it was: Ray's copy of an OSError forgets that the disk is full
            progress.advance(len(done))
    except BaseException:
        for reference in running:
            ray.cancel(reference, force=True)
        raise


def publish(folders: Sequence[Path], name: str, target: Path) -> int:
    """Link the tables `name` of the folders that `map_parts` made into `target` as parts; returns their rows.

    Tables without rows are left out, except where all are: a table keeps its schema.
    """
    target.mkdir(parents=True)
    tables = [folder / name for folder in folders]
    sizes = [pq.read_metadata(table).num_rows for table in tables]
    kept = [table for table, rows in zip(tables, sizes, strict=True) if rows] or tables[:1]
    for number, table in enumerate(kept):
        link(table, target / PART.format(number))
    return sum(sizes)


def link(source: Path | str, target: Path | str) -> None:
    """Another name for a file that is never changed; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
