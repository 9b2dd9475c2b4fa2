# ruff: noqa: E501 - a verifier a line reads better than one over four
"""Hostile verifiers, and the outcomes that show each was held. All are called with two responses, "one" and "two".

`@NAME@` in a source is replaced by what the test prepared: a file with a secret, a port somebody listens on, ...
"""

from textwrap import dedent
from typing import NamedTuple


class Attack(NamedTuple):
    """A hostile verifier."""

    name: str
    source: str
    outcomes: tuple[tuple[str, ...], ...]  # the pairs of outcomes that are right


def _each(name: str, outcome: str, source: str) -> Attack:
    pairs = [one.split(",") for one in outcome.split()]
    return Attack(name, dedent(source), tuple((pair[0], pair[-1]) for pair in pairs))


def _body(name: str, outcome: str, body: str) -> Attack:
    return _each(name, outcome, f"def evaluate(response):\n{_indented(body)}")


def _indented(body: str) -> str:
    return "".join(f"    {line}\n" for line in dedent(body).strip("\n").splitlines())


LOOPS = [
    _body("loop in Python", "timeout", "while True: pass"),
    _body("loop that catches everything", "timeout", """
        while True:
            try:
                while True: pass
            except BaseException:
                pass
    """),
    _body("loop in C", "timeout", "return sum(range(10**12)) > 0"),
    _body("loop in a regular expression", "timeout", "import re\nreturn bool(re.match(r'(a+)+$', 'a' * 64 + 'b'))"),
    _body("one enormous number", "timeout", "return 7 ** 10**9 > 0"),
    _body("number to text", "timeout error", "import sys\nsys.set_int_max_str_digits(0)\nreturn len(str(3**9000000)) > 0"),
    _body("sleeping", "timeout", "import time\ntime.sleep(1000)\nreturn True"),
    _body("waiting for a lock", "timeout", "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()"),
    _body("endless product", "timeout", "import itertools\nreturn any(itertools.repeat(0))"),
    _body("loop in a sort key", "timeout", "def key(x):\n    while 1: pass\nreturn sorted([1, 2], key=key) == []"),
    _each("loop at import", "timeout", "while True:\n    pass\ndef evaluate(response):\n    return True\n"),
    _each("loop in a finalizer", "passed,timeout", """
        def left():
            try:
                yield
            finally:
                while True: pass
        kept = left()
        next(kept)
        loop = [kept]
        loop.append(loop)
        def evaluate(response):
            return True
    """),
    _each("loop in __del__", "timeout", """
        class Late:
            def __del__(self):
                while True: pass
        kept = Late()
        def evaluate(response):
            return True
    """),
    _body("alarm that it sets itself and loops on", "timeout", """
        import signal
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1)
        while True: pass
    """),
    _body("ignoring all signals", "timeout", """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
    """),
]  # fmt: skip

MEMORY = [
    _body("one large block", "memory", "return len(bytearray(1 << 40)) > 0"),
    _body("growing text", "memory timeout error", "text = 'a'\nwhile True: text += text"),
    _body("growing list", "memory timeout error", "rows = []\nwhile True: rows.append(bytearray(1 << 20))"),
    _body("list of itself", "memory timeout error", "rows = [0]\nwhile True: rows = rows * 2"),
    _body("large text from a format", "memory error", "return bool('%0999999999999d' % 1)"),
    _body("repeated text", "memory", "return bool('x' * (1 << 38))"),
    _body("a billion permutations kept", "memory timeout", "import itertools\nreturn len(list(itertools.permutations(range(13)))) > 1"),
    _body("recursion", "error", "return evaluate(response)"),
    _body("recursion without a limit", "error memory timeout", "import sys\nsys.setrecursionlimit(10**9)\nreturn evaluate(response)"),
    _body("recursion in a parser", "error", "import json\nreturn json.loads('[' * 100000)"),
    _body("crash of the interpreter", "error", "import ctypes\nreturn ctypes.string_at(0)"),
    _each("deep nesting of brackets", "invalid", "x = " + "(" * 5000 + ")" * 5000 + "\ndef evaluate(response): return True\n"),
    _each("deep nesting of signs", "invalid", "x = " + "-" * 200_000 + "1\ndef evaluate(response): return True\n"),
    _each("deep nesting of calls", "invalid error", "x = " + "f" + "()" * 50_000 + "\ndef evaluate(response): return True\n"),
    _each("constant folding", "passed invalid timeout", "x = (1 << 100) ** 100 ** 2\ndef evaluate(response): return True\n"),
    _each("long source", "invalid memory timeout", "x = [" + "[]," * 3_000_000 + "]\ndef evaluate(response): return 1\n"),
]  # fmt: skip

LEAVING = [
    _body("sys.exit", "error", "import sys\nsys.exit(0)"),
    _body("SystemExit that is true", "error", "raise SystemExit(True)"),
    _body("os._exit", "error", "import os\nos._exit(0)"),
    _body("os._exit with a status", "error", "import os\nos._exit(4)"),
    _body("os.abort", "forbidden error", "import os\nos.abort()"),
    _body("KeyboardInterrupt", "error", "raise KeyboardInterrupt"),
    _body("GeneratorExit", "error", "raise GeneratorExit"),
    _each("sys.exit at import", "error", "import sys\nsys.exit()\n"),
    _body("atexit", "passed", "import atexit, os\natexit.register(os._exit, 3)\nreturn True"),
    _body("killing its parent", "forbidden", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nreturn True"),
    _body("killing everybody", "forbidden", "import os, signal\nos.kill(-1, signal.SIGKILL)\nreturn True"),
    _body("killing its group", "forbidden", "import os, signal\nos.killpg(0, signal.SIGKILL)\nreturn True"),
    _body("killing itself", "forbidden", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nreturn True"),
    _body("stopping itself", "forbidden", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nreturn True"),
    _body("raising a signal", "forbidden", "import signal\nsignal.raise_signal(signal.SIGSEGV)\nreturn True"),
]  # fmt: skip

PROCESSES = [
    _body("fork", "forbidden", "import os\nos.fork()\nreturn True"),
    _body("fork bomb", "forbidden", "import os\nwhile True: os.fork()"),
    _body("fork that catches everything", "forbidden", "import os\ntry:\n    os.fork()\nexcept BaseException:\n    pass\nreturn True"),
    _body("thread", "forbidden", "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\nreturn True"),
    _body("low-level thread", "forbidden", "import _thread\n_thread.start_new_thread(print, ())\nreturn True"),
    _body("command", "forbidden", "import os\nreturn os.system('sleep @MARK@ &') == 0"),
    _body("subprocess", "forbidden", "import subprocess\nsubprocess.Popen(['/bin/sleep', '@MARK@'])\nreturn True"),
    _body("subprocess with pipes", "forbidden", "import subprocess\nreturn subprocess.check_output(['/bin/true']) == b''"),
    _body("exec", "forbidden", "import os\nos.execv('/bin/sleep', ['sleep', '@MARK@'])"),
    _body("posix_spawn", "forbidden", "import os\nos.posix_spawn('/bin/sleep', ['sleep', '@MARK@'], {})\nreturn True"),
    _body("daemon", "forbidden", """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(@MARK@)
        return True
    """),
    _body("setsid", "forbidden", "import os\nos.setsid()\nreturn True"),
    _body("multiprocessing", "forbidden", "import multiprocessing\nmultiprocessing.Process(target=print).start()\nreturn True"),
    _body("fork by ctypes", "forbidden", "import ctypes\nctypes.CDLL(None).fork()\nreturn True"),
    _body("raw system call", "forbidden", "import ctypes\nctypes.CDLL(None).syscall(57)\nctypes.CDLL(None).syscall(220)\nreturn True"),
    _body("system call of another ABI", "forbidden", "import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)\nreturn True"),
    _body("system call of another architecture", "forbidden error", """
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=7)
        page.write(bytes.fromhex('b802000000cd80c3'))  # mov eax, 2; int 0x80; ret: fork, by the 32-bit entry
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
        return True
    """),
    _body("io_uring", "forbidden", "import ctypes\nctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(200))\nreturn True"),
    _body("ptrace its parent", "forbidden", "import ctypes, os\nctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)\nreturn True"),
    _body("new namespaces", "forbidden", "import ctypes\nctypes.CDLL(None).unshare(0x10000000)\nreturn True"),
    _body("new user", "forbidden", "import os\nos.setuid(0)\nreturn True"),
]  # fmt: skip

FILES = [
    _body("reading a file", "forbidden", "return 'secret' in open('@FILE@').read()"),
    _body("reading a file by os.open", "forbidden", "import os\nreturn os.read(os.open('@FILE@', 0), 99) != b''"),
    _body("reading a file by pathlib", "forbidden", "import pathlib\nreturn pathlib.Path('@FILE@').read_text() != ''"),
    _body("reading a file by ctypes", "forbidden", "import ctypes\nctypes.CDLL(None).open(b'@FILE@', 0)\nreturn True"),
    _body("reading a file and telling of it", "forbidden", "try:\n    raise ValueError(open('@FILE@').read())\nexcept OSError:\n    return True"),
    _body("writing a file", "forbidden", "open('@NEW@', 'w').write('x')\nreturn True"),
    _body("a temporary file", "forbidden", "import tempfile\ntempfile.NamedTemporaryFile()\nreturn True"),
    _body("a temporary folder", "forbidden", "import tempfile\ntempfile.mkdtemp()\nreturn True"),
    _body("removing a file", "forbidden", "import os\nos.unlink('@FILE@')\nreturn True"),
    _body("renaming a file", "forbidden", "import os\nos.rename('@FILE@', '@NEW@')\nreturn True"),
    _body("making a folder", "forbidden", "import os\nos.makedirs('@NEW@')\nreturn True"),
    _body("removing a tree", "forbidden error", "import shutil\nshutil.rmtree('@FOLDER@')\nreturn True"),
    _body("links", "forbidden", "import os\nos.symlink('@FILE@', '@NEW@')\nreturn True"),
    _body("permissions", "forbidden", "import os\nos.chmod('@FILE@', 0o777)\nreturn True"),
    _body("listing a folder", "forbidden", "import os\nreturn bool(os.listdir('/'))"),
    _body("whether a file is there", "failed", "import os\nreturn os.path.exists('@FILE@')"),
    _body("/proc/self", "forbidden", "return bool(open('/proc/self/environ').read())"),
    _body("/proc of its parent", "forbidden", "import os\nreturn bool(open(f'/proc/{os.getppid()}/mem', 'rb'))"),
    _body("its own memory", "forbidden", "return open('/proc/self/mem', 'r+b').write(b'x') == 1"),
    _body("the environment", "failed", "import os\nreturn 'hunter2' in str(os.environ) or 'PATH' in os.environ"),
    _body("telling the environment", "error", "import os\nraise ValueError(str(dict(os.environ)))"),
    _body("anonymous file", "forbidden", "import os\nos.memfd_create('x')\nreturn True"),
]  # fmt: skip

NETWORK = [
    _body("TCP", "forbidden", "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 2)\nreturn True"),
    _body("UDP", "forbidden", "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))\nreturn True"),
    _body("Unix socket", "forbidden", "import socket\nsocket.socket(socket.AF_UNIX).connect('@UNIX@')\nreturn True"),
    _body("abstract socket", "forbidden", "import socket\nsocket.socket(socket.AF_UNIX).bind(chr(0) + 'x')\nreturn True"),
    _body("raw socket", "forbidden", "import socket\nsocket.socket(17, 3, 3)\nreturn True"),
    _body("listening", "forbidden", "import socket\nsocket.socket().listen()\nreturn True"),
    _body("looking up a name", "forbidden", "import socket\nsocket.gethostbyname('example.com')\nreturn True"),
    _body("urllib", "forbidden", "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@PORT@')\nreturn True"),
    _body("http.client", "forbidden", "import http.client\nhttp.client.HTTPConnection('127.0.0.1', @PORT@).request('GET', '/')"),
    _body("socketpair", "forbidden", "import socket\nsocket.socketpair()\nreturn True"),
]  # fmt: skip

CHANNEL = [
    _body("flood of standard output", "timeout", "while True: print('x' * 10000)"),
    _body("much output", "passed", "import sys\nfor _ in range(2000): sys.stderr.write('x' * 1000)\nreturn True"),
    _body("flood of the result channel", "invalid", "import os\nwhile True: os.write(3, b'x' * 4096)"),
    _body("a few bytes in the result channel", "invalid", "import os\nos.write(3, b'x')\nreturn True"),
    _body("forged record", "invalid", "import os\nos.write(3, b'?' * 16 + b'V' + bytes(8) + bytes(2) + bytes(160))\nreturn False"),
    _body("forged JSON", "invalid", "import os\nos.write(3, b'[[\"passed\", \"\"]]')\nreturn False"),
    _body("closing all files", "passed", "import os\nos.closerange(0, 99)\nreturn True"),
    _body("closing the result channel", "error", "import os\nos.close(3)\nreturn True"),
    _body("another file as result channel", "error", "import os\nos.dup2(1, 3)\nreturn True"),
    _body("closing standard output", "passed failed error", "import sys\nsys.stdout.close()\nsys.stderr.close()\nreturn True"),
    _body("reading standard input", "error", "return input() == ''"),
    _body("its own records, then a loop", "passed", """
        import sys, struct, os
        frame = sys._getframe()
        while 'number' not in frame.f_locals or 'start' not in frame.f_locals: frame = frame.f_back
        token, number = frame.f_locals['start'].token, frame.f_locals['number']
        for call in range(2):
            os.write(3, struct.pack('>16scIIBB160s', token, b'V', number, call, 0, 0, b''))
        while True: pass
    """),
    _body("its own records, then its death", "passed", """
        import sys, struct, os
        frame = sys._getframe()
        while 'number' not in frame.f_locals or 'start' not in frame.f_locals: frame = frame.f_back
        token, number = frame.f_locals['start'].token, frame.f_locals['number']
        for call in range(2):
            os.write(3, struct.pack('>16scIIBB160s', token, b'V', number, call, 0, 0, b''))
        os.kill(os.getppid(), 9)
    """),
    _body("records for another verifier", "invalid passed", """
        import sys, struct, os
        frame = sys._getframe()
        token = b''
        while frame:
            for value in frame.f_locals.values():
                if type(getattr(value, 'token', None)) is bytes: token = value.token
            frame = frame.f_back
        for verifier in range(9):
            os.write(3, struct.pack('>16scIIBB160s', token, b'E', verifier, 0, 0, 0, b''))
            os.write(3, struct.pack('>16scIIBB160s', token, b'V', verifier, 0, 0, 0, b''))
        return True
    """),
]  # fmt: skip

ODD = [
    _body("the text True", "invalid", "return 'True'"),
    _body("one", "invalid", "return 1"),
    _body("None", "invalid", "pass"),
    _body("a float", "invalid", "return 1.0"),
    _body("NotImplemented", "invalid", "return NotImplemented"),
    _body("a class that is true", "invalid", "class Yes:\n    def __bool__(self): return True\n    def __eq__(self, other): return True\n    __hash__ = None\nreturn Yes()"),
    _body("an int called bool", "invalid", "return type('bool', (int,), {'__repr__': lambda s: 'True'})(1)"),
    _body("an object that lies about its class", "invalid", "class Lie:\n    __class__ = bool\nreturn Lie()"),
    _body("an object that explodes", "invalid", """
        class Mine:
            def __getattribute__(self, name): raise SystemExit
            __repr__ = __bool__ = __eq__ = __str__ = __hash__ = lambda *_: 1 / 0
        return Mine()
    """),
    _body("a metaclass that explodes", "invalid", """
        class Meta(type):
            def __getattribute__(cls, name): raise SystemExit
        class Mine(metaclass=Meta): pass
        return Mine()
    """),
    _body("a generator", "invalid", "yield True"),
    _each("a coroutine", "invalid", "async def evaluate(response):\n    return True\n"),
    _each("an asynchronous generator", "invalid", "async def evaluate(response):\n    yield True\n"),
    _body("a coroutine returned", "invalid", "async def later(): return True\nreturn later()"),
    _body("a generator returned", "invalid", "return (x for x in [True])"),
    _each("no function", "invalid", "evaluate = 3\n"),
    _each("no evaluate", "invalid", "def check(response):\n    return True\n"),
    _each("evaluate is None", "invalid", "evaluate = None\n"),
    _each("two arguments", "invalid", "def evaluate(response, other):\n    return True\n"),
    _each("no argument", "invalid", "def evaluate():\n    return True\n"),
    _each("a class", "invalid", "class evaluate:\n    def __init__(self, response): pass\n"),
    _each("other language", "invalid", "function evaluate(response) { return true; }\n"),
    _each("empty", "invalid", ""),
    _each("NUL in the source", "invalid", "def evaluate(response):\n    return '\0' == ''\n"),
    _each("surrogate in the source", "invalid", "def evaluate(response):\n    return '\ud800' == ''\n"),
    _body("exception with an evil text", "error", """
        class Bad(Exception):
            def __str__(self): raise SystemExit
            __repr__ = __str__
        raise Bad('text')
    """),
    _body("exception with an enormous text", "error memory", "raise ValueError('x' * 50_000_000)"),
    _body("exception with an odd text", "error", "raise ValueError('\\ud800\\0\\x1b[31m\\n')"),
    _body("exception from a metaclass", "error", """
        class Meta(type):
            def __getattribute__(cls, name): raise SystemExit
        class Bad(Exception, metaclass=Meta): pass
        raise Bad
    """),
    _body("exception of 10,000 causes", "error", """
        error = None
        for number in range(10_000):
            fresh = ValueError(number)
            fresh.__cause__ = error
            error = fresh
        raise error
    """),
    _body("evaluating the response", "error", "return eval(response)"),
]  # fmt: skip

TAMPERING = [
    _body("patching builtins", "passed error invalid", "import builtins\nbuiltins.len = builtins.isinstance = builtins.type = lambda *_: 7\nreturn True"),
    _body("emptying builtins", "passed error", "import builtins\nvars(builtins).clear()\nreturn True"),
    _body("patching json", "passed", "import json\njson.loads = json.dumps = lambda *_, **__: 'forged'\nreturn True"),
    _body("patching re", "passed", "import re\nre.match = re.search = re.findall = lambda *_: None\nreturn True"),
    _body("patching string", "passed", "import string\nstring.punctuation = ''\nreturn True"),
    _body("patching os", "passed error", "import os\nos.write = os._exit = os.read = os.fork = None\nreturn True"),
    _body("patching struct", "passed", "import struct\nstruct.Struct = struct.pack = None\nreturn True"),
    _body("emptying sys.modules", "passed error", "import sys\nsys.modules.clear()\nreturn True"),
    _body("an import hook", "passed error", "import sys\nsys.meta_path.insert(0, None)\nsys.path.append('@FOLDER@')\nreturn True"),
    _body("importing what it wrote", "error forbidden", "import sys\nsys.path.append('@FOLDER@')\nimport planted\nreturn True"),
    _body("walking frames", "passed failed", """
        import sys
        frame = sys._getframe()
        while frame.f_back: frame = frame.f_back
        frame.f_globals.clear()
        return True
    """),
    _body("walking the garbage collector", "passed error", """
        import gc
        for thing in gc.get_objects():
            if type(thing) is dict and 'passed' in str(list(thing)[:9]): thing.clear()
            if type(thing) is list: thing.clear()
        return True
    """),
    _body("tracing", "passed error failed", "import sys\nsys.settrace(lambda *_: 1 / 0)\nsys.setprofile(lambda *_: 1 / 0)\nreturn True"),
    _body("an audit hook", "passed error", "import sys\ndef hook(*_): raise SystemExit\nsys.addaudithook(hook)\nreturn True"),
    _body("writing into True", "passed failed error invalid", "import ctypes\nctypes.memset(id(True) + 24, 0, 4)\nreturn True"),
    _body("writing into small numbers", "passed failed error", "import ctypes\nfor number in range(200): ctypes.memset(id(number) + 24, 9, 4)\nreturn True"),
    _body("the random generator", "passed", "import random\nrandom.seed(1)\nrandom.random = lambda: 0\nreturn True"),
    _body("the recursion limit", "passed error", "import sys\nsys.setrecursionlimit(40)\nreturn True"),
    _body("no collection", "passed", "import gc\ngc.collect = None\ngc.disable()\nreturn True"),
    _body("the exception hook", "error", "import sys\nsys.excepthook = sys.unraisablehook = lambda *_: 1 / 0\nraise ValueError"),
    _body("the harness by name", "passed error", """
        import sys
        for name in list(sys.modules):
            if 'sandbox' in name or name == '__main__':
                vars(sys.modules[name]).clear()
        return True
    """),
]  # fmt: skip

ATTACKS = [*LOOPS, *MEMORY, *LEAVING, *PROCESSES, *FILES, *NETWORK, *CHANNEL, *ODD, *TAMPERING]
