"""Pieces of HTML and inline SVG the report is built from: escaped text, line charts, intervals, bars.

Every string that comes from a run goes through `text`. Charts that are rows of marks place them in percent of
their width, so their labels keep their size on a narrow screen; line charts scale as small pictures. Each chart
carries its content in words for those who cannot see it.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeline.visible import visible

WIDTH, HEIGHT = 260, 130
LEFT, RIGHT, TOP, BOTTOM = 40, 6, 8, 20  # margins of a line chart, in its own units
MOST_POINTS = 240  # per drawn line; more are averaged in buckets, with the range of each bucket behind
COLOURS = 8  # classes s0 to s7 of the style sheet

Points = Sequence[tuple[float, float]]


def text(value: Any) -> str:
    """Any value as HTML text; invisible characters stand as their code point in brackets."""
    return html.escape(visible(value), quote=True)


def tag(name: str, *children: str, **attributes: Any) -> str:
    """`<name attributes>children</name>`; children are HTML. `class_` is class, `aria_label` aria-label."""
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items()
                    if value is not None)
    return f"<{name}{shown}>{''.join(children)}</{name}>"


def number(value: Any) -> str:
    """A number as a person reads it: `12,345`, `0.432`, `3.1e-06`; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) if math.isfinite(value) and abs(value) >= 1000 else False):
        return f"{int(value):,}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def percent(share: float | None, digits: int = 1) -> str:
    return "no verdict" if share is None else f"{100 * share:.{digits}f}%"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = (), caption: str = "") -> str:
    """A table of HTML cells in a box of its own that scrolls; `right` lists the columns of numbers."""
    def cells(name: str, row: Sequence[str], **attributes: Any) -> str:
        return "".join(tag(name, cell, class_="n" if column in right else None, **attributes)
                       for column, cell in enumerate(row))

    body = "".join(tag("tr", cells("td", row)) for row in rows)
    content = (tag("caption", text(caption)) if caption else "") + \
        tag("thead", tag("tr", cells("th", [text(name) for name in head], scope="col"))) + tag("tbody", body)
    return tag("div", tag("table", content), class_="box", tabindex="0", role="region",
               aria_label=caption or ", ".join(head))


def absent(what: str, why: str) -> str:
    return tag("p", f"{text(what)} {text(why)}", class_="absent")


def fold(summary: str, content: str, is_open: bool = False, class_: str | None = None) -> str:
    """A collapsible block; `summary` and `content` are HTML."""
    return f"<details{' open' if is_open else ''}{f' class={class_}' if class_ else ''}>" \
           f"<summary>{summary}</summary>{content}</details>"


# -- line charts -----------------------------------------------------------------------------------------------


def line_chart(title: str, lines: Sequence[tuple[str, int, Points]], *, bound: tuple[str, float] | None = None,
               log: bool = False, note: str = "", unit: str = "step") -> str:
    """A small picture of (label, colour, points) lines over steps; "" when no line has a point.

    bound: a named dashed horizontal line, which the axis then includes. log: logarithmic values; those not
    above 0 stand at the bottom.
    """
    lines = [line for line in lines if line[2]]
    if not lines:
        return ""
    values = [value for _, _, points in lines for _, value in points] + ([bound[1]] if bound else [])
    steps = [step for _, _, points in lines for step, _ in points]
    low, high, ticks = _log_axis(values) if log else _axis(min(values), max(values))
    first, last = min(steps), max(steps)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        if log:
            value = math.log10(value) if value > 0 else low
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (min(max(value, low), high) - low) / (high - low))

    parts = []
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{text(_tick(tick))}</text>')
    for step, anchor in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
        shown = f"{unit} {number(step)}" if step == first else number(step)
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{text(shown)}</text>')
    if bound:
        at = y(bound[1])
        parts.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text class="boundname" x="{WIDTH - RIGHT}" y="{at + 11:.1f}" text-anchor="end">'
                     f'{text(bound[0])}</text>')
    for _, colour, points in lines:
        parts.append(_line(colour, points, x, y))
    legend = [tag("span", tag("i", class_=f"key s{colour % COLOURS}"), text(label) + " ",
                  tag("b", text(number(points[-1][1])))) for label, colour, points in lines]
    several = len(lines) > 1
    words = "; ".join(f"{label + ': ' if several else ''}{number(points[0][1])} at {unit} {number(points[0][0])}, "
                      f"{number(points[-1][1])} at {unit} {number(points[-1][0])}" for label, _, points in lines)
    ends = "" if several else f"{number(lines[0][2][0][1])} → {number(lines[0][2][-1][1])}"
    picture = (f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
               f'aria-label="{text(title)}: {text(words)}" data-unit="{text(unit)}">{"".join(parts)}'
               f'<line class="cross" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden="hidden"/></svg>')
    return tag("figure", tag("figcaption", tag("b", text(title)), " ", tag("span", text(ends), class_="ends")), picture,
               tag("p", *legend, class_="legend") if several else "",
               tag("p", text(note), class_="note") if note else "", class_="panel")


def _line(colour: int, points: Points, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    shown, low, high = _bucketed(points)
    band = ""
    if low is not None:
        around = [*((step, value) for (step, _), value in zip(shown, high, strict=True)),
                  *((step, value) for (step, _), value in reversed(list(zip(shown, low, strict=True))))]
        band = '<polygon class="band s{}" points="{}"/>'.format(
            colour % COLOURS, " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in around))
    dots = "".join(f'<circle class="dot s{colour % COLOURS}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.4"/>'
                   for step, value in shown) if len(shown) <= 12 else ""
    places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in shown)
    read = json.dumps([[number(step), number(value)] for step, value in shown], separators=(",", ":"))
    return f'{band}<polyline class="line s{colour % COLOURS}" points="{places}" ' \
           f'data-read="{text(read)}"/>{dots}'


def _bucketed(points: Points) -> tuple[Points, list[float] | None, list[float] | None]:
    """At most MOST_POINTS points: means of equal runs of points, and each run's lowest and highest value."""
    if len(points) <= MOST_POINTS:
        return points, None, None
    edges = [round(index * len(points) / MOST_POINTS) for index in range(MOST_POINTS + 1)]
    runs = [points[begin:end] for begin, end in zip(edges, edges[1:], strict=False)]
    return ([(run[-1][0], sum(value for _, value in run) / len(run)) for run in runs],
            [min(value for _, value in run) for run in runs], [max(value for _, value in run) for run in runs])


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Bounds and about four round ticks; starts at 0 when the values come near it."""
    if low > 0 and low < 0.4 * high:
        low = 0.0
    if high == low:
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if factor * step >= (high - low) / 3.5)
    begin, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(begin, end + 1)]
    return ticks[0], ticks[-1], ticks


def _log_axis(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Whole decades as bounds (log10) and at most four of them as ticks (values)."""
    positive = [value for value in values if value > 0] or [1e-6, 1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    every = math.ceil((high - low) / 4)
    return low, high, [10.0 ** decade for decade in range(low, high + 1, every)]


def _tick(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else \
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# -- rows of marks ---------------------------------------------------------------------------------------------


def interval_rows(rows: Sequence[tuple[str, str, float, tuple[float, float]]], middle: str | None = None) -> str:
    """Shares in [0, 1] as dots with whiskers: (label, class, share, interval), one row each, under one scale.

    middle: name of a reference line at one half.
    """
    grid = "".join(f'<line class="grid" x1="{at}%" x2="{at}%" y1="0" y2="100%"/>' for at in (0, 25, 50, 75, 100))
    grid += '<line class="bound" x1="50%" x2="50%" y1="0" y2="100%"/>' if middle else ""
    drawn = []
    for label, class_, share, (low, high) in rows:
        mark = (f'<line class="whisker" x1="{100 * low:.2f}%" x2="{100 * high:.2f}%" y1="50%" y2="50%"/>'
                f'<circle cx="{100 * share:.2f}%" cy="50%" r="5"/>')
        words = f"{label}: {percent(share)}, 95% interval {percent(low)} to {percent(high)}"
        picture = f'<svg class="marks m-{text(class_)}" role="img" aria-label="{text(words)}">{grid}{mark}</svg>'
        drawn.append(tag("span", text(label), class_="label") + picture +
                     tag("span", tag("b", percent(share)), tag("small", f"{100 * low:.0f}–{100 * high:.0f}"),
                         class_="value"))
    scale = "".join(f'<text x="{at}%" y="10" text-anchor="{anchor}">{at}%</text>'
                    for at, anchor in ((0, "start"), (25, "middle"), (50, "middle"), (75, "middle"), (100, "end")))
    axis = "<span></span>" + f'<svg class="scale" aria-hidden="true">{scale}</svg>' + \
        tag("span", tag("small", text(middle or "")), class_="value")
    return tag("div", *drawn, axis, class_="intervals")


def magnitude_row(label: str, value: float, bound: float | None, low: float = 1e-9, high: float = 1.0) -> list[str]:
    """Cells for a table: label, place of a value on a log scale with its bound, value, bound."""
    def place(at: float) -> float:
        return 100 * min(1.0, max(0.0, math.log10(max(at, low) / low) / math.log10(high / low)))

    limit = f'<line class="bound" x1="{place(bound):.1f}%" x2="{place(bound):.1f}%" y1="0" y2="100%"/>' if bound else ""
    state = "m-bad" if bound is not None and value > bound else "m-rl"
    picture = (f'<svg class="marks wide {state}" aria-hidden="true">'
               f'<line class="grid" x1="0" x2="100%" y1="50%" y2="50%"/>{limit}'
               f'<circle cx="{place(value):.1f}%" cy="50%" r="4"/></svg>')
    return [text(label), picture, text(number(value)), text(number(bound)) if bound is not None else ""]


def share_bar(parts: Sequence[tuple[str, int]]) -> str:
    """Counts as one bar, each part with a class `v-name`; read out as words."""
    total = sum(count for _, count in parts)
    if not total:
        return ""
    words = ", ".join(f"{name} {count:,}" for name, count in parts if count)
    return tag("div", *(f'<i class="v-{text(name)}" style="flex-grow:{count}" title="{text(name)} {count:,}"></i>'
                        for name, count in parts if count), class_="stack", role="img", aria_label=words)


def length_bar(value: float, largest: float, class_: str = "") -> str:
    width = 100 * value / largest if largest else 0
    return f'<div class="length {class_}" aria-hidden="true"><i style="width:{width:.2f}%"></i></div>'


# -- heat maps -------------------------------------------------------------------------------------------------


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float]]], full: float, *, column: str,
             note: str = "") -> str:
    """Values of 0 and above as cells, (label, values) a row: clear at 0, solid at `full` and above; "" without rows.

    `column` is what a column is called, counted from 0. The page's style colours the cells for light and dark.
    """
    if not rows:
        return ""
    columns, left, height = len(rows[0][1]), 62, 16
    width, bottom = (WIDTH - left - RIGHT) / columns, TOP + height * len(rows)
    parts = []
    for at, (label, values) in enumerate(rows):
        y = TOP + height * at
        parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{text(label)}</text>')
        for index, value in enumerate(values):
            parts.append(f'<rect x="{left + index * width:.2f}" y="{y}" width="{width:.2f}" height="{height - 1}" '
                         f'fill-opacity="{min(1.0, value / full):.2f}"><title>{text(label)}, {text(column)} {index}: '
                         f'{number(value)}</title></rect>')
    for index, anchor in ((0, "start"), (columns - 1, "end")):
        x = left if anchor == "start" else WIDTH - RIGHT
        shown = f"{column} {index}" if anchor == "start" else f"{index}"
        parts.append(f'<text x="{x}" y="{bottom + 12}" text-anchor="{anchor}">{text(shown)}</text>')
    words = "; ".join(f"{label}: most at {column} {max(range(columns), key=values.__getitem__)} with "
                      f"{number(max(values))}" for label, values in rows)
    picture = (f'<svg class="heat" viewBox="0 0 {WIDTH} {bottom + 16}" role="img" '
               f'aria-label="{text(title)}: {text(words)}">{"".join(parts)}</svg>')
    return tag("figure", tag("figcaption", tag("b", text(title))), picture,
               tag("p", text(note), class_="note") if note else "", class_="panel")
