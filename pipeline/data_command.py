"""`posttrain data`: look at samples in the terminal, compare sets, write a page of a slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.visible import open_console

Sort = Literal["tokens", "score"]


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command(epilog="[cyan]posttrain data runs/tiny[/]   the curated set: sums, and a few samples\n\n"
                       "[cyan]posttrain data runs/tiny --stage reject --lost --reason wrong --limit 20[/]\n\n"
                       "[cyan]posttrain data runs/tiny --problem 3fa9c1d2[/]   every attempt at it, and its fate\n\n"
                       "[cyan]posttrain data runs/tiny --compare runs/other[/]   two sets next to each other\n\n"
                       "[cyan]posttrain data runs/tiny --html slice.html --rows 300[/]   a page to browse")(data)


def data(directory: Annotated[Path, typer.Argument(
             show_default=False, help="The directory of a run, or a folder of Parquet parts with samples.")],
         stage: Annotated[str | None, typer.Option(
             help="Of a run: generate (or generate-DOMAIN), verify, reject or curate; default the latest.")] = None,
         lost: Annotated[bool, typer.Option("--lost", help="What reject or curate turned away.")] = False,
         domain: Annotated[str | None, typer.Option(help="Samples of this domain.")] = None,
         form: Annotated[str | None, typer.Option(help="original or reasoning.")] = None,
         status: Annotated[str | None, typer.Option(help="Of the verdict: correct, wrong, ...")] = None,
         reason: Annotated[str | None, typer.Option(help="Of the verdict, or of the loss.")] = None,
         contains: Annotated[str | None, typer.Option(help="Text in the prompt or completion, to the letter.")] = None,
         problem: Annotated[str | None, typer.Option(
             help="All samples of a problem side by side; 6 digits of its id are enough.")] = None,
         min_tokens: Annotated[int | None, typer.Option(min=0)] = None,
         max_tokens: Annotated[int | None, typer.Option(min=0)] = None,
         sort: Annotated[Sort | None, typer.Option(help="Order of the samples shown.")] = None,
         descending: Annotated[bool, typer.Option("--descending", help="The largest first.")] = False,
         limit: Annotated[int, typer.Option(min=0, help="Samples shown.")] = 5,
         compare: Annotated[Path | None, typer.Option(help="Another run or folder to compare with.")] = None,
         html: Annotated[Path | None, typer.Option(help="Write a page with a slice of what fits.")] = None,
         rows: Annotated[int, typer.Option(min=1, help="Samples of that page, drawn at random.")] = 200,
         seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
         as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False) -> None:
    """Show, filter and compare samples: of a stage of a run, kept or lost, or of any folder of Parquet parts."""
    from pipeline import browse
    from pipeline.artifacts import RunError
    from pipeline.sample_set import Filters, open_set

    if compare is not None and (problem or html):
        raise RunError("--compare goes with neither --problem nor --html")
    if problem and html:
        raise RunError("--html writes a slice of all that fits; leave --problem out")
    filters = Filters(domain, form, status, reason, contains, min_tokens, max_tokens)
    samples = open_set(directory, "attempts" if problem and not (stage or lost) else stage, lost)
    index = samples.select(filters)
    console = open_console()
    if compare is not None:
        other = open_set(compare, stage, lost)
        compared = browse.compare(samples, index, other, other.select(filters), limit)
        if as_json:
            print(json.dumps(compared, indent=2))
        else:
            browse.print_comparison(compared, console)
        return
    if problem:
        index = samples.of_problem(index, problem)
    if sort:
        index = index.sort(sort, "id", descending=[descending, False], nulls_last=True)
    if problem:
        asked, attempts = browse.attempts(samples, index)
        if as_json:
            print(json.dumps({"problem": asked, "samples": attempts}, indent=2))
        else:
            browse.print_attempts(asked, attempts, console)
        return
    if html:
        from pipeline.browser_page import write_page

        chosen = index.sample(min(rows, len(index)), seed=seed).sort("place")
        write_page(html, samples, index, chosen, seed)
        console.print(f"{len(chosen):,} of {len(index):,} samples in {html}", highlight=False, markup=False,
                      soft_wrap=True)
        return
    # without an order, rows from all over the set
    shown = index.head(limit) if sort or not limit else index.gather_every(max(1, len(index) // limit)).head(limit)
    found = samples.samples(shown)
    if as_json:
        print(json.dumps({"set": samples.title, "samples": len(index), "groups": browse.summary(index),
                          "shown": found}, indent=2))
        return
    browse.print_summary(samples.title, index, console)
    if found:
        console.print()
        browse.print_samples(found, shown["place"].to_list(), console)
