"""A set of samples to look at: which ones a run made, kept or lost, or any folder of Parquet parts with samples.

Lists, filters and sums work on an index of narrow columns, about 100 bytes a sample; texts are read for the samples
shown, and as a stream where one is searched for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.artifacts import RunDirectory, RunError
from pipeline.graph import did_you_mean
from pipeline.records import SCHEMAS, Problem, Sample
from pipeline.tables import Table, files, find

STAGES = ("curate", "reject", "verify", "generate")
LOST = {"reject": ("rejected", "verify"), "curate": ("dropped", "reject")}  # table of the lost, stage with their text
ATTEMPTS = "attempts"  # verify, or generate where nothing is verified yet: all that was tried
SHORTEST_PREFIX = 6
_INDEX = {"id": "id", "problem_id": "problem_id", "domain": "domain", "form": "form", "tokens": "tokens",
          "verdict.status": "status", "verdict.score": "score", "verdict.reason": "reason"}
_LABELS = ("domain", "form", "verdict.status", "verdict.reason")


@dataclass(frozen=True)
class Filters:
    """What samples must be; None asks for nothing."""

    domain: str | None = None
    form: str | None = None
    status: str | None = None
    reason: str | None = None  # of the verdict, or of the loss
    contains: str | None = None  # in the completion or a message, letter by letter
    min_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class SampleSet:
    """index: a row per sample: place (in `table`), file, id, problem_id, domain, form, tokens, status, score, reason,
    and for lost samples `lost` (why) and `other` (id of what it resembles).
    """

    title: str
    stage: str | None  # of a run
    table: Table
    index: pl.DataFrame
    run: RunDirectory | None = None
    inputs: dict[str, str] = field(default_factory=dict)  # fingerprints of the stages before, by name

    def select(self, filters: Filters) -> pl.DataFrame:
        """The rows of the index that fit; raises RunError, naming what there is, for a value that no sample has."""
        index = self.index
        for name in ("domain", "form", "status", "reason"):
            wanted = getattr(filters, name)
            if wanted is not None:
                columns = [column for column in ([name, "lost"] if name == "reason" else [name])
                           if column in index.columns]
                known = sorted({value for column in columns for value in self.index[column].unique() if value})
                if wanted not in known:
                    raise RunError(f"--{name}: no sample of {self.title} has {wanted!r}"
                                   f"{did_you_mean(wanted, known)}; there are {', '.join(known) or 'none'}")
                index = index.filter(pl.any_horizontal(pl.col(column).cast(pl.String) == wanted for column in columns))
        if filters.min_tokens is not None:
            index = index.filter(pl.col("tokens") >= filters.min_tokens)
        if filters.max_tokens is not None:
            index = index.filter(pl.col("tokens") <= filters.max_tokens)
        return index if filters.contains is None else self._containing(index, filters.contains)

    def _containing(self, index: pl.DataFrame, text: str) -> pl.DataFrame:
        said = pl.element().struct.field("content").str.contains(text, literal=True)
        there = pl.col("completion").str.contains(text, literal=True) | \
            pl.col("messages").list.eval(said).list.any()
        found = [frame.filter(there)["place"] for frame in
                 self.table.read(index["place"].sort().to_list(), ["completion", "messages"])]
        return index.filter(pl.col("place").is_in(pl.concat(found).implode())) if found else index.clear()

    def of_problem(self, index: pl.DataFrame, problem_id: str) -> pl.DataFrame:
        """The samples of a problem; of its id `SHORTEST_PREFIX` digits are enough. Raises RunError for none or several.
        """
        if len(problem_id) < SHORTEST_PREFIX:
            raise RunError(f"problem id {problem_id!r} is too short; give {SHORTEST_PREFIX} digits or more")
        index = index.filter(pl.col("problem_id").str.starts_with(problem_id))
        found = index["problem_id"].unique()
        if len(found) != 1:
            raise RunError(f"{problem_id} is the beginning of {len(found)} problem ids; give more digits" if len(found)
                           else f"{self.title} has no sample of a problem {problem_id}")
        return index

    def samples(self, index: pl.DataFrame) -> list[dict[str, Any]]:
        """Whole samples of rows of the index, in their order; lost ones with `lost` and `other`, parts with `split`."""
        rows = self.table.rows(index["place"].to_list(), SCHEMAS[Sample].names)
        extra = [name for name in ("lost", "other") if name in index.columns]
        for row, more, file in zip(rows, index.select(extra).to_dicts() if extra else [{}] * len(rows), index["file"],
                                   strict=True):
            row |= more
            if (split := self.table.files[file].parent.name) in ("train", "validation"):
                row["split"] = split
        return rows

    def problems(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The problems of a run by id; {} for a folder outside of one."""
        return problems_of(self.run, self.inputs, ids) if self.run is not None else {}


def problems_of(run: RunDirectory, inputs: Mapping[str, str], ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Problems of a run by id, from the artifact among `inputs` (fingerprints by stage), else from the newest."""
    manifest = run.newest_manifest("problems")
    if manifest is None:
        return {}
    path = run.stage_folder("problems", inputs.get("problems", manifest["fingerprint"])) / "problems.parquet"
    found = find(path, pl.col("id").is_in(sorted(set(ids))), SCHEMAS[Problem].names)
    return {row["id"]: row for row in found}


def open_set(path: Path, stage: str | None = None, lost: bool = False) -> SampleSet:
    """The samples of a run (of its latest stage that has any), or of a folder or file of Parquet.

    stage: one of STAGES, `generate-DOMAIN` or ATTEMPTS. lost: what the stages reject or curate turned away. Raises
    RunError where there is no such set.
    """
    if (path / "recipe.yaml").is_file():
        return _of_run(RunDirectory(path), stage, lost)
    if lost or stage not in (None, ATTEMPTS):
        raise RunError(f"{path}: --stage and --lost are for the directory of a run, and this is none (it has no "
                       "recipe.yaml)")
    inner = next((path / name for name in ("dataset", "samples") if (path / name).is_dir()), path)
    return SampleSet(str(path), None, table := _opened(inner), _index(table))


def _of_run(run: RunDirectory, stage: str | None, lost: bool) -> SampleSet:
    known = sorted(path.name for path in (run.root / "stages").glob("*"))
    generated = [name for name in known if name.startswith("generate-")]
    if stage == ATTEMPTS:
        stage = "verify" if "verify" in known else "generate"
    if stage is None:
        if lost:
            stage = "curate" if "curate" in known else "reject"
        else:
            stage = next((name for name in STAGES if name in known or name == "generate" and generated), None)
        if stage is None:
            raise RunError(f"{run.root}: no stage has made samples yet")
    if stage not in STAGES and stage not in generated:
        raise RunError(f"--stage {stage}: must be one of {', '.join([*STAGES, *generated])}"
                       f"{did_you_mean(stage, [*STAGES, *generated])}")
    if lost and stage not in LOST:
        raise RunError(f"--lost: stage {stage} loses no sample; reject and curate do")
    manifests = [run.newest_manifest(name) for name in (generated if stage == "generate" else [stage])]
    found = [manifest for manifest in manifests if manifest is not None]
    if not found:
        raise RunError(f"{run.root}: stage {stage} has committed nothing")
    folders = [run.stage_folder(manifest["stage"], manifest["fingerprint"]) for manifest in found]
    inputs = {name: fingerprint for manifest in found for name, fingerprint in manifest["inputs"].items()}
    title = f"{run.root}, {stage}"
    if not lost:
        table = _opened(*(folder / ("dataset" if stage == "curate" else "samples") for folder in folders))
        return SampleSet(title, stage, table, _index(table), run, inputs)
    name, source = LOST[stage]
    columns = ["id", "reason", *(["other"] if stage == "curate" else [])]
    gone = Table(folders[0] / name).narrow(columns, ["reason"]).drop("file", "place")
    table = _opened(run.stage_folder(source, inputs[source]) / "samples")
    index = _index(table).join(gone.rename({"reason": "lost"}), on="id", maintain_order="left")
    return SampleSet(f"{title}, lost", stage, table, index, run, inputs)


def _opened(*paths: Path) -> Table:
    """Raises RunError where there is no table of samples."""
    for path in paths:
        if not files(path):
            raise RunError(f"{path}: no Parquet file here; give the directory of a run, or a folder of samples")
    table = Table(*paths)
    missing = [name for name in SCHEMAS[Sample].names if name not in table.columns]
    if missing:
        raise RunError(f"{table.files[0]}: not a table of samples; it lacks {', '.join(missing)}")
    return table


def _index(table: Table) -> pl.DataFrame:
    return table.narrow(list(_INDEX), _LABELS).rename(_INDEX)
