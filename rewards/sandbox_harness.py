"""What runs in a candidate's process: its code and inputs, results out as tagged JSON on a private channel.

Loaded by `sandbox_driver.py` from this file's bytecode (inside a sandbox the project is not importable), so it
imports only the standard library. The expected answers are never here: a program that fakes its result
lines can only claim other outputs, and is compared on those.
"""

import _json
import os
import sys

CHANNEL = 3  # descriptor on which results are handed over
FROM_PEER, TO_PEER = 4, 5  # descriptors between a candidate and the asserts that call it
# json.dumps without the rest of the package, whose import takes as long as the rest of a start
WRITER = _json.make_encoder(None, None, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True)


def send(descriptor, nonce, value):
    line = (nonce + " " + "".join(WRITER(value, 0)) + "\n").encode()
    while line:
        line = line[os.write(descriptor, line):]


def receive(stream):
    """The next line of JSON from a pipe; None at its end."""
    import json  # only where asserts need it

    line = stream.readline(1 << 24)
    return json.loads(line.split(b" ", 1)[1]) if line else None


def encode(value):
    """Plain values as JSON with container types spelled out; TypeError for anything else.

    Exact types only for scalars: a subclass may carry an `__eq__` or `__repr__` of its own.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item) for item in kind.__iter__(value)]}
    raise TypeError(f"a value of type {type(value).__name__} cannot leave the sandbox")


def decode(value):
    if not isinstance(value, dict):
        return value
    (kind, items), = value.items()
    if kind == "dict":
        return {decode(key): decode(item) for key, item in items}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item) for item in items)


def failure(error):
    return {"error": type(error).__name__, "detail": str(error)[:200]}


def load(job, name):
    """Run the candidate's module; on failure say so and end the process."""
    module = type(sys)(name)
    hidden = sys.modules.get(name)  # keeps our own globals alive when `name` is __main__
    sys.modules[name] = module
    try:
        code = compile(job["code"], "candidate.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        send(CHANNEL, job["nonce"], dict(failure(error), stage="compile"))
        os._exit(1)
    try:
        exec(code, module.__dict__)
    except BaseException as error:
        stop = leave(error) if name == "__main__" and isinstance(error, SystemExit) else None
        if stop is None:
            send(CHANNEL, job["nonce"], dict(failure(error), stage="load"))
            sys.excepthook(*sys.exc_info())
            stop = 1
        sys.stdout.flush()
        os._exit(stop)
    return module, hidden


def leave(error):
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def find(job, module):
    function = getattr(module, job["entry_point"], None)
    if not callable(function):
        send(CHANNEL, job["nonce"], {"error": "no_function", "stage": "find"})
        os._exit(1)
    return function


def answer(function, args, kwargs):
    try:
        value = function(*args, **kwargs)
    except BaseException as error:
        return failure(error)
    try:
        return {"value": encode(value)}
    except (TypeError, RecursionError) as error:
        return dict(failure(error), stage="value")


def python_calls(job):
    """One call of the entry point per input; a line per result on the private channel."""
    module, _ = load(job, "candidate")
    function = find(job, module)
    for args in job["inputs"]:
        reply = answer(function, args, {})
        send(CHANNEL, job["nonce"], reply)
        if "error" in reply:
            break
    os._exit(0)


def python_program(job):
    load(job, "__main__")
    sys.stdout.flush()
    os._exit(0)


def python_serve(job):
    """The candidate's side of the assert form: answer calls until the asserts are done."""
    module, _ = load(job, "candidate")
    function = find(job, module)
    calls = open(FROM_PEER, "rb")
    while True:
        call = receive(calls)
        if call is None:
            os._exit(0)
        send(TO_PEER, "reply", answer(function, decode(call["args"]), decode(call["kwargs"])))


class CandidateFailed(Exception):
    """A call raised, or the candidate's process is gone."""


def python_asserts(asserts, job):
    """The trusted side: run `check(candidate)` where `candidate` calls the other process."""
    replies = open(FROM_PEER, "rb")

    def candidate(*args, **kwargs):
        try:
            send(TO_PEER, "call", {"args": encode(list(args)), "kwargs": encode(kwargs)})
            reply = receive(replies)
        except BrokenPipeError:
            reply = None
        if reply is None:
            raise CandidateFailed("the candidate's process ended")
        if "value" not in reply:
            raise CandidateFailed(f"{reply.get('error')}: {reply.get('detail')}")
        return decode(reply["value"])

    candidate.__name__ = job["entry_point"]
    outcome, detail = "all_passed", ""
    try:
        names = {"__name__": "asserts", job["entry_point"]: candidate}
        exec(compile(asserts, "asserts.py", "exec", dont_inherit=True), names)
        if "check" not in names:
            raise NameError("the asserts define no check(candidate)")
        names["check"](candidate)
    except CandidateFailed as error:
        outcome, detail = "runtime_error", str(error)
    except (NameError, SyntaxError, ImportError) as error:
        outcome, detail = "bad_check", repr(error)
    except Exception as error:  # an assert, or an operation that the returned value does not support
        outcome, detail = "wrong_output", repr(error)
    send(CHANNEL, job["nonce"], {"outcome": outcome, "detail": detail[:300]})
    os._exit(0)
