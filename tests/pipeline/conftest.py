"""The command as a shell would call it, and a run with the tables of the data path."""

import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy_workflow
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline import cli
from pipeline.artifacts import RunDirectory
from pipeline.recipe_file import dump_recipe
from pipeline.records import Check, Problem, Sample, Status, Verdict, write_table
from pipeline.stage import StageResult

LOST = pa.schema([(name, pa.string()) for name in ("id", "domain", "form", "reason", "other")])
EDITED = '{"edited_from": "ffff6666ffff6666", "reviewer": "ann"}'


@pytest.fixture
def posttrain(tmp_path, monkeypatch, capsys):
    """Calls the command as a shell would; the toy workflow stands where `workflows.toy` would be."""
    import workflows

    monkeypatch.setitem(sys.modules, "workflows.toy", toy_workflow)
    monkeypatch.setattr(workflows, "toy", toy_workflow, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(dump_recipe(toy_workflow.recipe()))

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["posttrain", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        seen = capsys.readouterr()
        return SimpleNamespace(code=stopped.value.code or 0, out=seen.out, err=seen.err)

    return call


def commit(directory, name, inputs, write, fingerprint):
    out = directory.work_folder(name, fingerprint) / "out.tmp"
    out.mkdir(parents=True)
    write(out)
    directory.commit(name, fingerprint, {"inputs": inputs, "config": {}, "seed": 0}, StageResult(), {"seconds": 1.0})
    return {name: fingerprint}


def write_parts(folder, samples):
    """A part for each sample."""
    folder.mkdir(parents=True)
    for number, sample in enumerate(samples):
        write_table(folder / f"part-{number:05}.parquet", [sample], Sample)


@pytest.fixture
def traced(tmp_path):
    """A run directory with the tables of the data path: samples packed, rejected, dropped and edited."""
    directory = RunDirectory(tmp_path / "traced")
    directory.claim("toy", dump_recipe(toy_workflow.recipe()))
    messages = ({"role": "user", "content": "What is 2 + 2?"},)
    check = Check("math", reference="4")
    problem = Problem("feedfacefeedface", "math", "add", messages, check, "generated:math", "sft")

    def sample(sample_id, completion, verdict=None, provenance="{}"):
        return Sample(sample_id, problem.id, "math", "original", messages, completion, "digest77", '{"seed": 1}',
                      "stop", 3, verdict, provenance)

    right = Verdict(Status.CORRECT, 1.0, "equal", "math", "1")
    wrong = Verdict(Status.WRONG, 0.0, "different", "math", "1", evidence="5 is not 4")
    good, bad = ("aaaa1111aaaa1111", "2 + 2 = 4"), ("bbbb2222bbbb2222", "2 + 2 = 5")
    same, edited = ("dddd4444dddd4444", "2 + 2 = 4."), ("eeee5555eeee5555", "It is 4.")
    rough = ("ffff6666ffff6666", "It is 4, I guess.\x1b[2J")
    everything = [(good, right), (bad, wrong), (same, right), (rough, right)]

    def samples(*rows, name="samples"):
        """A part for each row."""
        return lambda out: write_parts(out / name, rows)

    def lost(out, name, *rows):
        (out / name).mkdir()
        pq.write_table(pa.Table.from_pylist([{"id": row[0], "domain": "math", "form": "original", "reason": row[1],
                                              "other": row[2]} for row in rows], schema=LOST),
                       out / name / "part-00000.parquet")

    def rejected(out):
        samples(sample(*good, right), sample(*same, right), sample(*edited, right, EDITED))(out)
        lost(out, "rejected", (bad[0], "wrong", None))

    def curated_set(out):
        samples(sample(*edited, right, EDITED), name="dataset/validation")(out)
        samples(sample(*good, right), name="dataset/train")(out)
        lost(out, "dropped", (same[0], "near_duplicate", good[0]))

    def expert(out):
        tokenizer = Tokenizer(models.WordLevel({"2": 0, "+": 1, "=": 2, "4": 3, "?": 4}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        (out / "checkpoint").mkdir()
        tokenizer.save(str(out / "checkpoint" / "tokenizer.json"))

    def pack(out):
        row = {"input_ids": [0, 1, 0, 2, 3], "labels": [-100, -100, -100, 2, 3], "position_ids": [0, 1, 2, 3, 4],
               "sample_ids": [good[0]]}
        other = {**row, "sample_ids": ["judge-1"]}
        (out / "packs").mkdir()
        for number, rows in enumerate([[other, other], [row]]):
            pq.write_table(pa.Table.from_pylist(rows), out / f"packs/part-{number:05}.parquet")

    def problem_table(out):
        write_table(out / "problems.parquet", [problem], Problem)

    problems = commit(directory, "problems", {}, problem_table, "a0" * 32)
    trained = commit(directory, "expert-math-rl", problems, expert, "a1" * 32)
    made = commit(directory, "generate-math", problems | trained,
                  samples(*(sample(*row) for row, _ in everything)), "a2" * 32)
    verified = commit(directory, "verify", made, samples(*(sample(*row, verdict) for row, verdict in everything)),
                      "a3" * 32)
    kept = commit(directory, "reject", verified, rejected, "a4" * 32)
    curated = commit(directory, "curate", kept, curated_set, "a5" * 32)
    packed = commit(directory, "pack", curated, pack, "a6" * 32)
    commit(directory, "sft", packed, lambda out: None, "a7" * 32)
    return directory


