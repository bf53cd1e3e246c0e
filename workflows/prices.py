"""What `posttrain run --dry-run` shows of the generation ahead: prompts, tokens, engine hours, money, what is kept."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from distill.generation_plan import DomainPlan, plan_generation
from pipeline.recipe import Recipe


def prices(recipe: Recipe) -> Group:
    """The table of `distill.generation_plan` with its sum, and the hours where engines work at a time."""
    plans = plan_generation(recipe)
    table = Table("generation, expected", "answered by", "prompts", "samples: first", "expected", "most",
                  "prompt tokens", "tokens written", "by a judge", "engine hours", "USD", "kept", "wanted", box=None,
                  header_style="bold", pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for plan in plans:
        table.add_row(plan.domain, plan.answered_by, *_cells(plan))
    hours = sum(plan.hours or 0 for plan in plans)
    usd = sum(plan.usd or 0 for plan in plans)
    table.add_row("all", "", *(short(sum(getattr(plan, name) for plan in plans)) for name in NUMBERS), short(hours),
                  short(usd), *(short(sum(getattr(plan, name) for plan in plans)) for name in ("kept", "wanted")),
                  style="bold")
    lines = []
    replicas = recipe.engine.replicas
    if hours:
        gpus = f" ({hours * recipe.engine.gpus:,.0f} GPU hours)" if recipe.engine.gpus else ""
        lines.append(f"{hours:,.4g} engine hours{gpus}; with engine.replicas {replicas}: {hours / replicas:,.4g} hours")
    for plan in plans:
        if recipe.curate.quotas and plan.kept < plan.wanted:
            lines.append(f"{plan.domain}: {plan.kept:,.0f} samples are expected for a quota of {plan.wanted:,.0f}; "
                         "raise its problems (and splits.sft), most_samples or samples, or lower its quota")
    return Group(table, *lines)


NUMBERS = ("prompts", "first", "expected", "most", "prompt_tokens", "completion_tokens", "judged_tokens")


def _cells(plan: DomainPlan) -> list[str]:
    return [*(short(getattr(plan, name)) for name in NUMBERS), "" if plan.hours is None else short(plan.hours),
            "" if plan.usd is None else short(plan.usd), short(plan.kept), short(plan.wanted)]


def short(number: float) -> str:
    """`512`, `1.2k`, `45.0M`, `3.60B`: three digits."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
