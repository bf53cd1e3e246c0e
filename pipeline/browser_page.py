"""A page to browse a slice of samples: one file that needs no network, no server and no other file.

Texts of models lie in it as JSON in which no tag can begin, and reach the page as text, never as markup; a content
security policy lets nothing run but the page's own script.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.artifacts import RunError, write_atomically
from pipeline.browse import summary
from pipeline.report_charts import number, percent, table, tag, text
from pipeline.sample_set import SampleSet
from pipeline.visible import visible

HERE = Path(__file__).parent
MOST_CHARACTERS = 40_000  # of one text; a table holds it whole


def write_page(path: Path, samples: SampleSet, matching: pl.DataFrame, chosen: pl.DataFrame, seed: int) -> None:
    """Write the page with the `chosen` rows of the index, drawn with `seed` from the `matching` ones.

    Raises RunError when the file cannot be written.
    """
    found = samples.samples(chosen)
    problems = samples.problems([sample["problem_id"] for sample in found])
    shown = [_shown(sample, problems.get(sample["problem_id"])) for sample in found]
    style = "".join((HERE / name).read_text() for name in ("report.css", "browser.css"))
    script = (HERE / "browser.js").read_text()
    try:
        write_atomically(path, page(samples.title, _sums(matching), shown, len(matching), seed, style, script))
    except OSError as error:
        raise RunError(f"--html {path}: {error.strerror}; give a file in a folder that is there") from None


def page(title: str, sums: str, shown: list[dict[str, Any]], matching: int, seed: int, style: str, script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
              "form-action 'none'")
    how = f"{len(shown):,} of {matching:,} samples" + (f", drawn with seed {seed}" if len(shown) < matching else "")
    head = tag("header", tag("p", "posttrain samples", class_="kicker"), tag("h1", text(title)),
               tag("p", text(how), class_="lead"),
               tag("details", tag("summary", "All that were drawn from, in numbers"), sums))
    controls = tag("form", *(_choice(name, label, shown) for name, label in
                             (("domain", "domain"), ("form", "form"), ("split", "split"), ("status", "verdict"),
                              ("reason", "reason"), ("lost", "lost because of"))),
                   tag("label", "text ", '<input type="search" name="text" autocomplete="off">'),
                   '<output aria-live="polite"></output>', id="filters")
    body = tag("div", tag("ol", id="list", tabindex="-1", aria_label="Samples"),
               tag("article", id="sample", tabindex="0", aria_label="The sample chosen"), class_="browser")
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{text(title)}: samples</title><style>{style}</style></head>\n<body>{head}<main>{controls}{body}"
            '<noscript>This page needs its script to show the samples.</noscript></main>'
            f'<script type="application/json" id="data">{_json(shown)}</script><script>{script}</script>'
            "</body></html>\n")


def _json(value: Any) -> str:
    """JSON that can stand in a script element: no `<` that could end it or begin a comment."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _choice(name: str, label: str, shown: list[dict[str, Any]]) -> str:
    values = sorted({sample[name] for sample in shown if sample[name]})
    if len(values) < 2:
        return ""
    options = [tag("option", "all", value="")] + [tag("option", text(value), value=value) for value in values]
    return tag("label", f"{text(label)} ", tag("select", *options, name_=name))


def _sums(index: pl.DataFrame) -> str:
    lost = "lost" in index.columns
    rows = [[text(row["domain"]), text(row["form"]), number(row["samples"]), percent(row["share"]),
             _rounded(row["mean_tokens"]), _rounded(row["p95_tokens"]),
             "" if row["mean_score"] is None else f"{row['mean_score']:.2f}",
             text(", ".join(f"{name} {count:,}" for name, count in row["lost" if lost else "statuses"].items()))]
            for row in summary(index)]
    return table(["domain", "form", "samples", "share", "mean tokens", "p95 tokens", "mean score",
                  "lost because of" if lost else "verdicts"], rows, right=range(2, 7))


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _shown(sample: dict[str, Any], problem: dict[str, Any] | None) -> dict[str, Any]:
    """What the page tells of a sample; every string of it is harmless text."""
    verdict = sample["verdict"] or dict.fromkeys(("status", "score", "reason", "verifier", "version", "evidence"))
    thought, closed, rest = sample["completion"].rpartition("</think>")
    check = (problem or {}).get("check") or {}
    told = {"verifier": f"{verdict['verifier']} {verdict['version']}" if verdict["verifier"] else None,
            "evidence": verdict["evidence"], "reference": check.get("reference"),
            "principles": "\n".join(check.get("principles") or ()), "source": (problem or {}).get("source"),
            "resembles": sample.get("other"), "ended by": sample["finish_reason"], "sampling": sample["sampling"],
            "checkpoint": sample["checkpoint"], "provenance": sample["provenance"], "problem": sample["problem_id"],
            "sample": sample["id"]}
    return {**{name: _text(sample.get(name)) for name in ("id", "problem_id", "domain", "form", "split", "lost")},
            "tokens": sample["tokens"], "score": verdict["score"], "status": _text(verdict["status"]),
            "reason": _text(verdict["reason"]),
            "messages": [[_text(message["role"]), _text(message["content"])] for message in sample["messages"]],
            "thought": _text(thought.strip().removeprefix("<think>").strip()) if closed else "",
            "answer": _text(rest.strip()),
            "facts": [[name, _text(value)] for name, value in told.items() if value and value != "{}"]}


def _text(value: Any) -> str:
    if value is None:
        return ""
    found = visible(value)
    left_out = len(found) - MOST_CHARACTERS
    return found if left_out <= 0 else f"{found[:MOST_CHARACTERS]}\n[{left_out:,} more characters]"
