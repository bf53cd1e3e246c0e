"""Where a sample came from and what became of it, read from the manifests and tables of a run.

Only columns of ids are read whole, and of the rest the rows that were found: seconds for millions of samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.markup import escape
from rich.tree import Tree

from pipeline.artifacts import RunDirectory, RunError
from pipeline.tables import Table, files, find
from pipeline.visible import one_line

SHORTEST_PREFIX = 6
WIDE = 160  # characters of a text that the tree shows
_SAMPLE = ("id", "problem_id", "domain", "form", "tokens", "finish_reason", "checkpoint", "sampling", "provenance")
# what a stage does to the samples it turns away, and its tables of those and of the others
_STAGES = {"reject": ("rejected", "rejected", "samples"), "curate": ("dropped", "dropped", "dataset")}


class Artifacts:
    """All committed manifests, newest first, and the steps from one to its makers and users."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        found = [json.loads(path.read_text()) for path in (directory.root / "stages").glob("*/*/manifest.json")]
        self.manifests = sorted(found, key=lambda manifest: manifest["timings"]["finished"], reverse=True)

    def folder(self, manifest: dict[str, Any]) -> Path:
        return self.directory.stage_folder(manifest["stage"], manifest["fingerprint"])

    def user(self, stage: str, source: dict[str, Any] | None) -> dict[str, Any] | None:
        """The newest artifact of `stage` that was made from `source`."""
        if source is None:
            return None
        return next((manifest for manifest in self.manifests if manifest["stage"] == stage
                     and manifest["inputs"].get(source["stage"]) == source["fingerprint"]), None)

    def ancestor(self, stage: str, manifest: dict[str, Any]) -> dict[str, Any] | None:
        """The artifact of `stage` somewhere among the inputs of `manifest`."""
        for name, fingerprint in manifest["inputs"].items():
            parent = self.directory.manifest(name, fingerprint)
            if parent is not None:
                found = parent if name == stage else self.ancestor(stage, parent)
                if found is not None:
                    return found
        return None


@dataclass
class Fate:
    """What became of a sample after its verdict. id: its last one, which an edit changes."""

    id: str
    steps: list[str]
    kept: bool = True  # by every stage so far


def lineage(directory: RunDirectory, sample_id: str) -> Tree:
    """Problem, expert, verdict and fate of a sample as a tree; `sample_id` may be a prefix of 6 digits or more.

    A sample that a reviewer edited is found by its old and by its new id. Raises RunError when no sample of the run
    has that id.
    """
    artifacts = Artifacts(directory)
    generate, sample, edited = _find_sample(artifacts, sample_id)
    shown = edited or sample
    tree = Tree(f"[bold]sample {shown['id']}[/]  {_said(shown['domain'])}, {_said(shown['form'])} form, "
                f"{shown['tokens']} tokens, ended by {_said(shown['finish_reason'])}")
    if edited:
        tree.add(f"edited from sample {sample['id']}")
    _add_origin(tree, artifacts, generate, sample)
    verify = artifacts.user("verify", generate)
    if verify is None:
        tree.add("not verified yet")
        return tree
    _add_verdict(tree, artifacts.folder(verify) / "samples", sample["id"])
    fate = follow(artifacts, verify, [sample["id"]])[sample["id"]]
    for step in fate.steps:
        tree.add(escape(step))
    curate = artifacts.user("curate", artifacts.user("reject", verify))
    if fate.kept and curate is not None:
        _add_training(tree, artifacts, curate, fate.id)
    return tree


def follow(artifacts: Artifacts, verify: dict[str, Any], ids: Sequence[str]) -> dict[str, Fate]:
    """What became of samples of a verify artifact in the stages after it."""
    fates = {sample_id: Fate(sample_id, []) for sample_id in ids}
    source = verify
    for stage, (verb, lost, kept) in _STAGES.items():
        going = {fate.id: fate for fate in fates.values() if fate.kept}
        manifest = artifacts.user(stage, source)
        if manifest is None:
            for fate in going.values():
                fate.steps.append(f"{stage} has not run on it")
            break
        folder, mark = artifacts.folder(manifest), manifest["fingerprint"][:12]
        columns = ["id", "reason", *(["other"] if stage == "curate" else [])]
        for row in find(folder / lost, pl.col("id").is_in(list(going)), columns):
            fate = going.pop(row["id"])
            fate.kept = False
            fate.steps.append(f"{verb} by {stage}: {row['reason']}" +
                              (f", like {row['other']}" if row.get("other") else ""))
        table = Table(folder / kept)
        for place, sample_id in _places(folder / kept, pl.col("id").is_in(list(going)), "id"):
            split = table.part_of(place)[0].parent.name
            going.pop(sample_id).steps.append(
                f"kept by {stage} ({mark})" + (f", in the {split} split" if stage == "curate" else ""))
        for row in _edits(folder / kept, list(going)) if stage == "reject" and going else ():
            edit = json.loads(row["provenance"])
            fate = going.pop(edit["edited_from"])
            fate.id = row["id"]
            fate.steps.append(f"edited by {edit.get('reviewer') or 'a reviewer'} into sample {fate.id}, "
                              f"kept by {stage} ({mark})")
        for fate in going.values():
            fate.kept = False
            fate.steps.append(f"not among what {stage} wrote")
        source = manifest
    return fates


def _places(path: Path, wanted: pl.Expr, column: str) -> list[tuple[int, Any]]:
    """(place in the table, value of the column) of rows."""
    if not (found := files(path)):
        return []
    return list(pl.scan_parquet(found, row_index_name="place", glob=False).filter(wanted).select("place", column)
                .collect(engine="streaming").iter_rows())


def _edits(path: Path, ids: Sequence[str]) -> list[dict[str, Any]]:
    """Samples that reviewers made of others: id and provenance."""
    return find(path, pl.col("provenance").str.contains("edited_from", literal=True)
                & pl.col("provenance").str.contains_any(list(ids)), ["id", "provenance"])


def _find_sample(artifacts: Artifacts, sample_id: str
                 ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """The stage that generated a sample, the sample as generated, and as edited where that is the one asked for."""
    if len(sample_id) < SHORTEST_PREFIX:
        raise RunError(f"sample id {sample_id!r} is too short; give {SHORTEST_PREFIX} digits or more")
    for manifest in artifacts.manifests:
        if manifest["stage"].startswith("generate-"):
            row = _find_row(artifacts.folder(manifest) / "samples", sample_id, _SAMPLE)
            if row is not None:
                return manifest, row, None
        elif manifest["stage"] == "reject":
            row = _find_row(artifacts.folder(manifest) / "samples", sample_id, _SAMPLE)
            if row is not None and "edited_from" in (provenance := json.loads(row["provenance"])):
                return *_find_sample(artifacts, provenance["edited_from"])[:2], row
    raise RunError(f"no generated sample of this run has the id {sample_id}; ids are shown by: "
                   f"posttrain data {artifacts.directory.root}")


def _find_row(path: Path, record_id: str, columns: Sequence[str]) -> dict[str, Any] | None:
    rows = find(path, pl.col("id").str.starts_with(record_id), columns)
    if len({row["id"] for row in rows}) > 1:
        raise RunError(f"{record_id} is the beginning of {len(rows)} ids; give more digits")
    return rows[0] if rows else None


def _add_origin(tree: Tree, artifacts: Artifacts, generate: dict[str, Any], sample: dict[str, Any]) -> None:
    problems = artifacts.ancestor("problems", generate)
    problem = problems and _find_row(artifacts.folder(problems) / "problems.parquet", sample["problem_id"],
                                     ["id", "source", "split", "messages", "check"])
    branch = tree.add(f"problem {sample['problem_id']}")
    if problem:
        branch.add(f"from {_said(problem['source'])}, {problem['split']} split")
        branch.add(_said(problem["messages"][-1]["content"]))
        reference = problem["check"]["reference"]
        known = f", reference {_said(reference)}" if reference else ""
        branch.add(f"checked by {problem['check']['kind']}{known}")
    made = tree.add(f"generated by {generate['stage']} ({generate['fingerprint'][:12]})")
    if sample["checkpoint"].startswith("teacher:"):
        made.add(f"answered by {escape(sample['checkpoint'])}")
    for name, fingerprint in generate["inputs"].items():
        if (artifacts.directory.stage_folder(name, fingerprint) / "checkpoint").is_dir():
            made.add(f"weights of {name} ({fingerprint[:12]}), checkpoint digest {sample['checkpoint']}")
    made.add(f"sampling {_said(sample['sampling'])}")


def _add_verdict(tree: Tree, verified: Path, sample_id: str) -> None:
    found = find(verified, pl.col("id") == sample_id, ["verdict"])
    verdict = found[0]["verdict"] if found else None
    if verdict:
        branch = tree.add(f"verdict {verdict['status']} ({_said(verdict['reason'])}), score {verdict['score']}, by "
                          f"{_said(verdict['verifier'])} {_said(verdict['version'])}")
        if verdict["evidence"]:
            branch.add(_said(verdict["evidence"]))


def _add_training(tree: Tree, artifacts: Artifacts, curate: dict[str, Any], sample_id: str) -> None:
    pack = artifacts.user("pack", curate)
    if pack is None:
        tree.add("not packed yet")
        return
    path = artifacts.folder(pack) / "packs"
    places = [place for place, _ in _places(path, pl.col("sample_ids").list.contains(sample_id), "sample_ids")]
    mark = pack["fingerprint"][:12]
    if not places:
        tree.add(f"not in pack ({mark})")
        return
    table = Table(path)
    parts = [f"row {row} of {part.name}" for part, row in map(table.part_of, places)]
    branch = tree.add(f"in row {', '.join(map(str, places))} of pack ({mark}): {', '.join(parts)}")
    sft = artifacts.user("sft", pack)
    if sft is not None:
        branch.add(f"trained on by sft ({sft['fingerprint'][:12]})")


def _said(text: Any) -> str:
    """Text of models and of files, harmless and short."""
    return escape(one_line(text, WIDE))
