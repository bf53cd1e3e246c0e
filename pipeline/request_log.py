"""An append-only log of finished requests, so that a killed generation loses at most the batch under way.

Each line is {"key": content hash of the request, "record": what came back}. A batch is on disk when
`append` returns. A line torn by a crash is cut off when the log is opened again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class RequestLog:
    """`done` maps the key of every finished request to its record; `append` adds to it and to the file.

    Use it as a context manager, or call `close`. One process writes a log; the stage's lock sees to that.
    Raises ValueError when a line other than the last is damaged: that is no crash of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")
        self._load()

    def _load(self) -> None:
        self._file.seek(0)
        whole = 0  # bytes up to the end of the last whole line
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break  # torn: the newline is written last
            try:
                entry = json.loads(line)
                self.done[entry["key"]] = entry["record"]
            except (ValueError, KeyError, TypeError) as error:
                # a torn write may leave a hole of zero bytes before its newline, but only at the very end
                if self._file.read(1):
                    raise ValueError(f"{self.path}, line {number}: not a line of a request log ({error}); "
                                     "delete the file to make its requests again") from error
                break
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def append(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Write one batch of key -> record; it is on disk when this returns."""
        entries = ({"key": key, "record": record} for key, record in records.items())
        self._file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(records)

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self.done)

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
