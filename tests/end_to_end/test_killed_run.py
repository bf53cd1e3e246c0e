"""`kill -9` of the driver in SFT, in GRPO and in generation; the same command each time goes on to the same end.

One expert of the smoke recipe is made again from the smoke run's problems and base model, with three kills on the
way. Saving more often and smaller shards change no number, so the smoke run is the unbroken run to compare with.
"""

import json
import re
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from posttrain_command import Done, artifact, json_lines, kill_when, left_behind, posttrain, start, wait_until_gone

from pipeline.artifacts import RunDirectory
from pipeline.recipe_file import load_recipe
from pipeline.records import Rollout, Sample, read_table
from pipeline.workflow_lookup import find_recipe
from policy.model import read_checkpoint

RECIPE = load_recipe(find_recipe("smoke"))
SFT, GRPO, GENERATE = "expert-math-sft", "expert-math-rl", "generate-math"
SHARD = 8
COMMAND = ("run", "smoke", "--run-dir", "run", "--until", GENERATE, "expert.sft.save_steps=2",
           f"generate.shard_prompts={SHARD}")
# counts since the start of the process, and seconds
OF_THE_PROCESS = {"num_tokens", "step_time"}


Answer = tuple[str, str, int]


def answer(sample: Sample) -> Answer:
    return sample.completion, sample.finish_reason, sample.tokens


@dataclass
class Killed:
    """What lay in the run directory after each kill, and what the last command said."""

    folder: Path
    outputs: list[str] = field(default_factory=list)
    states: list[dict[str, str]] = field(default_factory=list)  # {stage: state} after each kill
    started: list[list[psutil.Process]] = field(default_factory=list)  # by each killed driver
    intruder: Done | None = None
    first_pid: int = 0
    sft_step: int = 0
    grpo_rollouts: list[Rollout] = field(default_factory=list)
    grpo_step: int = 0
    answered_before: list[Answer] = field(default_factory=list)
    done: Done | None = None

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def work(self, stage: str) -> Path | None:
        return next((self.run_dir / "work").glob(f"{stage}-*/work"), None)

    def saved_step(self, stage: str) -> int:
        """The step of the newest whole checkpoint; 0 without one."""
        found = self.work(stage).glob("checkpoint-*/complete") if self.work(stage) else ()
        return max((int(path.parent.name.removeprefix("checkpoint-")) for path in found), default=0)

    def answered(self) -> list[Answer]:
        """Text, finish reason and tokens of what is finished: in parts, and in the whole lines of request logs."""
        found: list[Answer] = []
        if folder := self.work(GENERATE):
            done = {path.stem for path in folder.glob("parts/part-*.json")}
            for name in sorted(done):
                found += map(answer, read_table(folder / "samples" / f"{name}.parquet", Sample))
            for path in folder.glob("requests/part-*.jsonl"):
                lines = path.read_text().splitlines(keepends=True) if path.stem not in done else []
                records = [json.loads(line)["record"] for line in lines if line.endswith("\n")]
                found += [(record["text"], record["finish_reason"], record["tokens"]) for record in records
                          if "text" in record]
        return found

    def kill(self, due) -> None:
        output = self.folder / f"output-{len(self.outputs)}"
        driver = start(*COMMAND, folder=self.folder, output=output)
        if not self.outputs:
            self._intrude(driver)
        self.started.append(kill_when(due, driver, output))
        self.outputs.append(output.read_text())
        shown = json.loads(posttrain("status", "run", "--json", folder=self.folder).out)
        self.states.append({record["stage"]: record["state"] for record in shown})

    def _intrude(self, driver) -> None:
        """A second command in the directory of the first, while that one starts Ray."""
        while RunDirectory(self.run_dir).lock_holder() is None:
            assert driver.poll() is None
        self.first_pid, self.intruder = driver.pid, posttrain(*COMMAND, folder=self.folder)


@pytest.fixture(scope="module")
def killed(smoke_run, tmp_path_factory) -> Killed:
    killed = Killed(tmp_path_factory.mktemp("killed"))
    killed.run_dir.mkdir()
    shutil.copy(smoke_run.run_dir / "run.json", killed.run_dir)
    for stage in ("problems", "base"):
        shutil.copytree(smoke_run.run_dir / "stages" / stage, killed.run_dir / "stages" / stage)

    killed.kill(lambda: killed.saved_step(SFT) >= 2)
    killed.sft_step = killed.saved_step(SFT)

    killed.kill(lambda: killed.saved_step(GRPO) >= 1)
    killed.grpo_step = killed.saved_step(GRPO)
    killed.grpo_rollouts = read_table(killed.work(GRPO) / "rollouts" / "000000.parquet", Rollout)

    killed.kill(lambda: len(killed.answered()) >= SHARD)
    killed.answered_before = killed.answered()

    killed.done = posttrain(*COMMAND, folder=killed.folder)
    assert killed.done.code == 0, killed.done.both[-6000:]
    return killed


def curves(killed, smoke_run, stage):
    """The curve of the killed run and of the unbroken one, without what counts from the start of a process."""
    return [[dict(flat(key, value) for key, value in row.items() if key not in OF_THE_PROCESS)
             for row in json_lines(artifact(run.run_dir, stage) / "curve.jsonl")] for run in (killed, smoke_run)]


def flat(key, value):
    """Lists of lists (the load of experts) as text, for the sake of `pytest.approx`; they are counts."""
    return key, json.dumps(value) if isinstance(value, list) else value


def test_a_kill_leaves_the_stage_interrupted(killed):
    assert [states[stage] for states, stage in zip(killed.states, (SFT, GRPO, GENERATE), strict=True)] == \
        ["interrupted"] * 3


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_goes_on(killed):
    assert killed.intruder.code == 1
    assert f"run: process {killed.first_pid} is running there; wait for it, stop it" in killed.intruder.err
    assert "Traceback" not in killed.intruder.both


def test_finished_stages_are_not_run_again(killed):
    started = [re.findall(r"^\[(\S+)\] started", output, re.MULTILINE)
               for output in (*killed.outputs, killed.done.out)]
    assert started == [[SFT], [SFT, GRPO], [GRPO, GENERATE], [GENERATE]]


def test_sft_goes_on_from_its_last_whole_checkpoint_on_the_same_curve(killed, smoke_run):
    mine, unbroken = curves(killed, smoke_run, SFT)
    assert 2 <= killed.sft_step < len(unbroken)
    # TRL counts tokens from the start of the process, which shows where the second one began
    tokens = [row["num_tokens"] for row in json_lines(artifact(killed.run_dir, SFT) / "curve.jsonl")]
    assert [step for step in range(1, len(tokens)) if tokens[step] <= tokens[step - 1]] == [killed.sft_step]
    assert [row["step"] for row in mine] == list(range(1, len(unbroken) + 1))
    for row, expected in zip(mine, unbroken, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)
    assert digest(killed, SFT) == digest(smoke_run, SFT)


def test_grpo_goes_on_from_its_last_whole_checkpoint_on_the_same_curve(killed, smoke_run):
    assert 1 <= killed.grpo_step < RECIPE.expert.rl.steps
    mine, unbroken = curves(killed, smoke_run, GRPO)
    assert [row["step"] for row in mine] == [row["step"] for row in unbroken]
    for row, expected in zip(mine, unbroken, strict=True):
        assert row == pytest.approx(expected, abs=1e-6)
    ledger, expected = (json_lines(artifact(run.run_dir, GRPO) / "ledger.jsonl") for run in (killed, smoke_run))
    assert ledger == expected
    assert max(Counter((line["step"], line["prompt_id"]) for line in ledger).values()) == 1
    assert digest(killed, GRPO) == digest(smoke_run, GRPO)


def test_rollouts_before_the_checkpoint_are_kept_and_those_after_it_are_made_once(killed, smoke_run):
    mine, unbroken = (read_table(artifact(run.run_dir, GRPO) / "rollouts.parquet", Rollout)
                      for run in (killed, smoke_run))
    # a verdict holds the seconds it took: made again, it would differ
    assert [rollout for rollout in mine if rollout.step == 0] == killed.grpo_rollouts
    assert [(r.id, r.completion_ids, r.reward) for r in mine] == [(r.id, r.completion_ids, r.reward) for r in unbroken]


def test_generation_uses_what_was_finished_and_makes_the_rest_once(killed, smoke_run):
    rows = read_table(artifact(killed.run_dir, GENERATE) / "samples", Sample)
    before = Counter(killed.answered_before)
    assert SHARD <= before.total() < len(rows)
    assert f"[{GENERATE}] {before.total()} samples were made before" in killed.done.out
    assert before <= Counter(map(answer, rows))
    assert {row.checkpoint for row in rows} == {digest(smoke_run, GRPO)}


def test_every_problem_has_its_samples_once_and_more_of_them_where_the_first_were_wrong(killed, smoke_run):
    config = RECIPE.generation("math")
    for run in (killed, smoke_run):
        rows = read_table(artifact(run.run_dir, GENERATE) / "samples", Sample)
        orders: dict[tuple[str, str], list[Sample]] = {}
        for row in rows:
            orders.setdefault((row.problem_id, row.form), []).append(row)
        assert len({problem for problem, _ in orders}) == config.problems and len(orders) == 2 * config.problems
        for own in orders.values():
            assert [json.loads(row.sampling)["index"] for row in own] == list(range(len(own)))
            right = [row.verdict.status == "correct" and row.finish_reason == "stop" for row in own]
            assert len(own) == (config.samples if any(right[:config.samples]) else config.cap)
        assert len({len(own) for own in orders.values()}) == 2, "no problem was easy, or none was hard"


def test_a_kill_leaves_no_process(killed):
    # Ray's agents take a minute to end: those of the first kill have had it, the others may still be at it
    first, *later = killed.started
    wait_until_gone([*first, *(process for process in left_behind(killed.folder) if process not in sum(later, []))])


def digest(run, stage):
    return read_checkpoint(artifact(run.run_dir, stage) / "checkpoint").digest
