"""The stages of the SFT set on a few samples, as a run would call them."""

import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from tiny_models import Quiet

from pipeline.parts import PART
from pipeline.records import Problem, Sample, read_table, write_table
from pipeline.stage import StageContext
from workflows import sft_set


def write_parts(folder, samples, per_part=1000):
    for number, start in enumerate(range(0, max(1, len(samples)), per_part)):
        write_table(folder / PART.format(number), samples[start:start + per_part], Sample)


def context(config, inputs, folder, seed=0):
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return StageContext(name="stage", config=config, inputs=inputs, out=folder / "out", work=folder / "work", seed=seed,
                        progress=Quiet())


def lost(folder, by_id):
    return [(by_id[row["id"]], row["reason"]) for row in pq.read_table(folder).to_pylist()]


def reject(samples, config, principled=("writing",), per_part=1000):
    """(kept, [(lost, reason)], funnel)"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_parts(folder / "verify/samples", samples, per_part)
        stage = context({"reject": config, "judged": list(principled), "principled": list(principled)},
                        {"verify": folder / "verify"}, folder)
        funnel = sft_set.reject(stage).counts["funnel"]
        return (read_table(stage.out / "samples", Sample),
                lost(stage.out / "rejected", {sample.id: sample for sample in samples}), funnel)


def curate(samples, problems, config, seed, per_part=1000):
    """(kept in both splits, [(lost, reason)], funnel)"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = prepare_curate(folder, samples, problems, config, seed, per_part)
        funnel = sft_set.curate(stage).counts["funnel"]
        kept = [sample for split in ("train", "validation")
                for sample in read_table(stage.out / "dataset" / split, Sample)]
        return kept, lost(stage.out / "dropped", {sample.id: sample for sample in samples}), funnel


def prepare_curate(folder, samples, problems, config, seed=0, per_part=1000):
    write_parts(folder / "reject/samples", samples, per_part)
    (folder / "reject/manifest.json").write_text(json.dumps({"counts": {"funnel": {}}}))
    write_table(folder / "problems/problems.parquet", problems, Problem)
    licenses = {sample.domain: None for sample in samples}
    return context({"curate": config, "licenses": licenses},
                   {"reject": folder / "reject", "problems": folder / "problems"}, folder, seed)
