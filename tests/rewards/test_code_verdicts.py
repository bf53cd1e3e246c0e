import dataclasses
import json

import pytest

from pipeline.records import Check, Status
from rewards.code import same_value, verify_code, verify_code_batch
from rewards.languages import LANGUAGES, c_call
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


def needs(language):
    if tool := LANGUAGES[language].missing():
        pytest.skip(f"{tool} is not installed")


def block(code, language="python"):
    return f"<think>t</think>\n```{language}\n{code}\n```"


@pytest.mark.parametrize(("code", "reason"), [
    ("def f(x): return x + 1", "all_passed"),
    ("def f(x):\n    print('noise')\n    return x + 1", "all_passed"),
    ("def f(x): return x", "wrong_output"),
    ("def f(x): return x +", "compile_error"),
    ("def f(x): return 1 // 0", "runtime_error"),
    ("import socket\ndef f(x): return socket.socket().fileno()", "forbidden"),
    ("def f(x): return open('/usr/new', 'w').write('x')", "forbidden"),
    ("import os\ndef f(x): return os.chroot('/')", "forbidden"),
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
    ("#include <stdio.h>\n#include <stdlib.h>\nint f(int x) { if (!fopen(\"/usr/new\", \"w\")) { perror(\"new\"); "
     "exit(1); } return x; }", "forbidden"),
    ("int f(int x) { for (;;) ; }", "time_limit"),
    ("int g(int x) { return x + 1; }", "no_function"),
])
def test_c_functions_get_the_reason_they_deserve(sandbox, code, reason):
    assert verify_code(block(code, "c"), C, sandbox).reason == reason


def test_tests_of_c_functions_must_be_rows_of_integers():
    with pytest.raises(ValueError, match="integers"):
        c_call("int f(int x);", "f", [[1], [2, 3]], "")
    with pytest.raises(ValueError, match="integers"):
        c_call("int f(int x);", "f", [[1.5]], "")


def test_whole_programs_are_compared_on_their_output(sandbox):
    tests = json.dumps([{"stdin": "2 3\n", "expected": "5\n"}, {"stdin": "4 5\n", "expected": "9"}])
    python, c = (Check("code", language=language, tests=tests) for language in ("python", "c"))
    good = "print(sum(map(int, input().split())))"
    assert verify_code(block(good), python, sandbox).reason == "all_passed"
    assert verify_code(block("print(5)"), python, sandbox).reason == "wrong_output"
    assert verify_code(block(good + "\nundefined"), python, sandbox).reason == "runtime_error"
    program = '#include <stdio.h>\nint main(void) { int a, b; scanf("%d %d", &a, &b); printf("%d ", a + b); }'
    assert verify_code(block(program, "c"), c, sandbox).status is Status.CORRECT


SOLVED = {
    "python": "def f(xs, k, name): return [name] + [str(x * k) for x in xs]",
    "cpp": """#include <string>
#include <vector>
std::vector<std::string> f(std::vector<double> xs, int k, std::string name) {
    std::vector<std::string> out = {name};
    for (double x : xs) { std::string s = std::to_string(x * k); s.erase(s.find('.') + 2); out.push_back(s); }
    return out;
}""",
    "javascript": "const f = (xs, k, name) => [name, ...xs.map((x) => (x * k).toFixed(1))]",
    "java": """import java.util.*;
public class Solution {
    List<String> f(double[] xs, int k, String name) {
        List<String> out = new ArrayList<>(List.of(name));
        for (double x : xs) out.add(String.valueOf(x * k));
        return out;
    }
}""",
}
MIXED = [{"args": [[1.5, -2.0], 2, 'a "b"\n\\u0041\u00e9'], "expected": ['a "b"\n\\u0041\u00e9', "3.0", "-4.0"]},
         {"args": [[], 0, ""], "expected": [""]}]


@pytest.mark.parametrize("language", SOLVED)
def test_functions_take_and_return_lists_texts_and_numbers(sandbox, language):
    needs(language)
    check = Check("code", language=language, entry_point="f", tests=json.dumps(MIXED))
    found = verify_code(block(SOLVED[language], language), check, sandbox)
    assert found.reason == "all_passed", found.evidence
    other = [{**test, "expected": [*test["expected"], "x"]} for test in MIXED]
    check = Check("code", language=language, entry_point="f", tests=json.dumps(other))
    assert verify_code(block(SOLVED[language], language), check, sandbox).reason == "wrong_output"


@pytest.mark.parametrize(("language", "code", "reason"), [
    ("cpp", "int f(int x) { return x + 1; }", "all_passed"),
    ("cpp", "long f(long x) { return x + 1; }\nint main() { return 3; }", "all_passed"),
    ("cpp", "double f(int x) { return x + 1; }", "wrong_output"),
    ("cpp", "int f(int x) { return x }", "compile_error"),
    ("cpp", "#include <stdexcept>\nint f(int x) { throw std::runtime_error(\"no\"); }", "runtime_error"),
    ("cpp", "#include <vector>\nint f(int x) { std::vector<long> v; for (;;) v.resize(v.size() + 999999, 1); }",
     "memory_limit"),
    ("cpp", "int f(int x) { for (volatile int i = 0;;) i = x; }", "time_limit"),
    ("cpp", "int g(int x) { return x + 1; }", "no_function"),
    ("javascript", "function f(x) { return x + 1; }", "all_passed"),
    ("javascript", "class A { g(x) { return x + 1 } }\nvar f = new A().g", "all_passed"),
    ("javascript", "function f(x) { return String(x + 1); }", "wrong_output"),
    ("javascript", "function f(x) { return { valueOf() { return x + 1; } }; }", "wrong_output"),
    ("javascript", "function f(x) { return x + ; }", "compile_error"),
    ("javascript", "function f(x) { throw new Error('no'); }", "runtime_error"),
    ("javascript", "function f(x) { require('fs').writeFileSync('/usr/new', 'x'); return x; }", "forbidden"),
    ("javascript", "function f(x) { const v = []; for (;;) v.push(new Array(999999).fill(1.5)); }", "memory_limit"),
    ("javascript", "function f(x) { for (;;) ; }", "time_limit"),
    ("javascript", "function g(f) { return f + 1; }", "no_function"),
    ("java", "class Main { static int f(int x) { return x + 1; } }", "all_passed"),
    ("java", "public class A { private long f(long x) { System.out.println(9); return x + 1; } }", "all_passed"),
    ("java", "class A { static double f(int x) { return x + 1; } }", "wrong_output"),
    ("java", "class A { static int f(int x) { return x } }", "compile_error"),
    ("java", "class A { static int f(int x) { return x / 0; } }", "runtime_error"),
    ("java", "class A { static int f(int x) { var v = new java.util.ArrayList<long[]>(); "
             "for (;;) v.add(new long[99999]); } }", "memory_limit"),
    ("java", "class A { static int f(int x) { for (;;) ; } }", "time_limit"),
    ("java", "class A { static int f(int x, int y) { return x + 1; } }", "no_function"),
])
def test_functions_of_other_languages_get_the_reason_they_deserve(sandbox, language, code, reason):
    needs(language)
    check = Check("code", language=language, entry_point="f", tests=TESTS)
    found = verify_code(block(code, language), check, sandbox)
    assert found.reason == reason, found.evidence


PROGRAMS = {
    "python": "print(sum(map(int, input().split())))",
    "c": '#include <stdio.h>\nint main(void) { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }',
    "cpp": "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }",
    "javascript": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number)\nconsole.log(a + b)",
    "java": "import java.util.Scanner;\nclass Pair {}\npublic class Main {\n  public static void main(String[] a) {\n"
            "    Scanner in = new Scanner(System.in);\n    System.out.println(in.nextInt() + in.nextInt());\n  }\n}",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_programs_of_every_language_read_stdin_and_are_compared_on_stdout(sandbox, language):
    needs(language)
    for expected, reason in (("5", "all_passed"), ("6", "wrong_output")):
        check = Check("code", language=language, tests=json.dumps([{"stdin": "2 3\n", "expected": expected}]))
        found = verify_code(block(PROGRAMS[language], language), check, sandbox)
        assert found.reason == reason, found.evidence


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
                  dataclasses.replace(ASSERTS, entry_point="f); import os #"),
                  Check("code", language="rust", entry_point="f", tests=TESTS),
                  Check("code", language="python", entry_point="f", tests=None)):
        found = verify_code(block("def f(x): return x"), check, sandbox)
        assert (found.status, found.reason, found.score) == (Status.INFRA_ERROR, "bad_check", None)


def test_a_missing_toolchain_is_the_machines_fault_and_no_wrong_answer(sandbox, monkeypatch):
    monkeypatch.setitem(LANGUAGES, "cpp", dataclasses.replace(LANGUAGES["cpp"], compile=("/usr/bin/nothing", "x")))
    found = verify_code(block("int f(int x) { return x + 1; }", "cpp"), Check("code", language="cpp", entry_point="f",
                                                                              tests=TESTS), sandbox)
    assert (found.status, found.score) == (Status.INFRA_ERROR, None)
    assert found.evidence == "/usr/bin/nothing is missing; apt-get install g++"


@pytest.mark.parametrize(("language", "tests"), [
    ("c", [{"args": ["text"], "expected": 1}]), ("cpp", [{"args": [{"a": 1}], "expected": 1}]),
    ("java", [{"args": [2**63], "expected": 1}])])
def test_arguments_that_a_language_cannot_take_are_the_checks_fault(sandbox, language, tests):
    needs(language)
    check = Check("code", language=language, entry_point="f", tests=json.dumps(tests))
    assert verify_code(block("f", language), check, sandbox).reason == "bad_check"


def test_a_broken_sandbox_is_an_infrastructure_error_for_each_candidate():
    class Broken:
        """Stands for a machine on which no sandbox starts, which a working machine cannot show."""
        isolation = "bubblewrap"

        def run(self, jobs):
            raise SandboxFailure("no space left")

    found = verify_code_batch([(block("def f(x): return x"), PYTHON)] * 2 + [("no code", PYTHON)], Broken())
    assert [v.status for v in found] == [Status.INFRA_ERROR, Status.INFRA_ERROR, Status.MALFORMED]
    assert found[0].score is None and "no space left" in found[0].evidence


def test_where_numbers_have_one_type_only_their_value_counts():
    assert same_value([1, 2.0], [1.0, 2], one_number_type=True)
    for value, expected in ((10**400, 1.0), (1.5, 10**400), (True, 1.0), ("1", 1)):
        assert not same_value(value, expected, one_number_type=True)


def test_values_are_compared_with_their_types():
    assert same_value([1, {"a": 0.1 + 0.2}], [1, {"a": 0.3}])
    for value, expected in ((True, 1), (1, 1.0), ("1", 1), ([1], [1, 1]), (None, False), (float("nan"), float("nan"))):
        assert not same_value(value, expected)
