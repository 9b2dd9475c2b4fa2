"""Attacks with a known outcome, run before a sandbox is believed in, and a verifier with known verdicts."""

from typing import NamedTuple


class Attack(NamedTuple):
    """A hostile verifier and the outcomes that show it was held."""

    name: str
    source: str
    held: tuple[str, ...]


def _attack(name: str, body: str, *held: str) -> Attack:
    lines = "".join(f"    {line}\n" for line in body.split("; "))
    return Attack(name, f"def evaluate(response):\n{lines}    return True\n", held or ("forbidden",))


ATTACKS = (
    _attack("reading a file", "open(response).read()"),
    _attack("writing a file", "open(response + '.new', 'w').write('x')"),
    _attack("reading a file by ctypes", "import ctypes; ctypes.CDLL(None).open(response.encode(), 0)"),
    _attack("a TCP connection", "import socket; socket.create_connection(('127.0.0.1', 9), 1)"),
    _attack("a UDP packet", "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 9))"),
    _attack("a fork", "import os; os.fork()"),
    _attack("a thread", "import threading; threading.Thread(target=print).start()"),
    _attack("a command", "import os; os.system('true')"),
    _attack("exec", "import os; os.execv('/bin/true', ['true'])"),
    _attack("a signal to its parent", "import os; os.kill(os.getppid(), 0)"),
    _attack("ptrace", "import ctypes, os; ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)"),
    _attack("too much memory", "b = bytearray(1 << 31)", "memory", "error"),
    _attack("a loop", "while True: pass", "timeout"),
    _attack("leaving", "import os; os._exit(0)", "error"),
    _attack("the result channel", "import os; os.write(3, b'x' * 1000)", "invalid"),
    _attack("the environment", "import os; return len(os.environ) > 1", "failed"),
)

# Reads what a verifier could have spoilt for others: a string's methods, a regular expression, JSON, counting.
CANARY = """
import json, re, string
from collections import Counter

def evaluate(response):
    words = re.findall(r"[a-z]+", json.loads(response)["text"].lower())
    return (
        len(words) == 4 and Counter(words).most_common(1)[0] == ("tit", 2)
        and sorted(set(words)) == ["for", "tat", "tit"] and "".join(filter(str.isalpha, "a-1")) == "a"
        and isinstance(response, str) and string.digits == "0123456789" and sum(map(int, "123")) == 6
        and any([0, 1]) and not all([0, 1]) and max(2, 3) == 3
    )
"""
CANARY_RESPONSES = ('{"text": "Tit for tat, tit"}', '{"text": "Tit for tat"}', '{"text": ')
CANARY_OUTCOMES = ("passed", "failed", "error")
