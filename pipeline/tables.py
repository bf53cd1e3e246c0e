"""Read tables that are Parquet files or folders of Parquet parts, without holding them.

The parts of a folder are one table in the order of their names, folders within it included (`train/`, `validation/`).
Text is read for single rows, or one row group at a time; whole columns are read only where they are narrow.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import RunError

BATCH = 4096


def files(path: Path) -> list[Path]:
    """The Parquet files of a table, in the order of its rows; [] where there is none."""
    return [path] if path.is_file() else sorted(path.rglob("*.parquet"))


def find(path: Path, wanted: pl.Expr, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for which an expression over narrow columns is true; [] also where there is no table.

    What the expression names is read as a stream, `columns` only where such rows are.
    """
    if not (found := files(path)):
        return []
    places = (pl.scan_parquet(found, row_index_name="place", glob=False).filter(wanted).select("place")
              .collect(engine="streaming")["place"])
    return Table(path).rows(places.to_list(), columns)


@dataclass(frozen=True)
class _Group:
    file: Path
    number: int  # of the row group in the file
    start: int  # its first row in the whole table


class Table:
    """A table by the places of its rows: 0 to `len(table) - 1` over all parts. Opening it reads the footers alone."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self.files = [file for path in paths for file in files(path)]
        self.starts: list[int] = []  # of the files
        self.groups: list[_Group] = []
        self.length = 0
        for file in self.files:
            metadata = pq.read_metadata(file)
            self.starts.append(self.length)
            for number in range(metadata.num_row_groups):
                self.groups.append(_Group(file, number, self.length))
                self.length += metadata.row_group(number).num_rows

    def __len__(self) -> int:
        return self.length

    @property
    def columns(self) -> list[str]:
        return pq.read_schema(self.files[0]).names if self.files else []

    def row(self, place: int) -> dict[str, Any]:
        """One row with all its columns; raises RunError when there is no such row."""
        if not 0 <= place < len(self):
            raise RunError(f"{', '.join(map(str, self.paths))}: there is no row {place}; it has {len(self)}, counted "
                           "from 0")
        return self.rows([place], self.columns)[0]

    def rows(self, places: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows in the order asked for."""
        found: dict[int, dict[str, Any]] = {}
        for frame in self.read(sorted(set(places)), columns):
            found |= zip(frame["place"], frame.drop("place").to_dicts(), strict=True)
        return [found[place] for place in places]

    def read(self, places: Sequence[int], columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Rows at ascending places, with their `place`, in frames of at most BATCH rows. Row groups without any are
        not read.
        """
        starts = [group.start for group in self.groups]
        for index, chosen in itertools.groupby(places, lambda place: bisect.bisect_right(starts, place) - 1):
            group, left, begin = self.groups[index], list(chosen), starts[index]
            for batch in pq.ParquetFile(group.file).iter_batches(BATCH, [group.number], list(columns)):
                count = bisect.bisect_left(left, begin + len(batch))
                here, left = left[:count], left[count:]
                if here:
                    frame = pl.DataFrame(pl.from_arrow(batch.take(pa.array([place - begin for place in here]))))
                    yield frame.with_columns(place=pl.Series(here, dtype=pl.Int64))
                begin += len(batch)
                if not left:
                    break

    def narrow(self, columns: Sequence[str], labels: Sequence[str] = ()) -> pl.DataFrame:
        """Whole columns, with the `place` of each row and the `file` (its index) that holds it.

        A dot in a name reaches into a struct, whose other fields are not read. labels: columns of few different
        strings, which become categories.
        """
        frames = []
        for index, file in enumerate(self.files):
            read = pl.DataFrame(pl.from_arrow(pq.ParquetFile(file).read(columns=list(columns)).flatten()))
            frames.append(read.with_columns(pl.col(labels).cast(pl.Categorical), file=pl.lit(index, pl.Int32)))
        return pl.concat(frames).with_row_index("place").cast({"place": pl.Int64})

    def part_of(self, place: int) -> tuple[Path, int]:
        """The part that holds a row, and the row's number in it."""
        index = bisect.bisect_right(self.starts, place) - 1
        return self.files[index], place - self.starts[index]
