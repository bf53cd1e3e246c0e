"""How far a stage is: counted in the worker, carried by one small file, drawn by the driver.

A file instead of messages, because the driver must show something sensible when the worker is busy in C++,
has just died, or is another machine's process on a shared disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as RichProgress

WRITE_SECONDS = 0.25
LINE_SECONDS = 10.0
QUIET_SECONDS = 60.0  # without news for so long, the line says so
NOTES_KEPT = 50


@dataclass
class ProgressState:
    """What the file holds. Times are seconds since the epoch."""

    unit: str = ""
    total: int | None = None
    done: int = 0
    done_at_start: int = 0
    started: float = 0.0  # of this count
    moved: float = 0.0  # last change
    metrics: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # the last NOTES_KEPT
    notes_made: int = 0

    def rate(self) -> float | None:
        """Units per second since the count began; None before the first."""
        seconds = self.moved - self.started
        made = self.done - self.done_at_start
        return made / seconds if made > 0 and seconds > 0 else None

    def line(self, now: float) -> str:
        """`120/300 steps  3.1 steps/s  loss 0.812  ETA 1m02s`"""
        parts = []
        if self.unit:
            parts.append(f"{self.done:,}" + (f"/{self.total:,}" if self.total is not None else "") + f" {self.unit}")
        rate = self.rate()
        if rate is not None:
            shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
            parts.append(f"{shown} {self.unit}/s" if rate >= 0.1 else f"{1 / rate:.3g} s each")
        parts += [f"{name} {value:.4g}" for name, value in self.metrics.items()]
        if rate is not None and self.total is not None and self.total > self.done:
            parts.append(f"ETA {duration((self.total - self.done) / rate)}")
        if self.moved and now - self.moved > QUIET_SECONDS:
            parts.append(f"no news for {duration(now - self.moved)}")
        return "  ".join(parts)


class FileProgress:
    """The `Progress` a stage gets. Calls only touch memory; a thread writes the file at most 4 times a second.

    Sent to another process it goes on there, in the same file; the one who sent it waits.
    """

    def __init__(self, path: Path, state: ProgressState | None = None) -> None:
        self._path = path
        self._state = state or ProgressState(moved=time.time())
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write_changes, name="progress", daemon=True)
        self._thread.start()

    def __reduce__(self) -> tuple:
        with self._lock:
            return FileProgress, (self._path, self._state)

    def start(self, total: int | None, unit: str, done: int = 0) -> None:
        now = time.time()
        with self._lock:
            notes, notes_made = self._state.notes, self._state.notes_made
            self._state = ProgressState(unit, total, done, done, now, now, {}, notes, notes_made)
        self._changed.set()

    def advance(self, count: int = 1, **metrics: float) -> None:
        with self._lock:
            self._state.done += count
            self._state.moved = time.time()
            # floats of torch and numpy are not JSON
            self._state.metrics.update({name: float(value) for name, value in metrics.items()})
        self._changed.set()

    def note(self, text: str) -> None:
        print(text, flush=True)  # into the stage's log
        with self._lock:
            self._state.notes = [*self._state.notes, text][-NOTES_KEPT:]
            self._state.notes_made += 1
            self._state.moved = time.time()
        self._changed.set()

    def close(self) -> None:
        """Write the last state and stop the thread."""
        self._closed.set()
        self._changed.set()
        self._thread.join()

    def _write_changes(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            with self._lock:
                text = json.dumps(asdict(self._state))
            aside = self._path.with_suffix(".tmp")
            # a full disk or a vanished folder stops the stage where it matters, not the picture of it
            with contextlib.suppress(OSError):
                aside.write_text(text)
                os.replace(aside, self._path)
            if self._closed.is_set() and not self._changed.is_set():
                return
            self._closed.wait(WRITE_SECONDS)


def read_progress(path: Path) -> ProgressState | None:
    """The state last written, or None while there is none."""
    try:
        return ProgressState(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None


class Display(Protocol):
    """What the driver shows of a run."""

    def stage_started(self, name: str, position: str, title: str) -> None: ...

    def update(self, state: ProgressState | None) -> None: ...

    def stage_finished(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Notes:
    """Hands out each note once, though the file only holds the last ones."""

    def __init__(self) -> None:
        self._shown = 0

    def fresh(self, state: ProgressState) -> list[str]:
        new = state.notes_made - self._shown
        self._shown = state.notes_made
        return state.notes[-new:] if new > 0 else []


class LineDisplay:
    """For logs and pipes: a line when a stage starts and ends, and one about every ten seconds between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._notes = _Notes()
        self._started = self._last = 0.0

    def stage_started(self, name: str, position: str, title: str) -> None:
        self._name, self._notes = name, _Notes()
        self._started = self._last = time.time()
        self.say(f"[{name}] started ({position})" + (f": {title}" if title else ""))

    def update(self, state: ProgressState | None) -> None:
        if state is not None:
            for note in self._notes.fresh(state):
                self.say(f"[{self._name}] {note}")
        now = time.time()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            line = state.line(now) if state is not None else ""
            self.say(f"[{self._name}] {line or 'running for ' + duration(now - self._started)}")

    def stage_finished(self, text: str) -> None:
        self.say(f"[{self._name}] {text}")

    def say(self, text: str) -> None:
        # a pipe has no width to wrap to, and [name] is no markup
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


class BarDisplay:
    """For a terminal: one live bar for the stage under way, finished stages as lines above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = RichProgress(SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(24),
                                  TextColumn("{task.fields[line]}", markup=False), console=console, transient=True)
        self._bars.start()
        self._task: Any = None
        self._name = ""
        self._notes = _Notes()
        self._started = 0.0

    def stage_started(self, name: str, position: str, title: str) -> None:
        self._name, self._notes, self._started = name, _Notes(), time.time()
        self._task = self._bars.add_task(f"{name} ({position})", total=None, line=title)

    def update(self, state: ProgressState | None) -> None:
        if self._task is None:
            return
        now = time.time()
        if state is None or not state.unit:
            self._bars.update(self._task, line=duration(now - self._started))
        else:
            self._bars.update(self._task, total=state.total, completed=state.done, line=state.line(now))
        for note in self._notes.fresh(state) if state is not None else []:
            self.say(f"  {self._name}: {note}")

    def stage_finished(self, text: str) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        self.say(f"{self._name:24} {text}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bars.stop()


def make_display(console: Console) -> Display:
    return BarDisplay(console) if console.is_terminal else LineDisplay(console)


def duration(seconds: float) -> str:
    """`8.3s`, `1m02s`, `2h05m`"""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def counts_line(counts: Mapping[str, Any]) -> str:
    """The plain numbers among a result's counts: `in 120  out 96`."""
    return "  ".join(f"{name} {value:,}" for name, value in counts.items() if isinstance(value, int))
