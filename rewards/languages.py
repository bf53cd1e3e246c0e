"""The languages of code answers: one row each, and how a function of each is called with a test's arguments.

Python runs in a fork of the sandbox's warm interpreter; the others are compiled and run as programs of their own.
A call becomes a whole program (`callers/`): the candidate's code, the arguments, and a line of JSON per result on
descriptor 3, marked with this run's nonce. The expected outputs are in none of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CALLERS = Path(__file__).with_name("callers")
Call = Callable[[str, str, Sequence[Sequence[Any]], str], str]  # code, entry point, rows of arguments, nonce


@dataclass(frozen=True)
class Language:
    """How answers in a language are found, built, run and held in.

    fences: names a fenced block may carry. source: the file the code is written to; compile and run: commands,
    `{main}` is the class to start. address_bytes: what the runtime reserves, used or not. memory_bytes: resident
    memory it takes before the candidate's first line. package: where Debian keeps it. call: a whole program around
    a function; None where the sandbox's own interpreter calls it.
    """

    fences: tuple[str, ...]
    package: str
    source: str = ""
    compile: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    address_bytes: int = 0
    memory_bytes: int = 0
    one_number_type: bool = False
    call: Call | None = None


    def missing(self) -> str | None:
        """The first tool of this language that the machine lacks."""
        tools = [command[0] for command in (self.compile, self.run) if command and command[0].startswith("/")]
        return next((tool for tool in tools if not Path(tool).is_file()), None)


class NoFunction(Exception):
    """The code does not mention the function asked for."""


def c_call(code: str, entry_point: str, rows: Sequence[Sequence[Any]], nonce: str) -> str:
    """C has no types to go by at run time: rows of equally many 64-bit integers, and an integer result."""
    width = len(rows[0])
    if any(len(row) != width or not all(type(value) is int and -2**63 <= value < 2**63 for value in row)
           for row in rows):
        raise ValueError("C functions are tested with rows of equally many integers")
    arguments = ", ".join(f"posttrain_a[row][{i}]" for i in range(width))
    values = ", ".join("{" + ", ".join(map(_integer, row or [0])) + "}" for row in rows)
    kinds = ", ".join(f"{sign}{kind}: 1" for kind in ("char", "short", "int", "long", "long long")
                      for sign in ("signed ", "unsigned "))
    return (f"#define main candidate_main\n{code}\n#undef main\n#include <stdio.h>\n"
            f"int main(void) {{\n  static const long long posttrain_a[][{max(width, 1)}] = {{{values}}};\n"
            f"  int row = 0;\n"
            f"  _Static_assert(_Generic(({entry_point}({arguments})), _Bool: 1, char: 1, {kinds}, default: 0), "
            f"\"{entry_point} must return an integer\");\n"
            f"  for (row = 0; row < {len(rows)}; row++)\n"
            f"    dprintf(3, \"{nonce} {{\\\"value\\\": %lld}}\\n\", (long long){entry_point}({arguments}));\n"
            f"  return 0;\n}}\n")


def cpp_call(code: str, entry_point: str, rows: Sequence[Sequence[Any]], nonce: str) -> str:
    """Arguments as braced literals, which become whatever the parameter's type is; results by overload."""
    calls = "\n".join(f"    posttrain::send({entry_point}({', '.join(map(_cpp_literal, row))}));" for row in rows)
    return (f"#define main candidate_main\n{code}\n#undef main\n"
            + _caller("call.cpp", NONCE=nonce, CALLS=calls))


def javascript_call(code: str, entry_point: str, rows: Sequence[Sequence[Any]], nonce: str) -> str:
    return f"{code}\n;\n" + _caller("call.js", NONCE=nonce, ENTRY=entry_point)


def java_call(code: str, entry_point: str, rows: Sequence[Sequence[Any]], nonce: str) -> str:
    """A static method, or one of a class that is made without arguments, found by name and count of parameters."""
    classes = ", ".join(json.dumps(name) for name in _java_classes(code))
    literals = ", ".join("{" + ", ".join(map(_java_literal, row)) + "}" for row in rows)
    return java_program(code) + _caller("Call.java", NONCE=nonce, ENTRY=entry_point, ROWS=literals, CLASSES=classes)


def java_program(code: str) -> str:
    """Java wants a public class in a file of its name; the file here has another."""
    return re.sub(r"^(\s*)public\s+((?:final\s+|abstract\s+)*(?:class|interface|enum|record)\b)", r"\1\2", code,
                  flags=re.MULTILINE) + "\n"


def java_main(code: str) -> str:
    """The class whose main is to be started: the last one declared before it."""
    before = code.partition("void main")[0]
    return (_java_classes(before) or ["Main"])[-1]


def _java_classes(code: str) -> list[str]:
    return re.findall(r"\b(?:class|record|enum)\s+([A-Za-z_$][\w$]*)", code)


def _integer(value: int) -> str:
    # the smallest 64-bit integer has no literal of its own
    return f"({value + 1}LL - 1)" if value == -2**63 else f"{value}LL"


def _cpp_literal(value: Any) -> str:
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int and -2**63 <= value < 2**63:
        return str(value) if -2**31 < value < 2**31 else _integer(value)
    if type(value) is float:
        return repr(value)
    if type(value) is str:
        return '"' + "".join(f"\\{byte:03o}" for byte in value.encode()) + '"'
    if type(value) is list:
        return "{" + ", ".join(map(_cpp_literal, value)) + "}"
    raise ValueError(f"C++ functions are tested with numbers, booleans, texts and lists of them, not {value!r:.60}")


def _java_literal(value: Any) -> str:
    if type(value) is bool:
        return "true" if value else "false"
    if type(value) is int and -2**63 <= value < 2**63:
        return f"{value}L"
    if type(value) is float:
        return f"{value!r}"
    if type(value) is str:
        data = value.encode("utf-16-be")
        units = [data[i] << 8 | data[i + 1] for i in range(0, len(data), 2)]
        # \u is read before the literal is: below 128 it could end the literal
        return '"' + "".join(f"\\{unit:03o}" if unit < 128 else f"\\u{unit:04x}" for unit in units) + '"'
    if type(value) is list:
        return "new Object[]{" + ", ".join(map(_java_literal, value)) + "}"
    raise ValueError(f"Java methods are tested with numbers, booleans, texts and lists of them, not {value!r:.60}")


def _caller(name: str, **values: str) -> str:
    text = _template(name)
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text


@cache
def _template(name: str) -> str:
    return (CALLERS / name).read_text()


def _tool(name: str) -> str:
    """The file itself: Debian's names for Java lead through /etc, which a sandbox does not have."""
    return str(Path("/usr/bin", name).resolve())


_JAVA = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xss8m")
LANGUAGES = {
    "python": Language(("python", "py", "python3"), "python3"),
    "c": Language(("c",), "gcc", "main.c", (
        "/usr/bin/gcc", "-x", "c", "-std=gnu11", "-O1", "-Werror=implicit-function-declaration",
        "-Werror=int-conversion", "-Werror=incompatible-pointer-types", "-o", "program", "main.c", "-lm"),
        ("./program",), call=c_call),
    "cpp": Language(("cpp", "c++", "cxx"), "g++", "main.cpp", (
        "/usr/bin/g++", "-std=gnu++17", "-O1", "-w", "-o", "program", "main.cpp"), ("./program",), call=cpp_call),
    "javascript": Language(("javascript", "js"), "nodejs", "main.js", ("/usr/bin/node", "--check", "main.js"), (
        "/usr/bin/node", "--max-old-space-size=512", "main.js"), 8 << 30, 64 << 20, one_number_type=True,
        call=javascript_call),
    "java": Language(("java",), "default-jdk-headless", "Main.java", (
        _tool("javac"), *(f"-J{flag}" for flag in _JAVA), "-J-Xmx128m", "-nowarn", "-proc:none", "-d", ".",
        "Main.java"), (_tool("java"), *_JAVA, "-Xmx192m", "-cp", ".", "{main}"), 8 << 30, 96 << 20, call=java_call),
}
