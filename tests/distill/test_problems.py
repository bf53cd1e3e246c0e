import ast
import json
import operator
import re
import subprocess
from itertools import permutations

import pytest

from distill.problems import GENERATORS
from distill.prompts import prompt_key
from pipeline.records import Problem

CHECKABLE = ("math", "code", "logic")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def boxed(problem: Problem) -> str:
    found = re.findall(r"\\boxed\{([^{}]*)\}", problem.answer)
    assert len(found) == 1
    return found[0]


def prompt(problem: Problem) -> str:
    return problem.messages[0]["content"]


@pytest.mark.parametrize("name", GENERATORS)
def test_the_same_seed_gives_the_same_problems_and_a_smaller_count_their_beginning(name):
    once = list(GENERATORS[name](60, 3))
    assert once == list(GENERATORS[name](60, 3))
    assert once[:20] == list(GENERATORS[name](20, 3))
    assert once != list(GENERATORS[name](60, 4))


@pytest.mark.parametrize("name", GENERATORS)
def test_no_prompt_comes_twice_and_ids_are_content_hashes(name):
    problems = list(GENERATORS[name](1500, 0))
    assert len(problems) == 1500
    assert len({prompt_key(p.messages) for p in problems}) == 1500
    assert all(p.id == Problem.make_id(p.messages, p.check) and p.split == "" for p in problems)


def test_an_exhausted_skill_ends_early_without_repeats():
    problems = list(GENERATORS["writing"](5000, 0, ["note"]))
    assert 1000 < len(problems) <= 8 * 16 * 12  # names, nouns, qualities
    assert len({p.id for p in problems}) == len(problems)


def test_an_unknown_skill_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="juggling.*choose from running"):
        list(GENERATORS["math"](1, 0, ["juggling"]))


@pytest.mark.parametrize("name", CHECKABLE)
def test_every_chain_ends_in_a_check_line_and_stays_short(name):
    for problem in GENERATORS[name](400, 1):
        assert problem.solution.splitlines()[-1].startswith("Check: ")
        assert len(prompt(problem)) <= 170 and len(problem.solution) <= 220 and len(problem.answer) <= 110


def test_math_answers_follow_from_the_prompt():
    def value(problem):
        numbers = [int(n) for n in re.findall(r"\d+", prompt(problem))]
        if problem.skill == "running":
            signs = [1, *(1 if w == "add" else -1 for w in re.findall(r"add|subtract", prompt(problem)))]
            return sum(s * n for s, n in zip(signs, numbers, strict=True))
        if problem.skill == "story":
            return numbers[0] + numbers[1] - numbers[2] - numbers[3]
        if problem.skill == "shopping":
            a, price_a, b, price_b, paid = numbers
            return paid - a * price_a - b * price_b
        if problem.skill == "remainder":
            return (numbers[0] * numbers[1] + numbers[2]) % numbers[3]
        return 1 + (numbers[0] - 1) % 9

    for problem in GENERATORS["math"](1000, 2):
        assert boxed(problem) == problem.check.reference == str(value(problem))
        assert 0 <= int(boxed(problem)) <= 220


def test_every_line_of_a_math_chain_is_true_and_no_total_is_negative():
    for problem in GENERATORS["math"](1000, 5):
        for line in problem.solution.splitlines():
            assert_true_tally(line)
            if found := re.search(r"(-?\d+) ([-+*]) (-?\d+) = (-?\d+)", line):
                a, sign, b, result = found.groups()
                assert OPERATIONS[sign](int(a), int(b)) == int(result) >= 0, problem.solution


def assert_true_tally(line):
    """Every step of `4 + 2 -> 6 - 1 -> 5` is true and no total is negative."""
    total, *steps = re.findall(r"[-+] \d+ -> \d+|\d+", line) or ["0"]
    for sign, amount, _, after in (step.split() for step in steps if "->" in step):
        assert OPERATIONS[sign](int(total), int(amount)) == int(after) >= 0, line
        total = after


def test_logic_answers_follow_from_the_prompt():
    def truth(text):
        tree = ast.parse(text.replace("true", "True").replace("false", "False"), mode="eval")
        return str(eval(compile(tree, "prompt", "eval"))).lower()

    def answer(problem):
        text = prompt(problem)
        if problem.skill == "truth":
            return truth(re.search(r"Evaluate: (.*?)\.", text)[1])
        if problem.skill == "swaps":
            holds = dict(re.findall(r"(\w+) has (\w+)", text))
            for a, b in re.findall(r"(\w+) and (\w+) swap", text):
                holds[a], holds[b] = holds[b], holds[a]
            return holds[re.search(r"What does (\w+) have", text)[1]]
        if problem.skill == "queue":
            assert_true_tally(problem.solution.splitlines()[0])
            moves = re.findall(r"(brings|takes) (\d+)", text)
            return str(int(re.search(r"line: (\d+)", text)[1]) + sum(
                int(n) if kind == "brings" else -int(n) for kind, n in moves))
        taller = re.findall(r"(\w+) is taller than (\w+)", text)
        taller += [(a, b) for b, a in re.findall(r"(\w+) is shorter than (\w+)", text)]
        names = sorted({name for pair in taller for name in pair})
        [order] = [o for o in permutations(names) if all(o.index(a) < o.index(b) for a, b in taller)]
        rank = re.search(r"Who is the (.*)\?", text)[1]
        return order[["tallest", "second tallest", "third tallest", "shortest"].index(rank)]

    answers = []
    for problem in GENERATORS["logic"](900, 2):
        assert boxed(problem) == problem.check.reference == answer(problem)
        answers.append(boxed(problem))
    assert 0.35 < answers.count("true") / (answers.count("true") + answers.count("false")) < 0.65


def code_block(problem: Problem) -> str:
    [(language, code)] = re.findall(r"```(\w+)\n(.*?)\n```", problem.answer, re.DOTALL)
    assert language == problem.check.language
    return code


def test_worked_python_answers_pass_their_hidden_tests():
    for problem in GENERATORS["code"](600, 2, ["python_int", "python_list", "python_branch"]):
        namespace: dict = {}
        exec(code_block(problem), namespace)
        tests = json.loads(problem.check.tests)
        assert len(tests) == 5
        for case in tests:
            assert namespace[problem.check.entry_point](*case["args"]) == case["expected"], problem.answer


def test_hidden_tests_reject_an_answer_that_skips_a_step():
    def passes(code, problem):
        namespace: dict = {}
        exec(code, namespace)
        return all(namespace["f"](*case["args"]) == case["expected"] for case in json.loads(problem.check.tests))

    for problem in GENERATORS["code"](100, 3, ["python_list"]):
        assert not passes(re.sub(r" if x [^\])]*", "", code_block(problem)), problem), problem.answer


def test_worked_c_answers_pass_their_hidden_tests(tmp_path):
    for problem in GENERATORS["code"](3, 2, ["c_int"]):
        cases = json.loads(problem.check.tests)
        checks = " && ".join(f"f({case['args'][0]}) == {case['expected']}" for case in cases)
        source = tmp_path / "answer.c"
        source.write_text(f"{code_block(problem)}\nint main(void) {{ return !({checks}); }}\n")
        subprocess.run(["gcc", "-Wall", "-Werror", "-o", tmp_path / "answer", source], check=True)
        assert subprocess.run([tmp_path / "answer"]).returncode == 0
