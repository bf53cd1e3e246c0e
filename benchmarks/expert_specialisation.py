"""Balancing by a loss against balancing by bias alone: what becomes of the experts (DeepSeek-V3, appendix C).

    python benchmarks/expert_specialisation.py [--small] [--steps N] [--json FILE] [--svg FILE]

The tiny model of recipes/tiny.yaml is trained twice from the same start on the same packs: with the sequence-wise
balance loss (alpha 0.01, no bias), and by the bias update alone (gamma 0.001, no loss). Then held-out problems with
their worked answers go through both, and each expert's load is compared by domain. The specialisation is the mean
total variation between a domain's distribution over experts and that of all domains together.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from figures import Row, Silent, report

from distill.prompts import prompt_messages, worked_completion
from evaluation.specialisation import expert_load, specialisation
from pipeline.recipe import Recipe
from pipeline.recipe_file import load_recipe
from pipeline.records import Problem, read_table
from pipeline.report_charts import WIDTH, heat_map, text
from pipeline.report_experts import FULL, relative
from pipeline.stage import StageContext
from policy.balance import max_violation
from policy.model import load_policy
from policy.tokenizer import completion_ids, load_tokenizer, prompt_ids
from policy.training import read_curve
from workflows import data, expert

RECIPE = Path(__file__).parents[1] / "recipes/tiny.yaml"
WAYS = {"balance loss": {"balance_alpha": 0.01, "bias_gamma": 0.0},
        "bias alone": {"balance_alpha": 0.0, "bias_gamma": 0.001}}
HELDOUT = 100
STYLE = ("svg{background:#fff}text{font:10px sans-serif;fill:#444}.title{font-weight:bold;fill:#111}"
         ".heat rect{fill:#1f5fa8;stroke:#e9eae8;stroke-width:.3}"
         "@media(prefers-color-scheme:dark){svg{background:#1b1e21}"
         "text{fill:#9ba3ac}.title{fill:#e4e6e8}.heat rect{fill:#7fb2ee;stroke:#292d31}}")


def settings(small: bool, steps: int) -> Recipe:
    """The tiny recipe with a corpus for so many steps and no drills."""
    splits = f"{{corpus: {40 if small else 8 * steps}, heldout: {20 if small else HELDOUT}}}"
    changes = [f"domains.{name}.splits={splits}" for name in ("math", "code", "logic", "writing")]
    changes += ["model.source.hidden_size=32"] if small else []
    return load_recipe(RECIPE, [*changes, f"base.max_steps={steps}", "model.source.drill_steps=0"])


def trained(recipe: Recipe, problems: Path, folder: Path, changes: dict[str, float]) -> Path:
    """The folder of a base trained by the recipe's own stage, with other balancing."""
    out, work = folder / "out", folder / "work"
    out.mkdir(parents=True), work.mkdir()
    config = {"model": recipe.model, "base": recipe.base.model_copy(update=changes), "needle_share": 0.0}
    expert.base(StageContext("base", config, {"problems": problems}, out, work, recipe.seed, Silent()))
    return out


def heldout_texts(recipe: Recipe, problems: Path, checkpoint: Path) -> dict[str, list[list[int]]]:
    """Held-out problems with worked answers in both forms, as token ids per domain."""
    tokenizer, texts = load_tokenizer(checkpoint), {name: [] for name in recipe.domains}
    for problem in read_table(problems / "problems.parquet", Problem):
        for form in ("original", "reasoning") if problem.split == "heldout" else ():
            completion = worked_completion(problem, form)
            if completion is not None:
                messages = prompt_messages(problem, form, recipe.model.reflective_prompt)
                texts[problem.domain].append(prompt_ids(tokenizer, messages) + completion_ids(tokenizer, completion))
    return texts


def figures(name: str, out: Path, found: dict[str, Any]) -> list[Row]:
    curve, load = read_curve(out / "curve.jsonl"), found["load"]
    tail = curve[-max(1, len(curve) // 10):]
    highest = [max(relative(counts)) for domain in load.values() for counts in domain]
    pooled = torch.tensor(list(load.values())).sum(0)
    return [(f"{name}: loss, last tenth", sum(row["loss"] for row in tail) / len(tail), "nats a token"),
            (f"{name}: MaxVio of a training batch, last tenth", sum(row["max_violation"] for row in tail) / len(tail),
             ""),
            (f"{name}: MaxVio on held-out text of all domains", max_violation(pooled), ""),
            (f"{name}: dropped tokens", float(sum(row["dropped_tokens"] for row in curve)), "tokens"),
            (f"{name}: busiest expert of a domain, mean", sum(highest) / len(highest), "x mean load"),
            (f"{name}: specialisation", specialisation(load), "of 1")]


def picture(found: dict[str, dict[str, Any]]) -> str:
    """One SVG: a row a layer, a column a way of balancing, domains by experts in each."""
    drawn, top = [], 0.0
    for at, layer in enumerate(next(iter(found.values()))["layers"]):
        for column, (name, loads) in enumerate(found.items()):
            panel = heat_map("", [(domain, relative(counts[at])) for domain, counts in loads["load"].items()], FULL,
                             column="expert")
            svg = re.search("<svg.*</svg>", panel, re.DOTALL)[0]
            height = float(re.search(r'viewBox="0 0 \S+ ([\d.]+)"', svg)[1])
            drawn.append(f'<text class="title" x="{WIDTH * column + 8}" y="{top + 14:g}">layer {layer}, {text(name)}'
                         f'</text>{svg.replace("<svg", _placed(WIDTH * column, top + 16, height), 1)}')
        top += height + 20
    width = WIDTH * len(found)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="{2 * top:g}" '
            f'viewBox="0 0 {width} {top:g}"><style>{STYLE}</style>{"".join(drawn)}</svg>\n')


def _placed(x: float, y: float, height: float) -> str:
    return f'<svg x="{x:g}" y="{y:g}" width="{WIDTH}" height="{height:g}"'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="three steps each: everything runs, nothing is learned")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 2,048 tokens each")
    parser.add_argument("--json", type=Path, help="write the figures and all loads there")
    parser.add_argument("--svg", type=Path, help="draw the loads there")
    options = parser.parse_args(arguments)
    recipe = settings(options.small, 3 if options.small else options.steps)
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        problems = Path(folder) / "problems"
        problems.mkdir()
        data.problems(StageContext("problems", {"domains": recipe.domains}, {}, problems, problems, recipe.seed,
                                   Silent()))
        for name, changes in WAYS.items():
            out = trained(recipe, problems, Path(folder) / name, changes)
            texts = heldout_texts(recipe, problems, out / "checkpoint")
            found[name] = expert_load(load_policy(out / "checkpoint"), texts)
            rows += figures(name, out, found[name])
    report(rows, None)
    if options.json:
        options.json.write_text(json.dumps({
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine(),
            "torch": torch.__version__, "steps": recipe.base.max_steps, "ways": WAYS, "loads": found,
            "figures": [{"what": name, "figure": figure, "unit": unit} for name, figure, unit in rows]}, indent=2))
    if options.svg:
        options.svg.write_text(picture(found))


if __name__ == "__main__":
    main()
