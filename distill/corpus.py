"""Pre-training documents for a tiny base model: a little chat, a little worked reasoning, a little judging.

DeepSeek-V3's base has read such text on the web; a model trained from nothing has not. The mix shows each
skill without finishing the work of the later stages: few worked chains, and notes of any quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from distill.problems import logic, math, writing
from distill.problems.drawing import NAMES
from distill.prompts import prompt_messages, worked_completion
from pipeline.records import Message, Problem
from rewards.judge_prompts import pairwise_messages, pointwise_messages

Document = dict[str, object]  # {"messages": [...]} or {"text": ...}

# Shares of the documents made from one problem, by how it is checked.
MIX = {
    "rule": {"text": 0.10, "chat_answer": 0.30, "chat_reasoning": 0.60},
    "principles": {"text": 0.05, "chat_answer": 0.20, "chat_reasoning": 0.15, "pointwise": 0.35, "pairwise": 0.25},
}
DRILLS_PER_PROBLEM = 0.5
COPY_SHARE = 0.2  # of the drills
SUMS_PER_DRILL = 12
COPY_LENGTHS = (6, 16)
COPIED = (*NAMES, *writing.NOUNS, *logic.COLORS, *map(str, range(math.LARGEST + 1)))
DRAFT_QUALITIES = (0.0, 0.34, 0.67, 1.0)


def corpus_documents(problems: Iterable[Problem], seed: int, reflective: str) -> list[Document]:
    """Shuffled documents: one for each problem of split "corpus" in the kind MIX draws, and the drills.

    A problem without a worked chain or answer is written in a kind that does without; one that has neither is
    left out. `reflective` is the system prompt of worked chains. Judge demonstrations need principles that
    `problems.writing` can measure.
    """
    problems = [problem for problem in problems if problem.split == "corpus"]
    documents = []
    for problem in problems:
        rng = Random(f"{seed}:{problem.id}")
        shares = MIX["principles" if problem.check.kind == "principles" else "rule"]
        for kind in (rng.choices(list(shares), list(shares.values()))[0], "chat_answer"):
            document = KINDS[kind](problem, rng, reflective)
            if document is not None:
                documents.append(document)
                break
    rng = Random(f"{seed}:drills")
    documents += [copy_drill(rng) if rng.random() < COPY_SHARE else sum_drill(rng)
                  for _ in range(round(len(problems) * DRILLS_PER_PROBLEM))]
    rng.shuffle(documents)
    return documents


def _chat(messages: Iterable[Message], completion: str) -> Document:
    return {"messages": [*messages, {"role": "assistant", "content": completion}]}


def _answer(problem: Problem, rng: Random) -> str | None:
    """The answer to show: where a program can draft one, a poor one, so that there is something left to learn."""
    if writing.measurable(problem):
        return writing.draft(problem, rng, rng.choice(DRAFT_QUALITIES[:2]))
    return problem.answer


def _text(problem: Problem, rng: Random, reflective: str) -> Document | None:
    """Plain text: the question, the worked chain, the answer."""
    if problem.solution is None or problem.answer is None:
        return None
    question = "\n".join(message["content"] for message in problem.messages)
    return {"text": f"Question: {question}\n{problem.solution}\nAnswer: {_answer(problem, rng)}"}


def _chat_answer(problem: Problem, rng: Random, reflective: str) -> Document | None:
    answer = _answer(problem, rng)
    return None if answer is None else _chat(prompt_messages(problem, "original"), answer)


def _chat_reasoning(problem: Problem, rng: Random, reflective: str) -> Document | None:
    completion = worked_completion(problem, "reasoning")
    return None if completion is None else _chat(prompt_messages(problem, "reasoning", reflective), completion)


def _pointwise(problem: Problem, rng: Random, reflective: str) -> Document | None:
    if not writing.measurable(problem):
        return None
    text = writing.draft(problem, rng, rng.choice(DRAFT_QUALITIES))
    return _chat(pointwise_messages(problem, text), pointwise_judgement(problem, text))


def _pairwise(problem: Problem, rng: Random, reflective: str) -> Document | None:
    if not writing.measurable(problem):
        return None
    first, second = (writing.draft(problem, rng, quality) for quality in rng.sample(DRAFT_QUALITIES, 2))
    return _chat(pairwise_messages(problem, first, second), pairwise_judgement(problem, first, second))


def pointwise_judgement(problem: Problem, text: str) -> str:
    """The demonstrated judgement of one text: a clause per principle, then `Score: N` (0 to 10)."""
    return f"{writing.critique(problem, text)}\nScore: {writing.score(problem, text)}"


def pairwise_judgement(problem: Problem, first: str, second: str) -> str:
    """The demonstrated judgement of two texts: a line of clauses for each, then `Scores: N M`."""
    return (f"A: {writing.critique(problem, first)}\nB: {writing.critique(problem, second)}\n"
            f"Scores: {writing.score(problem, first)} {writing.score(problem, second)}")


def copy_drill(rng: Random) -> Document:
    """Repeat a random row of numbers and words."""
    row = " ".join(rng.sample(COPIED, rng.randint(*COPY_LENGTHS)))
    return _chat([{"role": "user", "content": f"Repeat: {row}"}], row)


def sum_drill(rng: Random) -> Document:
    """A running total in the notation of the worked chains, as plain text."""
    return {"text": math.tally(rng, rng.randint(0, math.LARGEST), "?" * SUMS_PER_DRILL)[1]}


KINDS: dict[str, Callable[[Problem, Random, str], Document | None]] = {
    "text": _text, "chat_answer": _chat_answer, "chat_reasoning": _chat_reasoning,
    "pointwise": _pointwise, "pairwise": _pairwise}
