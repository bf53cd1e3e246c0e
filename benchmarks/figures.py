"""Figures as the benchmarks tell them: a table for people, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

Row = tuple[str, float, str]  # what was measured, the figure, its unit


def report(rows: Sequence[Row], file: Path | None) -> None:
    """Print the rows, and write them to `file` where one is given."""
    table = Table("what", "figure", "unit", box=None, header_style="bold", pad_edge=False)
    for name, figure, unit in rows:
        table.add_row(name, f"{figure:,.3g}" if figure < 100 else f"{figure:,.0f}", unit)
    Console().print(table)
    if file:
        file.write_text(json.dumps([{"what": name, "figure": figure, "unit": unit} for name, figure, unit in rows],
                                   indent=2))
