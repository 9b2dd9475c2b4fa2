"""What may share a process, and what not."""

import ast
import builtins
import collections
import importlib
import types

import pytest

from tasks import sandbox_gate as gate
from tasks.sandbox_gate import Grade, grade

NOT_PLAIN = [
    "import os",
    "import sys",
    "from re import enum",
    "from re import *",
    "import re as open",
    "import json.decoder",
    "from . import re",
    "import re\nre.enum.sys",
    "import re\nre.compile = 1",
    "import re\ndel re.compile",
    "import json\njson.codecs.open('x')",
    "import string\nstring.Formatter().get_field('0.__class__', [1], {})",
    "import collections\ncollections._sys",
    "().__class__.__subclasses__()",
    "(lambda: 0).__globals__",
    "(x for x in ()).gi_frame",
    "try:\n    1 / 0\nexcept Exception as e:\n    e.__traceback__",
    "getattr([], 'append')",
    "eval('1')",
    "exec('1')",
    "print(open)",
    "__import__('os')",
    "__builtins__",
    "globals()['x']",
    "type('X', (), {})",
    "class A: pass",
    "async def f(): pass",
    "with x: pass",
    "import functools\nfunctools.wraps(f)(g)",
    "import typing\ntyping.get_type_hints(f)",
    "match x:\n    case int(real=open): pass",
    "def open(): pass",
    "def f(__import__): pass",
    "import random",
    "import decimal\ndecimal.getcontext().prec = 3",
    "import calendar\ncalendar.setfirstweekday(3)",
]


@pytest.mark.parametrize("source", NOT_PLAIN)
def test_what_could_reach_further_than_its_own_names_is_not_plain(source: str) -> None:
    assert grade(ast.parse(source)) is not Grade.PLAIN


@pytest.mark.parametrize(
    "source",
    [
        "import string\nstring.n = 1",
        "import string\nsetattr(string, 'n', 1)",
        "import string\nstring.__dict__['n'] = 1",
        "import sys",
        "import os",
        "import traceback\nnext(traceback.walk_stack(None))[0].f_builtins['n'] = 1",
        "(x for x in ()).gi_frame.f_builtins['n'] = 1",
        "eval('1')",
        "import functools\nfunctools.update_wrapper(functools, f)",
        "from collections import abc\nabc.Sized.register(int)",
        "import decimal\ndecimal.getcontext().prec = 3",
    ],
)
def test_what_could_leave_a_trace_in_the_interpreter_is_intrusive(source: str) -> None:
    assert grade(ast.parse(source)) is Grade.INTRUSIVE


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import re\ndef evaluate(r):\n    return bool(re.search('a', r, re.I))", Grade.PLAIN),
        ("from collections import Counter\nx = Counter('a').most_common(1)", Grade.PLAIN),
        ("import datetime\ndatetime.datetime.strptime('1', '%d').year", Grade.PLAIN),
        ("try:\n    int('x')\nexcept ValueError as error:\n    raise", Grade.PLAIN),
        ("class A:\n    def __init__(self): self.x = 1", Grade.ORDINARY),
        ("import random\nrandom.random()", Grade.ORDINARY),
        ("type(1) is int", Grade.ORDINARY),
    ],
)
def test_what_honest_verifiers_do_keeps_them_together(source: str, expected: Grade) -> None:
    assert grade(ast.parse(source)) is expected


def test_no_module_container_or_door_is_reached_by_the_names_a_plain_verifier_may_use() -> None:
    """From all it may import, and all builtins it may name, attribute after attribute, without a call."""
    imported = [getattr(importlib.import_module(m), n) for m, names in gate._MODULES.items() for n in names.split()
                if hasattr(importlib.import_module(m), n)]  # fmt: skip
    waiting = [*imported, *(getattr(builtins, name) for name in gate._PLAIN_BUILTINS if hasattr(builtins, name))]
    seen: dict[int, object] = {}
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, int | float | str | bytes | types.BuiltinMethodType):
            continue
        seen[id(thing)] = thing
        waiting += [getattr(thing, name) for name in gate._PLAIN_ATTRIBUTES if hasattr(thing, name)]
    assert len(seen) > 200  # it did walk
    doors = (open, eval, exec, compile, getattr, setattr, globals, __import__, object, type)
    changeable = (dict, list, set, bytearray, collections.deque, types.ModuleType, types.FrameType)
    found = [thing for thing in seen.values() if any(thing is door for door in doors) or isinstance(thing, changeable)]
    assert found == []
