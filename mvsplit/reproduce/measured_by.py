"""By what a claim's figures are measured, as one fingerprint: the source of its measure, of what
that calls in this folder, and the constants that these name.

Bounds alone do not say what a verdict is: with another measure behind a figure the same bounds are
another rule. Comments, docstrings and layout do not count, nor where in its file a function stands.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from mvsplit.reproduce.claim import Claim
from mvsplit.reproduce.runlog import RunLog, Runs

_HERE = __name__.rpartition(".")[0]
_METHODS = {**vars(Runs), **vars(RunLog)}
_LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
_F_STRING = re.compile(r"(?i)(f|rf|fr)['\"]")
_FIELD = re.compile(r"\{([^{}]+)\}")


def measure_fingerprint(claim: Claim) -> str:
    """SHA-256 of it."""
    text = json.dumps(sorted(set(_reached(claim.measure))))
    return hashlib.sha256(text.encode()).hexdigest()


def _reached(measure: Callable[..., Any]) -> Iterator[str]:
    """The source of each function that a measure can come to, and each constant with its name."""
    todo, seen = [measure], {measure}
    while todo:
        function = todo.pop()
        yield _source(function)
        for name in _names(function.__code__):
            value = function.__globals__.get(name, _METHODS.get(name))
            value = value.fget if isinstance(value, property) else value
            if isinstance(value, FunctionType):
                if value.__module__.startswith(_HERE) and value not in seen:
                    seen.add(value)
                    todo.append(value)
            elif isinstance(value, bool | int | float | str | tuple | dict):
                yield f"{name}={value!r}"


def _names(code: CodeType) -> Iterator[str]:
    """Of globals and attributes, in a function and in those within it."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names(each)


def _source(function: Callable[..., Any]) -> str:
    """Of a function or of the lambdas that begin in its line, without layout."""
    module = inspect.getsource(inspect.getmodule(function) or function)
    line, name = function.__code__.co_firstlineno, function.__name__
    kind = ast.Lambda if name == "<lambda>" else ast.FunctionDef
    return " ".join(
        _without_layout(module, node)
        for node in _parsed(module)
        if isinstance(node, kind) and line == _first_line(node)
    )


@cache
def _parsed(module: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(module)))


def _first_line(node: ast.Lambda | ast.FunctionDef) -> int:
    above = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return min(each.lineno for each in (node, *above))


def _without_layout(module: str, node: ast.Lambda | ast.FunctionDef) -> str:
    text = ast.get_source_segment(module, node) or ""
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        text = text.replace(ast.get_source_segment(module, node.body[0]) or "", "", 1)
    return _tokens(f"({text})" if isinstance(node, ast.Lambda) else text)


def _tokens(text: str) -> str:
    """As Python 3.12 and later read it, on older ones too: what stands in the braces of an f-string
    is code."""
    found = tokenize.generate_tokens(io.StringIO(text).readline)
    return "".join(
        _FIELD.sub(lambda field: f"{{{_tokens(field[1])}}}", each.string)
        if each.type == tokenize.STRING and _F_STRING.match(each.string)
        else each.string
        for each in found
        if each.type not in _LAYOUT
    )
