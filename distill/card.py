"""The dataset card of the SFT set: a README.md that Hugging Face and `datasets.load_dataset` read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import yaml

from distill.rejection import Funnel

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
         (10_000_000, "1M<n<10M"))


def dataset_card(dataset: Path, problems: Path, rejection: Funnel, curation: Funnel,
                 licenses: Mapping[str, str | None]) -> str:
    """The card of `dataset` (folders train and validation of Parquet parts).

    problems: the table of all problems; rejection, curation: the funnels of the two stages, the second with quotas;
    licenses: what the recipe says of each domain's source.
    """
    samples = pl.scan_parquet(dataset / "**/*.parquet")
    total = samples.select(pl.len()).collect().item()
    front = {
        "pretty_name": "Supervised fine-tuning set", "task_categories": ["text-generation"],
        "size_categories": [next((name for limit, name in SIZES if total < limit), "10M<n<100M")],
        "license": _license(licenses),
        "configs": [{"config_name": "default", "data_files": [
            {"split": split, "path": f"{split}/*.parquet"} for split in ("train", "validation")
            if any(pq.read_metadata(part).num_rows for part in (dataset / split).glob("*.parquet"))]}]}
    return "\n".join([
        "---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "",
        "# Supervised fine-tuning set", "",
        f"{total:,} samples by expert models, kept by rejection sampling and curation after DeepSeek-V3 (arXiv "
        "2412.19437, section 5.1). A row is one sample: `messages` is the prompt as sent, `completion` what is "
        "learned, `verdict` who checked it. `original` samples answer the problem alone, `reasoning` samples a "
        "system prompt that asks for reflection. Rows stand in the order of their sources: shuffle before training. "
        "`validation` holds problems of its own.", "",
        "## Sources", "", *_sources(problems, licenses), "",
        "## What was kept", "", *_funnel(rejection, curation), "",
        "## Quotas", "", *_quotas(curation), "",
        "## Lengths in tokens", "", *_lengths(samples), "",
        "## Verifiers", "", *_grouped(samples, pl.col("verdict").struct.field("verifier", "version"),
                                      ("verifier", "version")), "",
        "## Generators", "", *_grouped(samples, pl.col("domain", "checkpoint"), ("domain", "checkpoint")), ""])


def _license(licenses: Mapping[str, str | None]) -> str:
    """The one license of all domains, "other" where they differ, "unknown" where the recipe leaves one out."""
    names = set(licenses.values())
    if None in names or not names:
        return "unknown"
    return str(names.pop()) if len(names) == 1 else "other"


def _table(header: tuple[str, ...], rows: list[tuple]) -> list[str]:
    shown = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *shown)]


def _sources(problems: Path, licenses: Mapping[str, str | None]) -> list[str]:
    found = (pl.scan_parquet(problems).select("domain", "source", "split").group_by("domain", "source")
             .agg(pl.len().alias("problems"), (pl.col("split") == "heldout").sum().alias("heldout"))
             .sort("domain", "source").collect())
    return _table(("domain", "source", "license", "problems", "of them held out"),
                  [(domain, source, licenses.get(domain) or "not given", count, heldout)
                   for domain, source, count, heldout in found.iter_rows()])


def _funnel(rejection: Funnel, curation: Funnel) -> list[str]:
    rows = []
    for domain in sorted(curation):
        before = rejection.get(domain, {"in": 0, "out": 0, "lost": {}})
        lost = sorted([*before["lost"].items(), *curation[domain]["lost"].items()], key=lambda item: -item[1])
        rows.append((domain, before["in"], before["out"], curation[domain]["out"],
                     ", ".join(f"{reason} {count:,}" for reason, count in lost) or "nothing"))
    return _table(("domain", "verified", "kept by rejection", "kept by curation", "lost, and why"), rows)


def _quotas(curation: Funnel) -> list[str]:
    return _table(("domain", "wanted", "got", "reasoning form"),
                  [(domain, row["quota"]["wanted"], row["quota"]["got"], row["quota"]["reasoning"])
                   for domain, row in sorted(curation.items())])


def _lengths(samples: pl.LazyFrame) -> list[str]:
    tokens = pl.col("tokens")
    found = samples.group_by("domain", "form").agg(
        pl.len(), tokens.mean().round(1), *(tokens.quantile(q).cast(pl.Int64).alias(str(q)) for q in (.5, .95)),
        tokens.max().alias("longest"), tokens.sum().alias("all")).sort("domain", "form").collect()
    return _table(("domain", "form", "samples", "mean", "median", "95 %", "longest", "all completions"),
                  list(found.iter_rows()))


def _grouped(samples: pl.LazyFrame, columns: pl.Expr, names: tuple[str, ...]) -> list[str]:
    found = samples.select(columns).group_by(names).len().sort(names).collect()
    return _table((*names, "samples"), list(found.iter_rows()))
