"""Pre-training documents for a tiny base model: a little chat, a little worked reasoning, a little judging.

DeepSeek-V3's base has read such text on the web; a model trained from nothing has not. The mix shows each
skill without finishing the work of the later stages: few worked chains, and notes of any quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

from distill.problems import writing
from distill.problems.drawing import NAMES
from distill.prompts import prompt_messages, worked_completion
from pipeline.records import Message, Problem
from rewards.judge import pairwise_messages, pointwise_messages

Document = dict[str, object]  # {"messages": [...]} or {"text": ...}

# Shares of the documents made from one problem, by how it is checked.
MIX = {
    "rule": {"text": 0.30, "chat_answer": 0.40, "chat_reasoning": 0.30},
    "principles": {"text": 0.10, "chat_answer": 0.20, "chat_reasoning": 0.15, "pointwise": 0.25, "pairwise": 0.30},
}
DRILLS_PER_PROBLEM = 0.15
COPY_SHARE = 0.3  # of the drills
FACTS_PER_DRILL = 8
COPIED = (*NAMES, *writing.NOUNS, "+", "-", "*", "x", "true", "false", "(", ")")
DRAFT_QUALITIES = (0.0, 0.34, 0.67, 1.0)


def corpus_documents(problems: Iterable[Problem], seed: int) -> list[Document]:
    """Shuffled documents: one for each problem of split "corpus" in the kind MIX draws, and the drills.

    A problem without a worked chain or answer is written in a kind that does without; one that has neither is
    left out. Judge demonstrations need principles that `problems.writing` can measure.
    """
    problems = [problem for problem in problems if problem.split == "corpus"]
    documents = []
    for problem in problems:
        rng = Random(f"{seed}:{problem.id}")
        shares = MIX["principles" if problem.check.kind == "principles" else "rule"]
        for kind in (rng.choices(list(shares), list(shares.values()))[0], "chat_answer"):
            document = KINDS[kind](problem, rng)
            if document is not None:
                documents.append(document)
                break
    rng = Random(f"{seed}:drills")
    documents += [copy_drill(rng) if rng.random() < COPY_SHARE else {"text": drill(rng)}
                  for _ in range(round(len(problems) * DRILLS_PER_PROBLEM))]
    rng.shuffle(documents)
    return documents


def _chat(messages: Iterable[Message], completion: str) -> Document:
    return {"messages": [*messages, {"role": "assistant", "content": completion}]}


def _answer(problem: Problem, rng: Random) -> str | None:
    """The answer to show: for measurable notes a draft of any quality, so that there is something left to learn."""
    if measurable(problem):
        return writing.draft(problem, rng, rng.choice(DRAFT_QUALITIES))
    return problem.answer


def measurable(problem: Problem) -> bool:
    """Whether a program can say which principles a text meets."""
    return problem.check.kind == "principles" and problem.source.startswith("generated:")


def _text(problem: Problem, rng: Random) -> Document | None:
    """Plain text: the question, the worked chain, the answer."""
    if problem.solution is None or problem.answer is None:
        return None
    question = "\n".join(message["content"] for message in problem.messages)
    return {"text": f"Question: {question}\n{problem.solution}\nAnswer: {_answer(problem, rng)}"}


def _chat_answer(problem: Problem, rng: Random) -> Document | None:
    answer = _answer(problem, rng)
    return None if answer is None else _chat(prompt_messages(problem, "original"), answer)


def _chat_reasoning(problem: Problem, rng: Random) -> Document | None:
    completion = worked_completion(problem, "reasoning")
    return None if completion is None else _chat(prompt_messages(problem, "reasoning"), completion)


def _pointwise(problem: Problem, rng: Random) -> Document | None:
    if not measurable(problem):
        return None
    text = writing.draft(problem, rng, rng.choice(DRAFT_QUALITIES))
    return _chat(pointwise_messages(problem, text), pointwise_judgement(problem, text))


def _pairwise(problem: Problem, rng: Random) -> Document | None:
    if not measurable(problem):
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
    row = " ".join(str(rng.randint(0, 199)) if rng.random() < 0.6 else rng.choice(COPIED)
                   for _ in range(rng.randint(6, 16)))
    return _chat([{"role": "user", "content": f"Repeat: {row}"}], row)


def elementary_drill(rng: Random) -> Document:
    """What the first steps of a model trained from nothing go to: copying from the prompt, and facts."""
    return copy_drill(rng) if rng.random() < 0.5 else fact_drill(rng)


def fact_drill(rng: Random) -> Document:
    """A row of small sums and truth facts to work out, in the notation of the worked chains."""
    facts = [_fact(rng) for _ in range(FACTS_PER_DRILL)]
    return _chat([{"role": "user", "content": "Work out: " + ", ".join(fact.split(" = ")[0] for fact in facts)}],
                 "\n".join(facts))


def drill(rng: Random) -> str:
    """Arithmetic and truth facts in the notation of the worked chains, one a line."""
    return "\n".join(_fact(rng) for _ in range(FACTS_PER_DRILL))


def _fact(rng: Random) -> str:
    kind = rng.choice(("add", "add", "subtract", "subtract", "truth"))
    if kind == "add":
        a, b = rng.randint(1, 39), rng.randint(1, 9)
        return f"{a} + {b} = {a + b}"
    if kind == "subtract":
        a = rng.randint(9, 48)
        b = rng.randint(1, 9)
        return f"{a} - {b} = {a - b}"
    a, b, word = rng.random() < 0.5, rng.random() < 0.5, rng.choice(("and", "or"))
    result = (a and b) if word == "and" else (a or b)
    return f"{a} {word} {b} = {result}".lower()


KINDS: dict[str, Callable[[Problem, Random], Document | None]] = {
    "text": _text, "chat_answer": _chat_answer, "chat_reasoning": _chat_reasoning,
    "pointwise": _pointwise, "pairwise": _pairwise}
