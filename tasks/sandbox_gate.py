"""How far a verifier must be kept from others, by reading its syntax: for speed only, the walls stand in any case.

Runs in the sandbox's child program, standard library only. What is plain can neither touch the interpreter, nor a
module, nor another verifier's objects: it may share a process with other plain ones. Each list says what is allowed.
"""

import ast
import builtins
from enum import IntEnum

__all__ = ["Grade", "grade"]


class Grade(IntEnum):
    """What a verifier may share."""

    PLAIN = 0  # a process with other plain verifiers
    ORDINARY = 1  # a process with its own calls only
    INTRUSIVE = 2  # nothing: it could leave a trace in the interpreter that its next call would see


def _words(text: str) -> set[str]:
    return set(text.split())


_STATEMENTS = (
    ast.Module, ast.FunctionDef, ast.Return, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.While, ast.If,
    ast.Raise, ast.Try, ast.Assert, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Expr, ast.Pass, ast.Break,
    ast.Continue, ast.Delete, ast.Match, ast.match_case, ast.pattern, ast.ExceptHandler, ast.arguments, ast.arg,
    ast.keyword, ast.alias,
)  # fmt: skip
_EXPRESSIONS = (
    ast.BoolOp, ast.NamedExpr, ast.BinOp, ast.UnaryOp, ast.Lambda, ast.IfExp, ast.Dict, ast.Set, ast.ListComp,
    ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Compare, ast.Call, ast.FormattedValue, ast.JoinedStr, ast.Constant,
    ast.Attribute, ast.Subscript, ast.Starred, ast.Name, ast.List, ast.Tuple, ast.Slice, ast.comprehension,
    ast.expr_context, ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.Yield,
)  # fmt: skip
_PLAIN_NODES = (*_STATEMENTS, *_EXPRESSIONS)

# Modules of which a plain verifier may use these names and no others. None of them changes what the next one sees.
_MODULES = {
    "re": "compile search match fullmatch findall finditer split sub subn escape error Pattern Match "
    "A ASCII I IGNORECASE M MULTILINE S DOTALL U UNICODE X VERBOSE",
    "json": "loads dumps JSONDecodeError",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits hexdigits octdigits punctuation printable "
    "whitespace capwords",
    "math": "sqrt floor ceil log log2 log10 exp pow pi e isclose gcd lcm factorial fabs isnan isinf isqrt trunc prod "
    "comb perm fsum hypot inf nan",
    "collections": "Counter defaultdict deque namedtuple OrderedDict ChainMap",
    "itertools": "chain combinations permutations product groupby islice accumulate count cycle repeat takewhile "
    "dropwhile zip_longest pairwise starmap tee compress filterfalse from_iterable",
    "functools": "reduce partial lru_cache cache cmp_to_key",
    "unicodedata": "normalize category name combining east_asian_width bidirectional numeric lookup",
    "textwrap": "dedent wrap fill shorten indent",
    "datetime": "datetime date time timedelta timezone strptime strftime fromisoformat isoformat weekday year month "
    "day hour minute second days total_seconds utc",
    "statistics": "mean median mode stdev pstdev variance fmean",
    "difflib": "SequenceMatcher ratio get_close_matches",
    "html": "escape unescape",
    "hashlib": "md5 sha1 sha256 sha512 hexdigest digest",
    "typing": "Any List Dict Tuple Set Optional Union Callable Iterable Iterator Sequence Mapping",
    "__future__": "annotations",
}
_METHODS = {
    name
    for kind in (str, bytes, int, float, list, dict, set, frozenset, tuple, range)
    for name in dir(kind)
    if not name.startswith("_")
} | _words(
    "group groups groupdict start end span string lastindex most_common elements subtract total appendleft extendleft "
    "popleft rotate maxlen args msg pos lineno colno move_to_end"
)
_PLAIN_ATTRIBUTES = _METHODS | {name for names in _MODULES.values() for name in names.split()}
_OPEN_BUILTINS = _words(
    "__import__ open eval exec compile globals locals vars getattr setattr delattr hasattr dir object super "
    "classmethod staticmethod property memoryview input breakpoint help id exit quit license credits copyright type "
    "aiter anext __build_class__ __loader__ __spec__ __debug__ __doc__ __package__"
)
_PLAIN_BUILTINS = set(dir(builtins)).difference(_OPEN_BUILTINS)

# Of these nothing that a verifier does outlives its call, though it may reach further than a plain one.
_ORDINARY_MODULES = {
    *_MODULES, "abc", "ast", "base64", "bisect", "calendar", "cmath", "contextlib", "copy", "csv", "dataclasses",
    "decimal", "enum", "fractions", "hashlib", "heapq", "io", "numbers", "operator", "pprint", "random",
    "time", "xml.etree.ElementTree", "zlib", "binascii", "hmac", "struct", "traceback", "urllib.parse", "html.parser",
    "numpy", "collections.abc",
}  # fmt: skip
_ORDINARY_DUNDERS = _words(
    "__init__ __name__ __str__ __repr__ __len__ __iter__ __next__ __contains__ __getitem__ __eq__ __hash__ __lt__ "
    "__call__ __enter__ __exit__ __post_init__ __main__ __bool__ __le__ __gt__ __ge__ __add__ __doc__"
)
_INTRUSIVE_BUILTINS = {
    "__import__", "eval", "exec", "compile", "globals", "locals", "vars", "getattr", "setattr", "delattr", "open",
    "__builtins__", "__loader__", "__spec__", "breakpoint", "input", "__build_class__",
}  # fmt: skip
_INTRUSIVE_ATTRIBUTES = {
    "modules", "attrgetter", "methodcaller", "get_field", "register", "update_wrapper", "setfirstweekday", "setcontext",
    "field_size_limit", "sys", "os", "builtins", "walk_stack", "walk_tb", "tb_frame", "f_back", "f_globals", "f_locals",
    "f_builtins", "gi_frame", "cr_frame", "ag_frame",
}  # fmt: skip


def grade(tree: ast.Module) -> Grade:
    """The widest sharing that is safe for a verifier of this syntax."""
    nodes = list(ast.walk(tree))
    if all(map(_is_plain, nodes)):
        return Grade.PLAIN
    return Grade.ORDINARY if all(map(_is_ordinary, nodes)) else Grade.INTRUSIVE


def _is_plain(node: ast.AST) -> bool:
    if not isinstance(node, _PLAIN_NODES):
        return False
    if isinstance(node, ast.Attribute):
        return node.attr in _PLAIN_ATTRIBUTES and isinstance(node.ctx, ast.Load)
    if isinstance(node, ast.Name):
        return _is_plain_name(node.id)
    if isinstance(node, ast.Import):
        return all(item.name in _MODULES for item in node.names) and all(map(_is_plain_alias, node.names))
    if isinstance(node, ast.ImportFrom):
        names = _MODULES.get(node.module or "", "").split()
        return not node.level and all(item.name in names and _is_plain_alias(item) for item in node.names)
    if isinstance(node, ast.MatchClass):  # reads attributes by name
        return not node.kwd_attrs
    return _has_plain_names(node)


def _is_plain_name(name: str) -> bool:
    return name == "__name__" or (
        not name.startswith("__") and (name in _PLAIN_BUILTINS or not hasattr(builtins, name))
    )


def _is_plain_alias(item: ast.alias) -> bool:
    return item.asname is None or _is_plain_name(item.asname)


def _has_plain_names(node: ast.AST) -> bool:
    """Whatever else binds a name: functions, arguments, handlers, patterns."""
    bound = [getattr(node, field, None) for field in ("name", "arg", "rest")]
    declared = getattr(node, "names", [])
    return all(_is_plain_name(name) for name in [*bound, *declared] if isinstance(name, str))


def _is_ordinary(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        own = isinstance(node.value, ast.Name) and node.value.id == "self"
        private = node.attr.startswith("_") and not own
        return (
            (isinstance(node.ctx, ast.Load) or own)
            and (not private or node.attr in _ORDINARY_DUNDERS)
            and node.attr not in _INTRUSIVE_ATTRIBUTES
        )
    if isinstance(node, ast.Name):
        return node.id not in _INTRUSIVE_BUILTINS and not (node.id == "self" and isinstance(node.ctx, ast.Store))
    if isinstance(node, ast.Import):
        return all(item.name in _ORDINARY_MODULES for item in node.names)
    if isinstance(node, ast.ImportFrom):
        inner = _INTRUSIVE_ATTRIBUTES.isdisjoint(item.name for item in node.names)
        return node.module in _ORDINARY_MODULES and not node.level and inner
    return not isinstance(node, ast.AsyncFunctionDef | ast.Await)
