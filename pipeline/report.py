"""`DIR/report.html`: what a run did, in one file that needs no network and no other file.

The page holds text that models wrote. All of it is escaped, and a content security policy lets nothing run but the
page's own script, so that even a mistake in escaping could not make a completion act.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pipeline.artifacts import write_atomically
from pipeline.graph import DONE, RUNNING
from pipeline.progress import duration, read_progress
from pipeline.report_charts import absent, fold, length_bar, number, percent, table, tag, text
from pipeline.report_data import RunView, StageView, flat_counts, seconds
from pipeline.report_experts import experts_section
from pipeline.report_rollouts import rollouts_section
from pipeline.report_sections import ALL, curves_section, evaluation_section, funnel_section, results, trust_section
from pipeline.stage import Stage

HERE = Path(__file__).parent


def write_report(run_dir: Path, stages: Sequence[Stage]) -> Path:
    """Write the report of a run, finished or not, and return its path.

    Reads files alone, so it may be called while the run goes on. Raises FileNotFoundError where there is no
    recipe.yaml, GraphError for stages that make no graph.
    """
    run = RunView(run_dir, stages)
    path = run_dir / "report.html"
    write_atomically(path, _page(run))
    return path


def _page(run: RunView) -> str:
    sections = [("evaluation", "Evaluation", evaluation_section(run)),
                ("funnel", "From problems to SFT samples", funnel_section(run)),
                ("curves", "Training curves", curves_section(run)),
                ("experts", "Experts", experts_section(run)),
                ("trust", "Why believe it", trust_section(run)),
                ("rollouts", "Rollouts", rollouts_section(run)),
                ("stages", "Stages", _stages_section(run))]
    style, script = (HERE / "report.css").read_text(), (HERE / "report.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
              "form-action 'none'")
    title = f"{run.recipe.get('name', run.directory.root.name)}: run report"
    navigation = tag("nav", *(tag("a", text(name), href=f"#{anchor}") for anchor, name, _ in sections),
                     aria_label="Sections")
    body = "".join(tag("section", tag("h2", text(name)), content or absent("Nothing here:", "no stage makes it."),
                       id=anchor) for anchor, name, content in sections)
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{text(title)}</title><style>{style}</style></head>\n<body>"
            f"{_header(run)}{navigation}<main>{body}</main><script>{script}</script></body></html>\n")


def _header(run: RunView) -> str:
    spent = [value for view in run.stages if (value := seconds(view)) is not None]
    peaks = [view.manifest["timings"].get("peak_memory_gib", 0) for view in run.stages if view.manifest]
    finished = max((view.manifest["timings"]["finished"] for view in run.stages if view.manifest), default=None)
    done = sum(view.planned.state == DONE for view in run.stages)
    facts = [("begun", _when(run.created)), ("last stage done", _when(finished)),
             ("time in stages", duration(sum(spent)) if spent else "none yet"),
             ("stages done", f"{done} of {len(run.stages)}")]
    facts += [("peak memory", f"{max(peaks):.1f} GiB")] if peaks else []
    return tag("header", tag("p", "posttrain run report", class_="kicker"),
               tag("h1", text(run.recipe.get("name", run.directory.root.name))),
               tag("p", text(headline(run)), class_="headline"),
               tag("dl", *(tag("div", tag("dt", text(name)), tag("dd", text(value))) for name, value in facts),
                   class_="facts"))


def headline(run: RunView) -> str:
    """The result in a sentence or two, or how far the run is."""
    found = {kind: row for kind, _, row in results(run, ALL) if row["accuracy"] is not None}
    if "base" not in found or len(found) < 2:
        busy = next((view for view in run.stages if view.planned.state == RUNNING), None)
        done = sum(view.planned.state == DONE for view in run.stages)
        return f"Not evaluated yet: {done} of {len(run.stages)} stages are done" + \
            (f"; {busy.name} is running." if busy else ".")
    ways = [f"{percent(row['accuracy'])} [{100 * row['ci95'][0]:.1f}–{100 * row['ci95'][1]:.1f}] "
            f"{ {'base': 'for the base model', 'sft': 'after SFT', 'rl': 'after RL'}[kind]}"
            for kind, row in found.items()]
    sentence = (f"On {found['base']['n']:,} held-out problems a rule can check, accuracy is {', '.join(ways)} "
                "(95% intervals).")
    before, after = found.get("sft"), found.get("rl")
    if before and after and before["ci95"][0] <= after["ci95"][1] and after["ci95"][0] <= before["ci95"][1]:
        sentence += " The intervals of SFT and RL overlap: this run alone does not tell them apart."
    return sentence


def _when(moment: str | None) -> str:
    return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M UTC") if moment else "unknown"


def _stages_section(run: RunView) -> str:
    longest = max((value for view in run.stages if (value := seconds(view)) is not None), default=0)
    rows = [_stage_row(run, view, longest) for view in run.stages]
    seeds = sorted({view.manifest["seed"] for view in run.stages if view.manifest})
    return table(["stage", "state", "time", "", "peak GiB", "key metric", "fingerprint", "counts"], rows, right=(2, 4),
                 caption="What ran, how long, and what it made") + \
        tag("p", text(f"Seed {', '.join(map(str, seeds)) or run.recipe.get('seed')}. A fingerprint stands for the "
                      "stage's code, its part of the recipe, the seed and the fingerprints of its inputs."),
            class_="note") + \
        _versions(run) + \
        fold("The recipe with every default written out", tag("pre", text(run.recipe_text), tabindex="0"))


def _stage_row(run: RunView, view: StageView, longest: float) -> list[str]:
    manifest, planned = view.manifest or {}, view.planned
    timings, spent = manifest.get("timings", {}), seconds(view)
    key = manifest.get("key_metric")
    value = manifest.get("metrics", {}).get(key) if key else None
    counts = " · ".join(f"{name} {number(count)}" for name, count in flat_counts(manifest.get("counts", {})))
    note = planned.reason
    if planned.state == RUNNING:
        progress = read_progress(run.directory.work_folder(view.name, planned.fingerprint) / "progress.json")
        note = progress.line(progress.moved) if progress is not None else note
    return [tag("b", text(view.name)) + tag("small", text(planned.stage.title), class_="what"),
            tag("span", text(planned.state), class_=f"state {planned.state}") + tag("small", text(note)),
            duration(spent) if spent is not None else "", length_bar(spent, longest) if spent is not None else "",
            number(timings["peak_memory_gib"]) if "peak_memory_gib" in timings else "",
            "" if value is None else text(key) + " " + tag("b", text(number(value))),
            tag("code", text((manifest.get("fingerprint") or "")[:12])), tag("span", text(counts), class_="counts")]


def _versions(run: RunView) -> str:
    """Versions that computed, and the stages when they differ: a resumed run may have changed machines."""
    found: dict[tuple[str, str], list[str]] = {}
    for view in run.stages:
        for name, version in (view.manifest or {}).get("versions", {}).items():
            found.setdefault((name, version), []).append(view.name)
    several = {name for name, _ in found if sum(other == name for other, _ in found) > 1}
    rows = [[text(name), tag("code", text(version)), text(", ".join(users)) if name in several else "every stage"]
            for (name, version), users in found.items()]
    return fold("Versions of what computed", table(["package", "version", "stages"], rows)) if rows else ""
