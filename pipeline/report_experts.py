"""The report's section on the mixture of experts: who works for which domain, how even the load is, what is dropped.

After appendix C of the DeepSeek-V3 technical report (arXiv 2412.19437), which draws relative expert load by domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.report_charts import fold, heat_map, number, tag, text
from pipeline.report_data import RunView

FULL = 4.0  # relative load drawn solid
MOST_LAYERS = 12  # panels; more layers are thinned out evenly


def experts_section(run: RunView) -> str:
    """Heat maps of the final policy's load by domain, and of each training's load; "" for dense models."""
    return _by_domain(run) + _training(run)


def relative(counts: Sequence[int]) -> list[float]:
    """Load over the mean load of the experts; zeros where nothing came."""
    mean = sum(counts) / len(counts)
    return [count / mean if mean else 0.0 for count in counts]


def _by_domain(run: RunView) -> str:
    found = run.json("evaluate", "expert_load.json")
    if not found:
        return ""
    layers, load = found["layers"], found["load"]
    shown = _spread(range(len(layers)))
    panels = [heat_map(f"layer {layers[at]}", [(domain, relative(counts[at])) for domain, counts in load.items()], FULL,
                       column="expert") for at in shown]
    note = ("Tokens of held-out prompts and the final policy's answers, per layer: the load of an expert over the "
            f"mean. Clear is none, solid is {FULL:g} times the mean and more.")
    note += f" {len(shown)} of {len(layers)} layers are drawn." if len(shown) < len(layers) else ""
    return tag("h3", "Which experts each domain uses") + tag("p", text(note), class_="note") + \
        tag("div", *panels, class_="panels small")


def _training(run: RunView) -> str:
    """The load over the last tenth of every training, one row a router, and the tokens dropped in all of it."""
    panels, choices, dropped, trainings = [], 0, 0, 0
    for name in run.with_file("curve.jsonl"):
        rows = [row for row in run.curve(name) if "expert_load" in row]
        if not rows:
            continue
        trainings += 1
        choices += sum(sum(map(sum, row["expert_load"])) for row in rows)
        dropped += sum(row["dropped_tokens"] for row in rows)
        tail = _summed(rows[-max(1, len(rows) // 10):])
        shown = [at for at in _spread(range(len(tail))) if any(tail[at])]
        panels.append(heat_map(name, [(f"router {at}", relative(tail[at])) for at in shown], FULL, column="expert"))
    if not trainings:
        return ""
    words = (f"Of {number(choices + dropped)} choices of an expert in {trainings} trainings, {number(dropped)} "
             f"{'was' if dropped == 1 else 'were'} dropped (tokens times experts a token, less what was sent).")
    return tag("p", text(words), class_="note") + \
        fold(tag("b", "Load while training") + tag("span", "each router, last tenth of the steps, over its mean",
                                                   class_="dim"),
             tag("div", *panels, class_="panels small"))


def _summed(rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """expert_load added up over rows of a curve: [routers][experts]."""
    return [[sum(row["expert_load"][router][expert] for row in rows) for expert in range(len(counts))]
            for router, counts in enumerate(rows[0]["expert_load"])]


def _spread(items: Sequence[int]) -> list[int]:
    """At most MOST_LAYERS items, first and last among them."""
    if len(items) <= MOST_LAYERS:
        return list(items)
    return [items[round(at * (len(items) - 1) / (MOST_LAYERS - 1))] for at in range(MOST_LAYERS)]
