"""Inside the walls: compile verifiers, call them, and send one fixed record for each call. Runs in the forked child.

Standard library only. Whatever generated code can reach in this process it may have changed, so all that is used after
it ran was bound to a local name before, and nothing of its own (`==`, `bool()`, `repr()`) is asked about its answer.
"""

import ast
import gc
import os
import random
import struct
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from tasks.sandbox_gate import Grade, grade

CHANNEL = 3  # the file descriptor records are written to
DETAIL = 160  # bytes
RECORD = struct.Struct(f">16scIIBB{DETAIL}s")  # token, kind, verifier, call or grade, outcome, length of the detail
ENTER, VERDICT, NOTE = b"E", b"V", b"N"
OUTCOMES = ("passed", "failed", "error", "timeout", "memory", "forbidden", "invalid")
PASSED, FAILED, ERROR, TIMEOUT, MEMORY, FORBIDDEN, INVALID = range(len(OUTCOMES))
GROWTH_KIB = 64 * 1024  # a process that held so much more than at its start is not used for another verifier

FILENAME = "<verifier>"
_GENERATOR_FLAGS = {0x20: "a generator", 0x80: "a coroutine", 0x200: "an asynchronous generator"}
# Not loaded, for all they are for is files, processes and the network.
_REACHING = frozenset(
    {
        "asyncio", "concurrent", "ftplib", "http", "imaplib", "multiprocessing", "nntplib", "poplib", "pty",
        "selectors", "smtplib", "socketserver", "sqlite3", "ssl", "telnetlib", "urllib", "webbrowser", "xmlrpc",
        "dbm", "shelve",
    }
)  # fmt: skip
_NOTED = ("open", "socket.", "os.", "subprocess.", "signal.", "ctypes.dl", "mmap.", "shutil.", "_thread.", "pty.")

Answer = tuple[int, str]


class Task(NamedTuple):
    """A verifier and what it is called with."""

    source: str
    responses: list[str]


class Start(NamedTuple):
    """Where a child begins and what it may do there."""

    verifier: int
    call: int
    token: bytes
    share: int  # plain verifiers to a process


def serve(tasks: list[Task], start: Start) -> None:
    """Call from `start` on, as far as this process may be used. Returns where a fresh one must go on."""
    send = _sender(start.token)
    collect, grown, seed = gc.collect, _growth(), random.seed
    first = start.call
    _stay_off_files()
    for number in range(start.verifier, min(len(tasks), start.verifier + start.share)):
        source, responses = tasks[number]
        if not responses:
            continue
        code, sharing = _read(source)
        send(ENTER, number, int(sharing), 0, "")
        if sharing is not Grade.PLAIN:
            _watch_deeds(lambda deed, number=number: send(NOTE, number, 0, 0, deed))  # type: ignore[misc]
        last = len(responses) - 1
        for call in range(first, len(responses)):
            if sharing is not Grade.PLAIN:
                seed(0)
            outcome, detail = _call(code, responses[call]) if isinstance(code, CodeType) else code
            if call == last and sharing is Grade.PLAIN and start.share > 1:
                collect()  # what is left of it, finalizers and all, is this verifier's own time
            send(VERDICT, number, call, outcome, detail)
            if outcome == MEMORY or (sharing is Grade.INTRUSIVE):
                return
        if sharing is not Grade.PLAIN or grown():
            return
        first = 0


def _sender(token: bytes) -> Callable[[bytes, int, int, int, str], None]:
    write, pack, exit_now, size = os.write, RECORD.pack, os._exit, RECORD.size

    def send(kind: bytes, verifier: int, call: int, outcome: int, detail: str) -> None:
        text = detail.encode("ascii", "backslashreplace")[:DETAIL]
        if write(CHANNEL, pack(token, kind, verifier, call, outcome, len(text), text)) != size:
            exit_now(1)

    return send


def _growth() -> Callable[[], bool]:
    try:
        import resource
    except ImportError:  # no Unix
        return lambda: False
    usage, whose = resource.getrusage, resource.RUSAGE_SELF
    before = usage(whose).ru_maxrss
    return lambda: usage(whose).ru_maxrss - before > GROWTH_KIB


def _watch_deeds(send: Callable[[str], None]) -> None:
    """Tell what the verifier is about to do, so that what it is stopped for has a name. For show, never for safety."""
    last = [""]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event != last[0] and event.startswith(_NOTED):
            last[0] = event
            send(event)

    sys.addaudithook(hook)


def _stay_off_files() -> None:
    """Keep the compiler from opening a file of the source's name, to quote the line of a syntax error from."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and type(arguments[0]) is str and arguments[0] == FILENAME:
            raise FileNotFoundError

    sys.addaudithook(hook)


def _read(source: str) -> tuple[CodeType | Answer, Grade]:
    """The code of a verifier, or what is wrong with it, and what it may share."""
    try:
        tree = ast.parse(source, FILENAME)
        sharing = grade(tree)
        return compile(tree, FILENAME, "exec", dont_inherit=True), sharing
    except MemoryError:
        return (INVALID, "does not compile: too large or too deeply nested"), Grade.ORDINARY
    except (SyntaxError, ValueError, RecursionError, OverflowError) as error:
        return (INVALID, f"does not compile: {_told(error)}"), Grade.PLAIN


def _call(code: CodeType, response: str) -> Answer:
    """One call in a fresh namespace. No exception leaves."""
    execute, told, misfit, judged = exec, _failure, _misfit, _judged
    space: dict[str, Any] = {"__name__": "verifier", "__doc__": None}
    clear = space.clear
    try:
        try:
            execute(code, space)
            answer = misfit(space)
            if answer is None:
                answer = judged(space["evaluate"](response))
        except BaseException as error:
            answer = told(error)
        clear()  # breaks the cycle of functions and their globals
    except BaseException as error:  # raised by what it left behind
        answer = told(error)
    return answer


def _misfit(space: dict[str, Any]) -> Answer | None:
    """Why the source gives no function that can be called with a response and may return a bool."""
    if "evaluate" not in space:
        return INVALID, "defines no evaluate(response)"
    function = space["evaluate"]
    kind = type(function)
    if kind is not FunctionType:
        return None if callable(function) else (INVALID, f"evaluate is a {_name(kind)}, not a function")
    code = function.__code__
    for flag, name in _GENERATOR_FLAGS.items():
        if code.co_flags & flag:
            return INVALID, f"evaluate is {name}, not a function that returns True or False"
    needed = code.co_argcount - len(function.__defaults__ or ())
    needed += code.co_kwonlyargcount - len(function.__kwdefaults__ or ())
    if needed > 1 or not (code.co_argcount or code.co_flags & 0x04):
        return INVALID, f"evaluate must take one argument, the response, but takes {needed}"
    return None


def _judged(answer: object) -> Answer:
    if answer is True:
        return PASSED, ""
    if answer is False:
        return FAILED, ""
    return INVALID, f"returned {_name(type(answer))}, not True or False"


def _failure(error: BaseException) -> Answer:
    kind = type(error)
    if kind is MemoryError:
        return MEMORY, "ran out of its memory"
    if kind is ModuleNotFoundError and type(error.name) is str:  # type: ignore[attr-defined]
        name: str = error.name  # type: ignore[attr-defined]
        if name.partition(".")[0] in _REACHING:
            return FORBIDDEN, f"not allowed in the sandbox: import {name}"
        return ERROR, f"missing module {name}"
    return ERROR, _told(error)


def _told(error: BaseException) -> str:
    """Type and text of an exception, the text only where reading it runs no code of the verifier's."""
    arguments = BaseException.args.__get__(error)  # type: ignore[attr-defined]
    text = arguments[0] if arguments and type(arguments[0]) is str else ""
    return f"{_name(type(error))}: {text[:DETAIL]}" if text else _name(type(error))


def _name(kind: type) -> str:
    name: str = type.__dict__["__name__"].__get__(kind)
    return name[:60]
