"""`posttrain data` on the run of `traced`: four attempts at one problem, one each rejected, dropped and edited."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_report import Page

from pipeline.records import Sample, Status, Verdict, write_table

HOSTILE = ("<think>\n[bold red]thought[/] \x1b]0;title\x07</think>\n\x1b[2J</script><script>alert(1)</script>"
           "<!-- \u202egnp.exe [/nope] &amp;")


def make_samples(changes=lambda number: {}, rows=40):
    """Samples of two domains and forms, two to a problem; every fourth is wrong."""
    made = []
    for number in range(rows):
        wrong = number % 4 == 3
        found = Verdict(Status.WRONG if wrong else Status.CORRECT, float(not wrong), "different" if wrong else "equal",
                        "math", "1")
        fields = {"id": f"{number:016x}", "problem_id": f"{number // 2 + 0xabcdef000:016x}",
                  "domain": ("math", "code")[number % 8 // 4], "form": ("original", "reasoning")[number % 2],
                  "messages": ({"role": "user", "content": f"Question {number // 2}"},),
                  "completion": f"<think>hm</think>\nAnswer {number}", "checkpoint": "c", "sampling": "{}",
                  "finish_reason": "stop", "tokens": 10 * (number + 1), "verdict": found}
        made.append(Sample(**{**fields, **changes(number)}))
    return made


def write_set(folder, samples, per_part=9):
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(samples), per_part)):
        write_table(folder / f"part-{number:05}.parquet", samples[start:start + per_part], Sample)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set", make_samples())


def as_json(posttrain, *words):
    seen = posttrain("data", *words, "--json")
    assert seen.code == 0, seen.err
    return json.loads(seen.out)


def test_a_set_is_summed_by_domain_and_form(posttrain, folder):
    groups = as_json(posttrain, "set")["groups"]
    assert [(row["domain"], row["form"], row["samples"], row["share"]) for row in groups] == [
        (domain, form, 10, 0.25) for domain in ("code", "math") for form in ("original", "reasoning")]
    assert groups[3]["statuses"] == {"correct": 5, "wrong": 5} and groups[3]["mean_score"] == 0.5
    # reasoning samples of math have the numbers 1, 3, 9, 11, ... 35
    assert groups[3]["mean_tokens"] == 10 * (sum([1, 3, 9, 11, 17, 19, 25, 27, 33, 35]) / 10 + 1)
    assert groups[3]["p95_tokens"] == 360
    seen = posttrain("data", "set").out
    assert "set: 40 samples" in seen and "correct 5, wrong 5" in seen and "Question 0" in seen


@pytest.mark.parametrize(("words", "expected"), [
    (["--domain", "code", "--form", "original"], 10), (["--status", "wrong"], 10), (["--reason", "different"], 10),
    (["--contains", "Answer 3"], 11), (["--contains", "Question 19"], 2), (["--contains", "answer 3"], 0),
    (["--min-tokens", "101", "--max-tokens", "200"], 10), (["--status", "wrong", "--contains", "Answer 3"], 4)])
def test_filters_say_what_samples_must_be(posttrain, folder, words, expected):
    assert as_json(posttrain, "set", *words)["samples"] == expected


def test_samples_come_in_the_order_asked_for(posttrain, folder):
    longest = as_json(posttrain, "set", "--sort", "tokens", "--descending", "--limit", "2")["shown"]
    assert [sample["tokens"] for sample in longest] == [400, 390]
    worst = as_json(posttrain, "set", "--sort", "score", "--limit", "1")["shown"]
    assert worst[0]["id"] == f"{3:016x}" and worst[0]["completion"] == "<think>hm</think>\nAnswer 3"
    everywhere = as_json(posttrain, "set", "--limit", "4")["shown"]
    assert [sample["tokens"] for sample in everywhere] == [10, 110, 210, 310]


@pytest.mark.parametrize(("words", "message"), [
    (["--domain", "mth"], "no sample of set has 'mth'; did you mean math?; there are code, math"),
    (["--problem", "abc"], "give 6 digits or more"), (["--problem", "0000000ab"], "the beginning of 20 problem ids"),
    (["--problem", "ffffff"], "has no sample of a problem ffffff"), (["--lost"], "are for the directory of a run"),
    (["--compare", "set", "--html", "x.html"], "--compare goes with"),
    (["--html", "nowhere/x.html"], "give a file in a folder that is there"),
    (["--compare", "empty"], "no Parquet file")])
def test_a_question_that_has_no_answer_is_a_message(posttrain, folder, tmp_path, words, message):
    (tmp_path / "empty").mkdir()
    seen = posttrain("data", "set", *words)
    assert seen.code == 1 and message in seen.err and "Traceback" not in seen.err


def test_a_table_of_something_else_is_a_message(posttrain, tmp_path):
    pq.write_table(pa.table({"id": ["1"], "domain": ["math"]}), tmp_path / "other.parquet")
    assert "not a table of samples; it lacks problem_id, form, messages" in posttrain("data", "other.parquet").err


def test_a_run_shows_its_latest_stage_or_the_one_asked_for(posttrain, traced):
    curated = as_json(posttrain, "traced")
    assert [(sample["id"][:4], sample["split"]) for sample in curated["shown"]] == [
        ("aaaa", "train"), ("eeee", "validation")]
    assert as_json(posttrain, "traced", "--stage", "generate-math")["groups"][0]["statuses"] == {}
    assert as_json(posttrain, "traced", "--stage", "verify")["samples"] == 4
    assert "did you mean verify" in posttrain("data", "traced", "--stage", "verfy").err


def test_lost_samples_are_shown_with_their_text_and_reason(posttrain, traced):
    rejected = as_json(posttrain, "traced", "--stage", "reject", "--lost", "--reason", "wrong")
    assert [(row["completion"], row["lost"], row["verdict"]["reason"]) for row in rejected["shown"]] == [
        ("2 + 2 = 5", "wrong", "different")]
    assert rejected["groups"][0]["lost"] == {"wrong": 1}
    dropped = posttrain("data", "traced", "--lost").out
    assert "near_duplicate, like aaaa1111aaaa1111" in dropped and "2 + 2 = 4." in dropped


def test_all_attempts_at_a_problem_stand_side_by_side(posttrain, traced):
    seen = posttrain("data", "traced", "--problem", "feedface").out
    for text in ("user: What is 2 + 2?", "checked by math: 4", "wrong (different)", "rejected by reject: wrong",
                 "dropped by curate: near_duplicate, like aaaa1111aaaa1111", "in the train split",
                 "edited by ann into sample eeee5555eeee5555"):
        assert text in seen, seen
    found = as_json(posttrain, "traced", "--problem", "feedface", "--status", "wrong")
    assert [sample["fate"] for sample in found["samples"]] == [["rejected by reject: wrong"]]
    assert found["problem"]["check"]["reference"] == "4"


def test_two_sets_are_compared(posttrain, folder, tmp_path):
    def changes(number):
        if number == 4:
            return {"id": "f" * 16, "completion": "<think>another way</think>\nAnswer 4"}  # another chain, same answer
        return {"id": "e" * 16, "completion": "Answer 1,000", "tokens": 70} if number == 6 else {}

    write_set(tmp_path / "other", make_samples(changes, rows=30))
    found = as_json(posttrain, "set", "--compare", "other")
    assert (found["in_both"], found["only"]) == (28, [12, 2])
    assert (found["problems_in_both"], found["problems_only"]) == (15, [5, 0])
    assert found["only_ids"][1] == ["f" * 16, "e" * 16]
    assert found["groups"][1]["samples"] == [10, 7] and found["answers"]["compared"] == 2
    assert found["answers"]["examples"] == [{"problem_id": f"{0xabcdef003:016x}", "form": "original", "ids":
                                             [f"{6:016x}", "e" * 16], "answers": ["Answer 6", "Answer 1,000"]}]
    seen = posttrain("data", "set", "--compare", "other").out
    assert "only in A: 12 samples" in seen and "Answer 1,000" in seen and "without any answer in common: 1" in seen


def test_hostile_text_is_harmless_in_a_terminal(posttrain, tmp_path):
    samples = make_samples(lambda number: {
        "completion": HOSTILE, "domain": "ma\x1b[31mth", "messages": ({"role": "user", "content": HOSTILE},)})
    write_set(tmp_path / "set", samples)
    write_set(tmp_path / "other", make_samples(lambda number: {"id": f"{number + 99:016x}", "domain": "ma\x1b[31mth"}))
    for words in ([], ["--problem", "0000000abcdef003"], ["--compare", "other"]):
        seen = posttrain("data", "set", *words)
        assert seen.code == 0 and "[U+001B][2J" in seen.out, seen.err
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", seen.out)
    raw = posttrain("data", "set", "--json").out
    assert json.loads(raw)["shown"][0]["completion"] == HOSTILE and raw.isascii() and "\x1b" not in raw


@pytest.fixture
def page(posttrain, tmp_path):
    samples = make_samples(lambda number: {"completion": HOSTILE, "messages": ({"role": "user", "content": HOSTILE},),
                                           "domain": '"><script>' if number % 2 else "math"})
    write_set(tmp_path / "<set>", samples)
    assert "25 of 40 samples in slice.html" in posttrain("data", "<set>", "--html", "slice.html", "--rows", "25").out
    return (tmp_path / "slice.html").read_text()


def test_the_page_needs_no_network_and_runs_only_its_own_script(page):
    read = Page(page)
    assert read.tags.count("script") == 2 and "img" not in read.tags and "link" not in read.tags
    assert ("script", "type", "application/json") in read.attributes
    policy = next(value for name, key, value in read.attributes if key == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    for name, key, _ in read.attributes:
        assert key not in ("src", "srcset", "href", "action", "style") and not key.startswith("on"), f"{name} {key}"
    assert not re.search("url\\(|@import|https?:", page)


def test_the_page_holds_the_samples_as_harmless_text(page):
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)
    block = re.search('<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in block
    found = json.loads(block)
    assert len(found) == 25 and len({sample["id"] for sample in found}) == 25
    assert found[0]["thought"] == "[bold red]thought[/] [U+001B]]0;title[U+0007]"
    assert found[0]["answer"].startswith("[U+001B][2J</script><script>alert(1)</script><!-- [U+202E]gnp.exe")
    assert {sample["domain"] for sample in found} == {"math", '"><script>'}


def test_a_page_of_a_run_knows_the_reference_and_the_same_seed_draws_the_same(posttrain, traced, tmp_path):
    pages = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        posttrain("data", "traced", "--stage", "verify", "--html", f"{name}.html", "--rows", "2", "--seed", seed)
        pages.append((tmp_path / f"{name}.html").read_text())
    assert pages[0] == pages[1] != pages[2]
    assert '["reference", "4"]' in pages[0] and '"digest77"' in pages[0]
