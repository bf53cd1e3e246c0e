"""What the report shows, read from the files of a run: manifests, curves, tables. Nothing here draws.

A run may be half done, so every reader gives an empty answer for a file that is not there, and tables are read by
column: completions and token ids of a large run do not fit in memory, verdict statuses do.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from pipeline.artifacts import RunDirectory
from pipeline.graph import DONE, PlannedStage, plan
from pipeline.stage import Stage
from pipeline.tables import Table, files

STATUSES = ("correct", "wrong", "malformed", "timeout", "infra_error", "abstain")
UNSCORED = ("infra_error", "abstain")


@dataclass(frozen=True)
class StageView:
    """A stage of the graph with the artifact the report shows of it.

    manifest: of the artifact that fits the recipe, else (state `stale`) of the newest one; None when there is none.
    """

    planned: PlannedStage
    manifest: dict[str, Any] | None
    folder: Path | None

    @property
    def name(self) -> str:
        return self.planned.stage.name


class RunView:
    """A run directory as the report sees it."""

    def __init__(self, run_dir: Path, stages: Sequence[Stage]) -> None:
        self.directory = RunDirectory(run_dir)
        self.recipe_text = (run_dir / "recipe.yaml").read_text()
        self.recipe: dict[str, Any] = yaml.safe_load(self.recipe_text)
        run_file = run_dir / "run.json"
        self.created: str | None = json.loads(run_file.read_text())["created"] if run_file.is_file() else None
        self.stages = [self._view(item) for item in plan(stages, self.recipe.get("seed", 0), self.directory)]
        self.by_name = {view.name: view for view in self.stages}
        domains = self.recipe.get("domains", {})
        self.domains = list(domains)
        self.judged = {name for name, config in domains.items() if config.get("judged") == "principles"}

    def _view(self, item: PlannedStage) -> StageView:
        name = item.stage.name
        manifest = self.directory.manifest(name, item.fingerprint) if item.state == DONE else \
            self.directory.newest_manifest(name)
        folder = self.directory.stage_folder(name, manifest["fingerprint"]) if manifest else None
        return StageView(item, manifest, folder)

    def file(self, stage: str, name: str) -> Path | None:
        """The path of an artifact's file, or of its folder of parts; None when stage or file is not there."""
        view = self.by_name.get(stage)
        path = view.folder / name if view is not None and view.folder is not None else None
        return path if path is not None and path.exists() else None

    def manifest(self, stage: str) -> dict[str, Any]:
        view = self.by_name.get(stage)
        return (view.manifest or {}) if view is not None else {}

    def counts(self, stage: str) -> dict[str, Any]:
        return self.manifest(stage).get("counts", {})

    def metrics(self, stage: str) -> dict[str, Any]:
        return self.manifest(stage).get("metrics", {})

    def setting(self, dotted: str) -> Any:
        """A value of the resolved recipe by its dotted path; None when a level is not there."""
        node: Any = self.recipe
        for key in dotted.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def with_file(self, name: str) -> list[str]:
        """Stages, in order, whose shown artifact has the file."""
        return [view.name for view in self.stages if self.file(view.name, name)]

    def json(self, stage: str, name: str) -> Any:
        path = self.file(stage, name)
        return json.loads(path.read_text()) if path else None

    def lines(self, stage: str, name: str) -> list[dict[str, Any]]:
        path = self.file(stage, name)
        return [json.loads(line) for line in path.read_text().splitlines()] if path else []

    def curve(self, stage: str) -> list[dict[str, Any]]:
        return self.lines(stage, "curve.jsonl")

    def group_states(self, stage: str) -> Counter[str]:
        """What became of the prompts of a GRPO training: trained, zero_variance, ..."""
        return Counter(line["state"] for line in self.lines(stage, "ledger.jsonl"))

    def verdicts(self, stage: str, table: str) -> dict[str, Counter[tuple[str, str]]]:
        """{domain: {(status, reason): rows}} of a table with verdicts; rows without one are left out."""
        path = self.file(stage, table)
        found: dict[str, Counter[tuple[str, str]]] = {}
        for row in _grouped(path, ["domain", "verdict.status", "verdict.reason"]) if path else ():
            if row["verdict.status"] is not None:
                counter = found.setdefault(row["domain"], Counter())
                counter[row["verdict.status"], row["verdict.reason"]] += row["count"]
        return found

    @cached_property
    def evaluation(self) -> dict[str, dict[str, dict[str, Any]]]:
        """{model: {domain: {"n", "accuracy", "ci95", "pass_at_k"}}}, from the stage or the export's copy."""
        found = self.json("evaluate", "evaluation.json") or self.json("export", "evaluation.json")
        return found["models"] if found else {}

    @cached_property
    def funnel(self) -> dict[str, list[FunnelStep]]:
        """Per domain, from what its expert generated to what was packed."""
        verified = self.verdicts("verify", "samples")
        packed = self._packed()
        return {domain: steps for domain in self.domains
                if (steps := self._steps(domain, verified.get(domain), packed))}

    def _steps(self, domain: str, verified: Counter[tuple[str, str]] | None,
               packed: dict[str, tuple[int, int]] | None) -> list[FunnelStep]:
        steps = []
        generated = self.counts(f"generate-{domain}").get("samples")
        if generated is not None:
            steps.append(FunnelStep("generated", generated, {}))
        statuses: Counter[str] = Counter()
        if verified is not None:
            for (status, _), rows in verified.items():
                statuses[status] += rows
            # a judge gives a score, and rejection sampling sets the floor
            passing = ("correct", "wrong") if domain in self.judged else ("correct",)
            steps.append(FunnelStep("judged" if domain in self.judged else "verified correct",
                                    sum(statuses[status] for status in passing),
                                    {status: rows for status, rows in statuses.items() if status not in passing}))
        reject = self.counts("reject").get("funnel", {}).get(domain)
        if reject is not None:
            # what the verdict itself decided is counted one step above
            lost = {reason: rows for reason, rows in reject["lost"].items() if reason not in statuses}
            steps.append(FunnelStep("kept by rejection", reject["out"], lost))
        curate = self.counts("curate").get("funnel", {}).get(domain)
        if curate is not None:
            steps.append(FunnelStep("curated", curate["out"], curate["lost"]))
            if packed is not None:
                rows, held = packed.get(domain, (0, 0))
                steps.append(FunnelStep("packed for SFT", rows,
                                        {"validation": held, "too_long": curate["out"] - held - rows}))
        return steps

    def _packed(self) -> dict[str, tuple[int, int]] | None:
        """Per domain the samples that made it into a pack, and those of the validation split, which are not packed;
        None when that cannot be known yet.
        """
        packs, train = self.file("pack", "packs"), self.file("curate", "dataset/train")
        if not packs or not train:
            return None
        ids = pl.scan_parquet(files(packs)).select(pl.col("sample_ids").explode())
        kept = pl.scan_parquet(files(train)).join(ids, left_on="id", right_on="sample_ids", how="semi")
        packed, held = _by_domain(kept), Counter[str]()
        if validation := self.file("curate", "dataset/validation"):
            held = _by_domain(pl.scan_parquet(files(validation)))
        return {domain: (packed[domain], held[domain]) for domain in packed | held}


def _by_domain(samples: pl.LazyFrame) -> Counter[str]:
    return Counter(dict(samples.group_by("domain").len().collect(engine="streaming").iter_rows()))


@dataclass(frozen=True)
class FunnelStep:
    """`rows` samples after a step, and how many were lost on the way to it, by reason."""

    label: str
    rows: int
    lost: dict[str, int]


def _grouped(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Rows with their count per combination of the columns; a dot reaches into a struct."""
    return Table(path).narrow(columns, columns).group_by(columns, maintain_order=True).len("count").to_dicts()


def series(curve: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) where the metric is there and finite."""
    return [(row["step"], row[key]) for row in curve
            if isinstance(row.get(key), int | float) and math.isfinite(row[key])]


def seconds(view: StageView) -> float | None:
    return view.manifest["timings"].get("seconds") if view.manifest else None


def flat_counts(counts: dict[str, Any], prefix: str = "") -> list[tuple[str, int | float | str]]:
    """Counts with nested names joined by dots; the funnel has a section of its own."""
    flat: list[tuple[str, int | float | str]] = []
    for name, value in counts.items():
        if isinstance(value, dict):
            if name != "funnel":
                flat += flat_counts(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | str):
            flat.append((f"{prefix}{name}", value))
    return flat
