"""Settings as a form: the schema that the Prefect UI draws one from, each field with what its source says of it.

A field is described by the comment behind it; the code stays the only place that says it.
"""

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any

from prefect import Flow
from prefect.utilities.callables import parameter_schema
from pydantic import BaseModel


def form_of(flow: "Flow[..., Any]", config_class: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a flow's parameters, for Prefect to show and to check them by."""
    schema: dict[str, Any] = parameter_schema(flow.fn).model_dump()
    for settings in settings_under(config_class):
        definition = schema["definitions"].get(settings.__name__, {})
        if told := inspect.getdoc(settings):
            definition["description"] = told
        for name, comment in comments_of(settings).items():
            if name in definition.get("properties", {}):
                definition["properties"][name].setdefault("description", comment)
    formed: dict[str, Any] = _any_of(schema)
    return formed


def _any_of(part: Any) -> Any:
    """The schema with `anyOf` for `oneOf`.

    Prefect checks a deployment's parameters without what is required: kinds that differ in that alone are all valid.
    """
    if isinstance(part, dict):
        kept = {name: value for name, value in part.items() if name != "discriminator"}
        return {"anyOf" if name == "oneOf" else name: _any_of(value) for name, value in kept.items()}
    return [_any_of(one) for one in part] if isinstance(part, list) else part


def settings_under(config_class: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The class and all settings classes in its fields, each once, as a reader meets them."""
    seen: dict[type[BaseModel], None] = {}

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
            seen[annotation] = None
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for part in getattr(annotation, "__args__", ()):
            visit(part)

    visit(config_class)
    return iter(seen)


def comments_of(settings: type[BaseModel]) -> dict[str, str]:
    """What the comments behind a class's fields say, and those of the classes it extends; none without the source."""
    told: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if issubclass(base, BaseModel) and base.__module__ != BaseModel.__module__:
            told |= comments_behind_fields(base)
    return {name: comment for name, comment in told.items() if name in settings.model_fields}


def comments_behind_fields(declaring: type) -> dict[str, str]:
    """What the comments behind the fields of a class say, without those of the classes it extends."""
    try:
        source = textwrap.dedent(inspect.getsource(declaring))
    except OSError:  # installed without its source
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    fields = [node for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    found = {node.target.id: comments.get(node.end_lineno or node.lineno) for node in fields}  # type: ignore[union-attr]
    return {name: comment for name, comment in found.items() if comment and not comment.startswith("type:")}
