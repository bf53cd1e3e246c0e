import dataclasses
import re
from random import Random

from distill.corpus import (
    DRILLS_PER_PROBLEM,
    copy_drill,
    corpus_documents,
    pairwise_judgement,
    pointwise_judgement,
    sum_drill,
)
from distill.problems import GENERATORS, writing
from distill.sources import humaneval_problem
from rewards.judge_prompts import parse_pairwise, parse_pointwise

REFLECTIVE = "Think first."


def corpus(count=200):
    return [dataclasses.replace(p, split="corpus") for generate in GENERATORS.values() for p in generate(count, 0)]


def test_documents_are_seeded_and_come_from_the_corpus_split_alone():
    problems = corpus()
    documents = corpus_documents(problems, 0, REFLECTIVE)
    assert len(documents) == round(len(problems) * (1 + DRILLS_PER_PROBLEM))
    assert documents == corpus_documents(problems, 0, REFLECTIVE)
    assert documents != corpus_documents(problems, 1, REFLECTIVE)
    assert corpus_documents([dataclasses.replace(p, split="heldout") for p in problems], 0, REFLECTIVE) == []


def test_every_kind_of_document_is_there():
    documents = corpus_documents(corpus(), 0, REFLECTIVE)
    texts = [d["text"] for d in documents if "text" in d]
    chats = [d["messages"] for d in documents if "messages" in d]
    assert len(texts) + len(chats) == len(documents)
    assert any(t.startswith("Question: ") and "\nAnswer: " in t for t in texts)
    assert any(re.match(r"\d+ [-+*]", t) for t in texts)
    assert all(m[-1]["role"] == "assistant" and m[-1]["content"] for m in chats)
    starts = [m[-2]["content"] for m in chats]
    assert any(s.startswith("Judge the answer.") for s in starts)
    assert any(s.startswith("Judge two answers.") for s in starts)
    reasoned = [m for m in chats if m[0]["content"] == REFLECTIVE]
    assert reasoned and all(m[-1]["content"].startswith("<think>\n") for m in reasoned)


def test_judge_demonstrations_say_what_the_measure_finds():
    problem = next(writing.generate(1, 0, ["note"]))
    good, bad = problem.answer, "We are happy."
    assert pointwise_judgement(problem, good) == writing.critique(problem, good) + "\nScore: 10"
    first, second, scores = pairwise_judgement(problem, good, bad).splitlines()
    assert first == "A: " + writing.critique(problem, good) and second == "B: " + writing.critique(problem, bad)
    assert scores == f"Scores: 10 {writing.score(problem, bad)}"


def test_the_judge_can_parse_every_demonstration():
    parsed = {"Judge the answer.": 0, "Judge two answers.": 0}
    for document in corpus_documents(corpus(), 0, REFLECTIVE):
        asked, output = (["", ""] + [m["content"] for m in document.get("messages", [])])[-2:]
        parse = {"Judge the answer.": parse_pointwise, "Judge two answers.": parse_pairwise}.get(asked.split("\n")[0])
        if parse is not None:
            assert parse(output) is not None, output
            parsed[asked.split("\n")[0]] += 1
    assert all(parsed.values())


def test_sum_drills_are_true():
    for seed in range(60):
        words = sum_drill(Random(seed))["text"].split()
        total = int(words[0])
        for sign, amount, arrow, after in zip(*(words[i::4] for i in range(1, 5)), strict=True):
            total += int(amount) if sign == "+" else -int(amount)
            assert arrow == "->" and after == str(total)


def test_a_problem_without_a_chain_is_written_as_a_direct_answer():
    row = {"prompt": "def one():\n    \"\"\" 1 \"\"\"\n", "entry_point": "one", "canonical_solution": "    return 1\n",
           "test": "def check(candidate):\n    assert candidate() == 1\n"}
    problem = dataclasses.replace(humaneval_problem("code", row, "s"), split="corpus")
    for seed in range(5):
        [document] = corpus_documents([problem], seed, REFLECTIVE)
        assert document["messages"][-1]["content"] == problem.answer


def test_copy_drills_repeat_their_row():
    rng = Random(0)
    for _ in range(200):
        user, assistant = copy_drill(rng)["messages"]
        assert user["content"] == f"Repeat: {assistant['content']}"
        assert len(assistant["content"].split()) >= 6
