r"""The outer shape of an answer: list, set, tuple, interval, union, matrix, cases, ratio, congruence, named value.

Reads normalised text (`notation`) and leaves the scalars inside as text. Inequalities become the intervals they say,
`\pm` the two values it says. What has no such shape is a `Scalar`.
"""

from __future__ import annotations

import re
from itertools import chain

from rewards.arithmetic import number
from rewards.notation import closing, cut, squeeze
from rewards.shapes import (
    Cases,
    Collection,
    Congruence,
    Matrix,
    Named,
    Ratio,
    Relation,
    Scalar,
    Sequence,
    Shape,
    Union,
)
from rewards.units import split_unit

MAX_ITEMS, MAX_DEPTH = 64, 6
REALS = Union((Sequence("()", (Scalar("-\\infty"), Scalar("\\infty"))),))

_COMMA = re.compile(r",\s*(?:and|or)\b|[,;]")
_AND, _OR = re.compile(r"\band\b"), re.compile(r"\bor\b")
_EQUALS = re.compile(r"=")
_LESS = re.compile(r"<\s*=?|>\s*=?|\\le(?![a-z])|\\ge(?![a-z])")
_UNEQUAL, _MEMBER = re.compile(r"\\ne(?![a-z])"), re.compile(r"\\in(?![a-z])")
_CUP, _MINUS = re.compile(r"\\cup(?![a-z])"), re.compile(r"\\setminus(?![a-z])")
_COLON, _BAR = re.compile(r":"), re.compile(r"\||:")
_ROW, _CELL = re.compile(r"\\\\"), re.compile(r"&")
_ENVIRONMENT = re.compile(r"^(.*?)[(\[]?\s*\\begin\{((?:[pbv]|small)?matrix|array)\}(\{[lcr|]*\})?(.*)"
                          r"\\end\{\2\}\s*[)\]]?$", re.DOTALL)
_CASES = re.compile(r"^\\begin\{cases\}(.*)\\end\{cases\}$|^\\\{\s*\\begin\{array\}\{[lcr|]*\}(.*)\\end\{array\}$",
                    re.DOTALL)
_CONGRUENCE = re.compile(r"(?:(.*)\\equiv)?\s*(-?\d{1,9})\s*\(?\\?(?:pmod|bmod|mod)\s*\{?\s*(\d{1,9})\s*\}?\)?")
VARIABLE = re.compile(r"(?:[a-zA-Z]|\\(?!in|pm|pi|mp)[a-z]+)(?:_(?:\w|\{\w+\}))?")
# what may stand before "=" as the name of an answer: letters, indices and arguments, but nothing that computes
LABEL = re.compile(r"(?=.*[a-zA-Z])(?![\d(])(?!\\?(?:frac|sqrt|pm)\b)(?:\\?[a-zA-Z]++|[\s|']|_\{[^{}]*\}|_\w|"
                   r"\^\{?-1\}?|\((?:[\w\s]|\\[a-z]++|[<>=|,])*+\))++")
NAMES = re.compile(r"\(\s*([a-z](?:_\{?\w\}?)?(?:\s*,\s*[a-z](?:_\{?\w\}?)?)*)\s*\)", re.IGNORECASE)
_EMPTY = re.compile(r"\\emptyset|\\\{\s*\\\}|(there (is|are) )?no solutions?|(the )?empty set", re.IGNORECASE)
_ALL = re.compile(r"\\mathbb\{?R\}?|\(?all real numbers\)?|(all|any) reals?( numbers?)?", re.IGNORECASE)


def read(text: str, depth: int = 0) -> Shape:
    """The shape of normalised `text`."""
    text = text.strip()
    if depth > MAX_DEPTH or not re.search(r"[,;:=<>\[\\(a-z]", text):
        return Scalar(text)
    shape = (_special(text) or _environment(text, depth) or _relation(text, depth) or _many(text, depth)
             or _line(text, depth) or _bracketed(text, depth) or _ratio(text))
    if shape:
        return shape
    if signs := _signs(text):
        return Collection(tuple(read(sign, depth + 1) for sign in signs))
    return Scalar(text)


def _special(text: str) -> Shape | None:
    if _EMPTY.fullmatch(text):
        return Collection((), True)
    if _ALL.fullmatch(text):
        return REALS
    if match := re.fullmatch(r"\\mathbb\{?R\}?(?:_\{?)?\^?\{?([+-])\}?", text):
        ends = ("0", "\\infty") if match.group(1) == "+" else ("-\\infty", "0")
        return _interval("()", *ends)
    if (match := _CONGRUENCE.fullmatch(text)) and int(match.group(3)):
        residue, modulus = int(match.group(2)), int(match.group(3))
        return Congruence((match.group(1) or "").strip(), residue % modulus, modulus)
    return None


def _environment(text: str, depth: int) -> Shape | None:
    if match := _CASES.fullmatch(text):
        rows = []
        for row in cut(match.group(1) or match.group(2), _ROW):
            value, _, condition = row.partition("&")
            if value.strip():
                condition = re.sub(r"^\s*(if|for|when)\b|[.,;]\s*$", "", condition.strip().strip(".,;"))
                rows.append((read(value.strip().strip(",").strip(), depth + 1), read(condition, depth + 1)))
        return Cases(tuple(rows))
    match = _ENVIRONMENT.fullmatch(text)
    if not match or "\\begin" in match.group(4) or "\\end" in match.group(4):
        return None
    before, kind, body = match.group(1).strip(), match.group(2), match.group(4)
    factor = ""
    if before.endswith("="):
        name = before[:-1].strip()
        if not LABEL.fullmatch(name):
            return None
    elif before:
        factor = before
    lines = [line.strip().removeprefix("\\hline") for line in cut(body, _ROW)]
    rows = [[f"({factor})({cell})" if factor else cell for cell in cut(line, _CELL)] for line in lines if line]
    return Matrix(tuple(tuple(read(cell, depth + 1) for cell in row) for row in rows), kind.startswith("v"))


def _relation(text: str, depth: int) -> Shape | None:
    """Named values, equations, inequalities, memberships; None where a list is outermost."""
    sides = cut(text, _MEMBER)
    if len(sides) == 2 and not cut(text, _COMMA)[1:] and (VARIABLE.fullmatch(sides[0]) or NAMES.fullmatch(sides[0])):
        return read(sides[1], depth + 1)
    sides = cut(text, _EQUALS)
    if len(sides) == 2 and not _LESS.search(sides[0]) and all(sides):
        name, value = sides
        if match := NAMES.fullmatch(name):
            return Named(squeeze(name), read(value, depth + 1), tuple(re.split(r"\s*,\s*", match.group(1))))
        if LABEL.fullmatch(name):
            return Named(squeeze(name), read(value, depth + 1))
        if not _COMMA.search(value) and not _OR.search(value) and not _AND.search(value):
            return Relation(name, "=", value)
    if cut(text, _COMMA)[1:] or cut(text, _OR)[1:] or cut(text, _AND)[1:]:
        return None
    sides = cut(text, _UNEQUAL)
    if len(sides) == 2 and VARIABLE.fullmatch(sides[0]):
        return _without(_points(sides[1], depth), sides[0])
    return _inequality(text)


def _inequality(text: str) -> Shape | None:
    terms, operators = cut(text, _LESS), [re.sub(r"\s", "", found) for found in _LESS.findall(text)]
    if not 2 <= len(terms) <= MAX_ITEMS or len(operators) != len(terms) - 1 or not all(terms):
        return None
    signs = [{"\\le": "<=", "\\ge": ">="}.get(operator, operator) for operator in operators]
    if {sign[0] for sign in signs} == {">"}:
        terms, signs = terms[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
    if {sign[0] for sign in signs} != {"<"}:
        return None
    left, right = ("[" if signs[0] == "<=" else "("), ("]" if signs[-1] == "<=" else ")")
    if len(terms) == 3 and VARIABLE.fullmatch(terms[1]):
        return _interval(left + right, terms[0], terms[2], terms[1])
    if len(terms) > 2:  # an order of values
        return Sequence(" ".join(signs), tuple(Scalar(term) for term in terms))
    if VARIABLE.fullmatch(terms[0]):
        return _interval("(" + right, "-\\infty", terms[1], terms[0])
    if VARIABLE.fullmatch(terms[1]):
        return _interval(left + ")", terms[0], "\\infty", terms[1])
    if match := re.fullmatch(r"\|(.*)\|", terms[0]):
        if VARIABLE.fullmatch(match.group(1)):
            return _interval(("[" if signs[0] == "<=" else "(") + right, f"-({terms[1]})", terms[1], match.group(1))
    if match := re.fullmatch(r"\|(.*)\|", terms[1]):
        if VARIABLE.fullmatch(match.group(1)):
            return Union((*_interval("(" + ("]" if signs[0] == "<=" else ")"), "-\\infty", f"-({terms[0]})").parts,
                          *_interval(left + ")", terms[0], "\\infty").parts), match.group(1))
    return Relation(terms[0], signs[0], terms[1])


def _many(text: str, depth: int) -> Shape | None:
    """Bare lists; inequalities joined by "or" are a union, by "and" what both allow."""
    pieces = [piece for piece in cut(text, _COMMA) if piece]
    ordered = [list(chain.from_iterable(cut(piece, word) for piece in pieces)) for word in (_OR, _AND)]
    joined = max(ordered, key=len)
    if len(joined) < 2 or len(joined) > MAX_ITEMS:
        return None
    if len(joined) == len(pieces) and number(split_unit(text)[0]) is not None:  # the commas part thousands
        return None
    shapes = [read(piece, depth + 1) for piece in joined if piece]
    lines = [shape for shape in shapes if isinstance(shape, Union)]
    if len(lines) == len(shapes) and not all(re.match(r"[(\[]", piece) for piece in joined):
        if len(ordered[0]) > len(pieces):
            names = {line.variable for line in lines}
            return Union(tuple(part for line in lines for part in line.parts), names.pop() if len(names) == 1 else "")
        return _both(lines) or Sequence("", tuple(shapes))
    spread = tuple(chain.from_iterable(shape.items if isinstance(shape, Collection) and not shape.braces else [shape]
                                       for shape in shapes))
    words = len(joined) > len(pieces) or _COMMA.search(text) and re.search(r",\s*(and|or)\b", text)
    return Collection(spread) if words or len(spread) > len(shapes) else Sequence("", spread)


def _both(lines: list[Union]) -> Union | None:
    """The interval between two half-lines of one variable."""
    if len(lines) != 2 or any(len(line.parts) != 1 for line in lines) or lines[0].variable != lines[1].variable:
        return None
    first, second = (line.parts[0] for line in lines)
    if not (isinstance(first, Sequence) and isinstance(second, Sequence)):
        return None
    if first.items[0] == Scalar("-\\infty"):
        first, second = second, first
    if first.items[1] != Scalar("\\infty") or second.items[0] != Scalar("-\\infty"):
        return None
    part = Sequence(first.brackets[0] + second.brackets[1], (first.items[0], second.items[1]))
    return Union((part,), lines[0].variable)


def _line(text: str, depth: int) -> Shape | None:
    r"""Unions of intervals, and the line without points."""
    sides = cut(text, _MINUS)
    if len(sides) == 2:
        return _without(_points(sides[1], depth), within=read(sides[0], depth + 1))
    pieces = cut(text, _CUP)
    if len(pieces) < 2:
        if match := re.fullmatch(r"[\[\]](.*),(.*)[\[\]]", text):  # ]a, b[
            if text[0] == "]" or text[-1] == "[":
                return _interval("[("[text[0] == "]"] + "])"[text[-1] == "["], match.group(1), match.group(2))
        return None
    parts: list[Shape] = []
    for piece in pieces:
        shape = read(piece, depth + 1)
        if isinstance(shape, Sequence) and re.fullmatch(r"\[\]|\(\)|\[\)|\(\]", shape.brackets) and len(
                shape.items) == 2:
            parts.append(Collection(shape.items[:1], True) if shape.brackets == "[]" and shape.items[0] ==
                         shape.items[1] else shape)
        elif isinstance(shape, Union):
            parts += shape.parts
        elif isinstance(shape, Collection):
            parts += [Collection((item,), True) for item in shape.items]
        else:
            return None
    if all(isinstance(part, Collection) for part in parts):
        return Collection(tuple(chain.from_iterable(part.items for part in parts)), True)  # type: ignore[union-attr]
    return Union(tuple(parts))


def _points(text: str, depth: int) -> list[str]:
    shape = read(text, depth + 1)
    items = shape.items if isinstance(shape, (Collection, Sequence)) else (shape,)
    return [item.text for item in items if isinstance(item, Scalar)] if all(
        isinstance(item, Scalar) for item in items) else []


def _without(points: list[str], variable: str = "", within: Shape = REALS) -> Shape | None:
    """An interval without `points`, as the intervals between them; the points need exact values to be in order."""
    if isinstance(within, Union) and len(within.parts) == 1:
        within = within.parts[0]
    if not points or not isinstance(within, Sequence) or len(within.items) != 2:
        return None
    values = {point: number(point) for point in points}
    if len(points) > 1 and None in values.values():
        return None
    low, high = within.items
    ends = [low, *(Scalar(point) for point in sorted(values, key=lambda point: values[point] or 0)), high]
    brackets = [within.brackets[0], *")(" * len(values), within.brackets[1]]
    return Union(tuple(Sequence(brackets[2 * index] + brackets[2 * index + 1], (ends[index], ends[index + 1]))
                       for index in range(len(values) + 1)), variable)


def _bracketed(text: str, depth: int) -> Shape | None:
    if text.startswith("\\{"):
        inside = text[2:].removesuffix("\\}").rstrip()
        if not text.endswith("\\}") or closing(text, 1) != len(text) - 1:
            return None
        builder = cut(inside, _BAR)
        if len(builder) == 2 and (VARIABLE.fullmatch(builder[0]) or _MEMBER.search(builder[0])):
            name, _, domain = builder[0].partition("\\in")
            shape = read(builder[1], depth + 1)
            return shape if isinstance(shape, Union) and _ALL.fullmatch(domain.strip() or "\\mathbb{R}") else Relation(
                squeeze(inside), "|", "")
        items = [item for item in cut(inside, _COMMA) if item]
        if len(items) > MAX_ITEMS:
            return None
        shapes = (read(item, depth + 1) for item in items)
        return Collection(tuple(chain.from_iterable(
            shape.items if isinstance(shape, Collection) and not shape.braces else [shape] for shape in shapes)), True)
    if match := re.fullmatch(r"\\langle(.*)\\rangle", text):
        items = cut(match.group(1), _COMMA)
        return Sequence("()", tuple(read(item, depth + 1) for item in items)) if len(items) > 1 else None
    if text[:1] not in ("(", "[") or closing(text, 0) != len(text) - 1 or text[-1] == "}":
        return None
    items = cut(text[1:-1], _COMMA)
    if len(items) < 2:
        inner = read(items[0], depth + 1) if text[0] == "(" and text[-1] == ")" else None
        return inner if inner is not None and not isinstance(inner, Scalar) else None
    if len(items) > MAX_ITEMS:
        return None
    alternatives = [_signs(item) for item in items]
    if sum(map(bool, alternatives)) == 1 or any(alternatives) and "\\mp" in text:  # (±1, 0) are two points
        return Collection(tuple(
            Sequence(text[0] + text[-1], tuple(read(signs[way] if signs else item, depth + 1)
                                               for item, signs in zip(items, alternatives, strict=True)))
            for way in (0, 1)))
    return Sequence(text[0] + text[-1], tuple(read(item, depth + 1) for item in items))


def _ratio(text: str) -> Shape | None:
    terms = cut(text, _COLON)
    if len(terms) < 2 and (match := re.fullmatch(r"(\d+) to (\d+)", text)):
        terms = list(match.groups())
    if not 2 <= len(terms) <= 6 or any(
            not term or re.match(r"0\d", term) or re.search(r"(?<![\\a-z])[a-zA-Z]{2}|\.m", term) for term in terms):
        return None
    return Ratio(tuple(terms))


def _signs(text: str) -> list[str]:
    r"""Both values of one `\pm`, or of a \pm and a \mp together."""
    if len(re.findall(r"\\[pm][mp](?![a-z])", text)) != text.count("\\pm") + text.count("\\mp") or not re.search(
            r"\\(pm|mp)(?![a-z])", text):
        return []
    if text.count("\\pm") > 1 or text.count("\\mp") > 1:
        return []
    plus = text.replace("\\pm", "+").replace("\\mp", "-")
    minus = text.replace("\\pm", "-").replace("\\mp", "+")
    return [re.sub(r"\s+", " ", value).strip().removeprefix("+").strip() for value in (plus, minus)]


def _interval(brackets: str, low: str, high: str, variable: str = "") -> Union:
    return Union((Sequence(brackets, (Scalar(low.strip()), Scalar(high.strip()))),), variable)
