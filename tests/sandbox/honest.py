# ruff: noqa: E501 - a verifier a line reads better than one over four
"""Verifiers as a model writes them for instructions, and the verdicts worked out by hand: + passed, - failed, ! error."""

from textwrap import dedent
from typing import NamedTuple


class Honest(NamedTuple):
    """A verifier, responses, and a sign for each."""

    name: str
    source: str
    responses: tuple[str, ...]
    signs: str


def _honest(name: str, source: str, *responses: str, signs: str) -> Honest:
    return Honest(name, dedent(source).strip() + "\n", responses, signs)


def _line(name: str, expression: str, *responses: str, signs: str, imports: str = "") -> Honest:
    return _honest(name, f"{imports}\ndef evaluate(response):\n    return {expression}", *responses, signs=signs)


HONEST = [
    _line("at most five words", "len(response.split()) <= 5", "one two three", "a b c d e", "a b c d e f", "", signs="++-+"),
    _line("exactly two sentences", "len(re.findall(r'[.!?](?:\\s|$)', response)) == 2", "Hi. There!", "Hi.", "A. B. C.", signs="+--", imports="import re"),
    _line("all lower case", "response == response.lower()", "quiet", "Loud", "123", signs="+-+"),
    _line("all upper case", "response.isupper()", "LOUD 1", "Loud", "123", signs="+--"),
    _line("the letter e three times", "response.lower().count('e') == 3", "Eve ate", "eerie", "tree", signs="++-"),
    _line("no letter e", "'e' not in response.lower()", "a cat sat", "the cat", "", signs="+-+"),
    _line("ends with a question", "response.strip().endswith('?')", "Why? ", "Why.", signs="+-"),
    _line("quoted", "response.startswith('\"') and response.endswith('\"') and len(response) > 1", '"yes"', "no", '"', signs="+--"),
    _line("palindrome", "(lambda s: s == s[::-1])(''.join(filter(str.isalnum, response)).lower())", "Never odd or even", "Python", "", signs="+-+"),
    _line("sorted words", "response.split() == sorted(response.split(), key=str.lower)", "Ant bee Cat", "bee ant", signs="+-"),
    _line("three bullets", "sum(line.lstrip().startswith(('-', '*')) for line in response.splitlines()) == 3", "- a\n* b\n  - c", "- a\n- b", signs="+-"),
    _line("numbered from one", "[int(n) for n in re.findall(r'^(\\d+)\\.', response, re.M)] == [1, 2, 3]", "1. a\n2. b\n3. c", "1. a\n3. c", "2. a\n1. b\n3. c", signs="+--", imports="import re"),
    _line("an ISO date", "bool(re.fullmatch(r'\\d{4}-\\d{2}-\\d{2}', response.strip()))", "2024-02-30", "2024-2-3", signs="+-", imports="import re"),
    _line("unique words", "len(set(response.lower().split())) == len(response.split())", "a b c", "a b A", signs="+-"),
    _line("no punctuation", "not any(c in string.punctuation for c in response)", "plain text", "text.", "it's", signs="+--", imports="import string"),
    _line("ASCII", "all(ord(c) < 128 for c in response)", "plain", "café", signs="+-"),
    _line("has an emoji", "any(unicodedata.category(c) == 'So' for c in response)", "ok 😀", "ok :)", signs="+-", imports="import unicodedata"),
    _line("accents removed", "unicodedata.normalize('NFKD', response).encode('ascii', 'ignore').decode() == 'cafe'", "café", "cafe", "caffè", signs="++-", imports="import unicodedata"),
    _line("average word length", "statistics.mean(map(len, response.split())) > 4", "small words here", "a bc", "", signs="+-!", imports="import statistics"),
    _line("a square number of words", "math.isqrt(len(response.split())) ** 2 == len(response.split())", "a b c d", "a b", "", signs="+-+", imports="import math"),
    _line("wrapped at 20", "textwrap.fill(response, 20) == response", "short", "this line is a little too long for it", signs="+-", imports="import textwrap"),
    _line("first letters", "''.join(w[0] for w in response.split()).upper() == 'NASA'", "not a single apple", "not an apple", signs="+-"),
    _line("no double spaces", "'  ' not in response and '\\t' not in response", "a b", "a  b", "a\tb", signs="+--"),
    _line("between markers", "re.search(r'<<(?P<in>[^>]+)>>', response)['in'] == 'x'", "a <<x>> b", "a <<y>> b", "none", signs="+-!", imports="import re"),
    _line("escaped HTML", "html.unescape(response) != response", "a &amp; b", "a & b", signs="+-", imports="import html"),
    _line("close to a text", "difflib.SequenceMatcher(None, response, 'hello').ratio() > 0.7", "hallo", "world", signs="+-", imports="import difflib"),
    _line("one of two strings", "response in ('yes', 'no') and isinstance(response, str)", "yes", "maybe", signs="+-"),
    _line("every other word capitalised", "all(w.isupper() == (i % 2 == 1) for i, w in enumerate(response.split()))", "a B c D", "A b", signs="+-"),
    _line("a hash", "hashlib.md5(response.encode()).hexdigest().startswith('5')", "a", "hello", signs="-+", imports="import hashlib"),
    _line("longest run of a letter", "max((len(list(g)) for _, g in itertools.groupby(response)), default=0) <= 2", "aabb", "aaab", "", signs="+-+", imports="import itertools"),
    _line("product of digits", "functools.reduce(lambda a, b: a * b, (int(c) for c in response if c.isdigit()), 1) == 24", "2, 3 and 4", "24", signs="+-", imports="import functools"),
    _honest("a JSON object with two keys", """
        import json
        def evaluate(response):
            try:
                found = json.loads(response)
            except json.JSONDecodeError:
                return False
            return isinstance(found, dict) and set(found) == {"name", "age"} and isinstance(found["age"], int)
    """, '{"name": "a", "age": 3}', '{"name": "a"}', '["name", "age"]', '{"name": "a", "age": "3"}', "name: a", signs="+----"),
    _honest("each word at most twice", """
        from collections import Counter
        import string
        def clean(word):
            return word.strip(string.punctuation).lower()
        def evaluate(response: str) -> bool:
            counts = Counter(clean(word) for word in response.split())
            return all(count <= 2 for count in counts.values())
    """, "The cat, the hat", "no no No!", "", signs="+-+"),
    _honest("a helper within a helper", """
        def evaluate(response):
            def vowels(text):
                def is_vowel(c):
                    return c in "aeiou"
                return sum(1 for c in text if is_vowel(c))
            return vowels(response.lower()) % 2 == 0
    """, "book", "cat", "", signs="+-+"),
    _honest("imports inside", """
        def evaluate(response):
            import re as regular
            from datetime import datetime
            found = regular.search(r"\\d{2}/\\d{2}/\\d{4}", response)
            if not found:
                return False
            try:
                datetime.strptime(found.group(), "%d/%m/%Y")
                return True
            except ValueError:
                return False
    """, "on 29/02/2024", "on 30/02/2024", "on monday", signs="+--"),
    _honest("a class with state", """
        class Checker:
            def __init__(self, limit):
                self.limit, self.seen = limit, []
            def feed(self, word):
                self.seen.append(word)
                return len(self.seen) <= self.limit
        checker = Checker(2)
        def evaluate(response):
            return all(checker.feed(word) for word in response.split())
    """, "a b", "a b c", "c d", signs="+-+"),
    _honest("a dataclass", """
        from dataclasses import dataclass, field
        @dataclass
        class Tally:
            counts: dict = field(default_factory=dict)
            def add(self, key): self.counts[key] = self.counts.get(key, 0) + 1
        def evaluate(response):
            tally = Tally()
            for c in response: tally.add(c)
            return tally.counts.get("a", 0) == 2
    """, "aab", "ab", signs="+-"),
    _honest("rhyming lines", """
        def evaluate(response):
            lines = [line.strip(" .,!") for line in response.strip().split("\\n") if line.strip()]
            return len(lines) == 2 and lines[0][-2:] == lines[1][-2:]
    """, "The cat\nsat.", "The dog\nsat.", "one", signs="+--"),
    _honest("an error for a missing list", """
        def evaluate(response):
            first = response.split(":")[1]
            return "," in first
    """, "items: a, b", "items: a", "nothing", signs="+-!"),
    _honest("a division by zero", """
        def evaluate(response):
            return len(response) / len(response.split()) > 3
    """, "abcdef gh", "a b", "", signs="+-!"),
    _honest("matched by case", """
        def evaluate(response):
            match response.split():
                case [first, *rest] if first == "Dear" and rest:
                    return True
                case _:
                    return False
    """, "Dear all", "Dear", "Hi all", signs="+--"),
    _honest("global counter", """
        calls = 0
        def evaluate(response):
            global calls
            calls += 1
            return calls == 1
    """, "a", "b", "c", signs="+++"),
    _honest("cached recursion", """
        from functools import lru_cache
        @lru_cache(maxsize=None)
        def fibonacci(n):
            return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)
        def evaluate(response):
            return len(response) in {fibonacci(n) for n in range(10)}
    """, "abc", "abcd", "abcde", signs="+-+"),
    _honest("typed signature", """
        from __future__ import annotations
        from typing import List, Optional
        def words(text: str, least: Optional[int] = None) -> List[str]:
            return [w for w in text.split() if least is None or len(w) >= least]
        def evaluate(response: str, least: int = 4) -> bool:
            return bool(words(response, least))
    """, "tiny bits", "a bc", signs="+-"),
    _honest("haiku by vowel groups", """
        import re
        def syllables(word):
            return max(1, len(re.findall(r"[aeiouy]+", word.lower())))
        def evaluate(response):
            lines = [l for l in response.split("\\n") if l.strip()]
            return [sum(map(syllables, l.split())) for l in lines] == [1, 2, 1]
    """, "frog\nold pond\nsplash", "frog\npond\nsplash", signs="+-"),
    _honest("a table in Markdown", r"""
        import re
        def evaluate(response):
            rows = [l for l in response.splitlines() if re.match(r"^\s*\|.*\|\s*$", l)]
            return len(rows) >= 3 and bool(re.match(r"^\s*\|(\s*:?-+:?\s*\|)+\s*$", rows[1]))
    """, "|a|b|\n|---|:-:|\n|1|2|", "|a|b|\n|1|2|\n|3|4|", "a,b", signs="+--"),
    _honest("catching too much", """
        def evaluate(response):
            try:
                return int(response) % 2 == 0
            except:
                return False
    """, "4", "5", "four", signs="+--"),
    _honest("self-test under __main__", """
        def evaluate(response):
            return response.isdigit()
        if __name__ == "__main__":
            raise SystemExit("not here")
    """, "12", "1.2", signs="+-"),
    _honest("evaluates the response", """
        def evaluate(response):
            try:
                return eval(response) == 4
            except Exception:
                return False
    """, "2 + 2", "2 + 3", "two", signs="+--"),
    _honest("a traceback through the library", """
        import json, traceback
        def evaluate(response):
            try:
                json.loads(response)
            except ValueError:
                return "JSONDecodeError" in traceback.format_exc()
            return False
    """, "{", "{}", signs="+-"),
    _honest("an exception in a finalizer", """
        import json
        def late():
            try:
                yield
            finally:
                json.loads("{")
        def evaluate(response):
            waiting = late()
            next(waiting)
            loop = [waiting]
            loop.append(loop)
            return response == "a"
    """, "a", "b", signs="+-"),
    _honest("seeded chance", """
        import random
        def evaluate(response):
            random.seed(len(response))
            return random.randint(0, 0) == 0
    """, "abc", signs="+"),
    _honest("surrogates and NULs", """
        def evaluate(response):
            return any(0xD800 <= ord(c) <= 0xDFFF or c == "\\0" for c in response)
    """, "a\ud800b", "a\0b", "ab", signs="++-"),
]  # fmt: skip
