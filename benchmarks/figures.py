"""Figures as the benchmarks tell them: a table for people, JSON for scripts, curves as an SVG picture."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.report_charts import HEIGHT, WIDTH, line_chart, text

Row = tuple[str, float, str]  # what was measured, the figure, its unit
Panel = tuple[str, Sequence[tuple[str, Sequence[float]]], tuple[str, float] | None]  # title, curves, dashed line

COLOURS = ("#2f67b1", "#b9661c", "#2b7a63", "#8c4f9f")
STYLE = "text{font:9px sans-serif;fill:#555}.grid{stroke:#ddd}.cross{display:none}.title{font-weight:bold;fill:#222}" \
        ".bound{stroke:#a33;stroke-dasharray:4 3}.boundname{fill:#a33}.line{fill:none;stroke-width:1.2}" + \
        "".join(f".s{index}{{stroke:{colour}}}.k{index}{{fill:{colour}}}" for index, colour in enumerate(COLOURS))
HEAD = 26  # above a panel, for its title and legend


class Silent:
    """A `Progress` nobody watches."""

    def start(self, total: int | None, unit: str, done: int = 0) -> None: ...

    def advance(self, count: int = 1, **metrics: float) -> None: ...

    def note(self, text: str) -> None: ...


def report(rows: Sequence[Row], file: Path | None) -> None:
    """Print the rows, and write them to `file` where one is given."""
    table = Table("what", "figure", "unit", box=None, header_style="bold", pad_edge=False)
    for name, figure, unit in rows:
        table.add_row(name, f"{figure:,.3g}" if figure < 100 else f"{figure:,.0f}", unit)
    Console().print(table)
    if file:
        file.write_text(json.dumps([{"what": name, "figure": figure, "unit": unit} for name, figure, unit in rows],
                                   indent=2))


def save_chart(file: Path, panels: Sequence[Panel]) -> None:
    """Write the panels as one SVG picture; a curve has a value for each step from 1."""
    drawn = []
    for index, (title, curves, bound) in enumerate(panels):
        chart = line_chart(title, [(label, colour, list(enumerate(curve, 1)))
                                   for colour, (label, curve) in enumerate(curves)], bound=bound)
        chart = re.sub(r' data-read="[^"]*"', "", re.search("<svg.*?</svg>", chart, re.DOTALL)[0])
        top = index * (HEIGHT + HEAD)
        chart = chart.replace("<svg", f'<svg y="{top + HEAD}" width="{WIDTH}" height="{HEIGHT}"', 1)
        legend = " ".join(f'<tspan class="k{colour}">{text(label)}</tspan>' for colour, (label, _) in enumerate(curves))
        drawn.append(f'<text class="title" x="6" y="{top + 11}">{text(title)}</text><text x="6" y="{top + 22}">{legend}'
                     f'</text>{chart}')
    size = (WIDTH, len(panels) * (HEIGHT + HEAD))
    file.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{3 * size[0]}" height="{3 * size[1]}" '
                    f'viewBox="0 0 {size[0]} {size[1]}"><style>{STYLE}</style>'
                    f'<rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>\n')
