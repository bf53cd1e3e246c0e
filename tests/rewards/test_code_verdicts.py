import json

import pytest

from pipeline.records import Check, Status
from rewards.code import c_program, same_value, verify_code, verify_code_batch
from rewards.sandbox import SandboxFailure

TESTS = json.dumps([{"args": [i], "expected": i + 1} for i in range(4)])
PYTHON = Check("code", language="python", entry_point="f", tests=TESTS)
C = Check("code", language="c", entry_point="f", tests=TESTS)
ASSERTS = Check("code", language="python", entry_point="f", tests=json.dumps([{"assert_code": """
SECRET = 417
def check(candidate):
    for x in range(3):
        assert candidate([x], k=(x, 2)) == {x: [x + SECRET - 416]}, "wrong"
"""}]))


def block(code, language="python"):
    return f"<think>t</think>\n```{language}\n{code}\n```"


@pytest.mark.parametrize(("code", "reason"), [
    ("def f(x): return x + 1", "all_passed"),
    ("def f(x):\n    print('noise')\n    return x + 1", "all_passed"),
    ("def f(x): return x", "wrong_output"),
    ("def f(x): return x +", "compile_error"),
    ("def f(x): return 1 // 0", "runtime_error"),
    ("raise SystemExit(0)", "runtime_error"),
    ("def g(x): return x + 1", "no_function"),
    ("def f(x): return 'x' * 10**10", "memory_limit"),
    ("def f(x):\n    while True: pass", "time_limit"),
    ("def f(x):\n    while True: print('x' * 999)", "output_limit"),
    ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(x): return A(x).x + 1", "all_passed"),
])
def test_python_functions_get_the_reason_they_deserve(sandbox, code, reason):
    assert verify_code(block(code), PYTHON, sandbox).reason == reason


@pytest.mark.parametrize("code", [
    "class S(int):\n    __eq__ = lambda *_: True\n    __repr__ = lambda s: '1'\ndef f(x): return S(7)",
    "class S:\n    __eq__ = lambda *_: True\n    __bool__ = lambda *_: True\ndef f(x): return S()",
    "import builtins, json\nbuiltins.all = lambda *_: True\n"
    "json.dumps = lambda *_: '{\"value\": 1}'\ndef f(x): return 0",
    "import os\nos.write(3, b'{\"value\": 1}\\n' * 4)\ndef f(x): return 0",
    "import os, sys\nn = sys._getframe(2).f_locals['job']['nonce']\n"
    "os.write(3, (n + ' {\"value\": 1}\\n').encode() * 4)\ndef f(x): return 0",
    "import os\nos.write(3, b'all_passed\\n'); print('all_passed'); os._exit(0)",
    "def f(x): return True",
    "def f(x): return float(x + 1)",
    "def f(x): return str(x + 1)",
    "def f(x):\n    r = []\n    for _ in range(490): r = [r]\n    return r",
])
def test_hacks_that_fool_graders_inside_the_process_earn_nothing(sandbox, code):
    assert verify_code(block(code), PYTHON, sandbox).status is Status.WRONG


def test_the_expected_outputs_are_nowhere_in_the_process(sandbox):
    check = Check("code", language="python", entry_point="f", tests=json.dumps([{"args": [1], "expected": 918273}]))
    spy = """
import gc, sys
def f(x):
    found, frame = [], sys._getframe()
    while frame:
        found.append(repr(frame.f_locals)), found.append(repr(frame.f_globals))
        frame = frame.f_back
    found += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, str, tuple))]
    wanted = '273'.join(['918', ''])
    return int(wanted) if wanted in ''.join(found) else 0
"""
    assert verify_code(block(spy), check, sandbox).reason == "wrong_output"


@pytest.mark.parametrize(("code", "reason"), [
    ("int f(int x) { return x + 1; }", "all_passed"),
    ("long f(long x) { return x + 1; }\nint main(void) { return 3; }", "all_passed"),
    ('#include <stdio.h>\nint f(int x) { printf("1\\n"); return x + 1; }', "all_passed"),
    ("int f(int x) { return x; }", "wrong_output"),
    ("int f(int x) { return x + ; }", "compile_error"),
    ("double f(int x) { return x + 1; }", "compile_error"),
    ("int f(int x, int y) { return x + 1; }", "compile_error"),
    ("int f(int x) { volatile int *p = 0; return *p; }", "runtime_error"),
    ("int f(int x) { for (;;) ; }", "time_limit"),
    ("int g(int x) { return x + 1; }", "no_function"),
])
def test_c_functions_get_the_reason_they_deserve(sandbox, code, reason):
    assert verify_code(block(code, "c"), C, sandbox).reason == reason


def test_tests_of_c_functions_must_be_rows_of_integers():
    with pytest.raises(ValueError, match="integers"):
        c_program("int f(int x);", "f", [[1], [2, 3]])
    with pytest.raises(ValueError, match="integers"):
        c_program("int f(int x);", "f", [[1.5]])


def test_whole_programs_are_compared_on_their_output(sandbox):
    tests = json.dumps([{"stdin": "2 3\n", "expected": "5\n"}, {"stdin": "4 5\n", "expected": "9"}])
    python, c = (Check("code", language=language, tests=tests) for language in ("python", "c"))
    good = "print(sum(map(int, input().split())))"
    assert verify_code(block(good), python, sandbox).reason == "all_passed"
    assert verify_code(block("print(5)"), python, sandbox).reason == "wrong_output"
    assert verify_code(block(good + "\nundefined"), python, sandbox).reason == "runtime_error"
    program = '#include <stdio.h>\nint main(void) { int a, b; scanf("%d %d", &a, &b); printf("%d ", a + b); }'
    assert verify_code(block(program, "c"), c, sandbox).status is Status.CORRECT


@pytest.mark.parametrize(("code", "reason"), [
    ("def f(v, k): return {v[0]: [k[0] + 1]}", "all_passed"),
    ("def f(v, k): return {v[0]: [0]}", "wrong_output"),
    ("def f(v, k): return None", "wrong_output"),
    ("def f(v, k): raise KeyError", "runtime_error"),
    ("def g(v): return v", "no_function"),
    ("def f(v, k:", "compile_error"),
    ("def f(v, k):\n    while True: pass", "time_limit"),
    ("import os\ndef f(v, k): os._exit(0)", "runtime_error"),
    ("class S(dict):\n    __eq__ = lambda *_: True\ndef f(v, k): return S()", "wrong_output"),
    ("import os\nos.write(3, b'{\"outcome\": \"all_passed\"}\\n')\ndef f(v, k): return 0", "wrong_output"),
    ("import builtins\nbuiltins.AssertionError = KeyError\ndef f(v, k): return 0", "wrong_output"),
])
def test_assert_tests_run_in_another_process_than_the_candidate(sandbox, code, reason):
    assert verify_code(block(code), ASSERTS, sandbox).reason == reason


def test_the_asserts_are_nowhere_in_the_candidates_process(sandbox):
    spy = """
import gc, os
def f(v, k):
    seen = ''.join(repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, str, tuple)))
    for pid in os.listdir('/proc'):
        for name in ('mem', 'maps', 'environ', 'fd/0') if pid.isdigit() and int(pid) != os.getpid() else ():
            try: seen += repr(open(f'/proc/{pid}/{name}', 'rb').read())
            except OSError: pass
    return {v[0]: [v[0] + 1]} if ' = '.join(['SECRET', '417']) in seen else {}
"""
    assert verify_code(block(spy), ASSERTS, sandbox).reason == "wrong_output"


def test_unusable_tests_are_the_checks_fault_and_no_wrong_answer(sandbox):
    asserts = json.dumps([{"assert_code": "def check(candidate):\n    assert helper(candidate(1)) == 1\n"}])
    for check in (Check("code", language="python", entry_point="f", tests=asserts),
                  Check("code", language="rust", entry_point="f", tests=TESTS),
                  Check("code", language="python", entry_point="f", tests=None)):
        found = verify_code(block("def f(x): return x"), check, sandbox)
        assert (found.status, found.reason, found.score) == (Status.INFRA_ERROR, "bad_check", None)


def test_a_broken_sandbox_is_an_infrastructure_error_for_each_candidate():
    class Broken:
        """Stands for a machine on which no sandbox starts, which a working machine cannot show."""
        isolation = "bubblewrap"

        def run(self, jobs):
            raise SandboxFailure("no space left")

    found = verify_code_batch([(block("def f(x): return x"), PYTHON)] * 2 + [("no code", PYTHON)], Broken())
    assert [v.status for v in found] == [Status.INFRA_ERROR, Status.INFRA_ERROR, Status.MALFORMED]
    assert found[0].score is None and "no space left" in found[0].evidence


def test_values_are_compared_with_their_types():
    assert same_value([1, {"a": 0.1 + 0.2}], [1, {"a": 0.3}])
    for value, expected in ((True, 1), (1, 1.0), ("1", 1), ([1], [1, 1]), (None, False), (float("nan"), float("nan"))):
        assert not same_value(value, expected)
